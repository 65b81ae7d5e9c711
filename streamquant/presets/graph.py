"""What presets know of an architecture's graph: which layers see only time, and which layer feeds which.

Two optional sections of a preset file. All names are without the checkpoint's prefix and, for layers, without ".weight".

    [time.embeddings.NAME]   a sinusoid: factor, and dimension, or dimension_of = TENSOR, whose last dimension it is;
                             maximum_period = 10000; period_reached = false; sine_first = false;
                             values = [...] where it is not of t in [0, 1] but of these numbers (a guidance scale)
    [time.vectors.NAME]      a sum: terms = [{ embedding = NAME, chain = [STEP, ...], optional = false }, ...];
                             unless = [TENSOR, ...]: with any of these in the checkpoint the vector holds more than time
    [[time.layers]]          layers = REGEX of the layers that see vector = NAME after chain = [STEP, ...]

A STEP is "silu" or "gelu_tanh", "rms_norm:TENSOR" (with its weight), or else a linear layer, bias included where the
checkpoint has one. Layers that stand in a chain see what the chain has made so far. In [[time.layers]] a step may hold
groups of the regular expression (\\1).

    [[feeds]]                layers = REGEX of second layers, first = TEMPLATE of the layer that feeds them,
                             activation = "gelu_tanh" | "silu" of its output; optional:
      norm = TEMPLATE        the tensor of weights by which a norm before the first layer multiplies
      gate = TEMPLATE        another layer, whose output goes through the activation and multiplies the first's
      gate_half = "first" | "second"    the gate is that half of the first layer's own rows
      skip_rows, keep_columns           multiples of the first layer's in_features: rows of the first that do not feed
                                        the second, and leading columns of the second that something else feeds
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import regex

ACTIVATIONS = ("silu", "gelu_tanh")
NORM = "rms_norm:"


@dataclass(frozen=True)
class Embedding:
    """cos and sin of x · factor · maximum_period^(-i / h), i = 0 … h - 1, h = dimension / 2; x is t, or one of values.

    period_reached: i / (h - 1) instead, so that the slowest has the maximum period.
    """

    factor: float
    dimension: int = 0
    dimension_of: str = ""
    maximum_period: float = 10000.0
    period_reached: bool = False
    sine_first: bool = False
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Term:
    """An embedding taken through a chain of steps. optional: left out where the checkpoint lacks its first layer."""

    embedding: str
    chain: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Vector:
    """A sum of terms, of one width. unless: tensors whose presence means that more is added to it than time."""

    terms: tuple[Term, ...]
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class TimeLayers:
    """Layers found by a regular expression, and what they see: a vector, taken through a chain of steps."""

    layers: str
    vector: str
    chain: tuple[str, ...] = ()


@dataclass(frozen=True)
class TimeGraph:
    """All that a preset knows of layers which see only time."""

    embeddings: dict[str, Embedding]
    vectors: dict[str, Vector]
    layers: tuple[TimeLayers, ...]


@dataclass(frozen=True)
class Feed:
    """How an MLP's second layers are fed. Fields as the file has them; see the module."""

    layers: str
    first: str
    activation: str
    norm: str = ""
    gate: str = ""
    gate_half: str = ""
    skip_rows: int = 0
    keep_columns: int = 0

    @property
    def gated(self) -> bool:
        return bool(self.gate or self.gate_half)


def is_layer(step: str) -> bool:
    """Whether a step of a chain is a linear layer."""
    return step not in ACTIVATIONS and not step.startswith(NORM)


@functools.cache
def compiled(pattern: str) -> regex.Pattern:
    return regex.compile(pattern)


def parse_time(section: dict[str, Any] | None) -> TimeGraph | None:
    """The `time` section of a preset file. Raises TypeError or ValueError for a field that does not exist or fit."""
    if section is None:
        return None
    if unknown := set(section) - {"embeddings", "vectors", "layers"}:
        raise ValueError(f"the time section has no {sorted(unknown)}")
    embeddings = {name: Embedding(**_tuples(fields)) for name, fields in section["embeddings"].items()}
    vectors = {}
    for name, fields in section["vectors"].items():
        terms = tuple(Term(**_tuples(term)) for term in fields["terms"])
        vectors[name] = Vector(terms, **{key: tuple(value) for key, value in fields.items() if key != "terms"})
    for name, embedding in embeddings.items():
        if bool(embedding.dimension) == bool(embedding.dimension_of):
            raise ValueError(f"embedding {name}: needs either dimension or dimension_of")
    layers = tuple(TimeLayers(**_tuples(fields)) for fields in section.get("layers", ()))
    if unknown := {term.embedding for vector in vectors.values() for term in vector.terms} - set(embeddings):
        raise ValueError(f"terms name embeddings that are not there: {sorted(unknown)}")
    if unknown := {entry.vector for entry in layers} - set(vectors):
        raise ValueError(f"layers name vectors that are not there: {sorted(unknown)}")
    return TimeGraph(embeddings, vectors, layers)


def parse_feeds(sections: list[dict[str, Any]]) -> tuple[Feed, ...]:
    """The `feeds` sections of a preset file. Raises TypeError or ValueError for a field that does not exist or fit."""
    feeds = tuple(Feed(**fields) for fields in sections)
    for feed in feeds:
        if feed.activation not in ACTIVATIONS:
            raise ValueError(f"{feed.layers}: there is no activation {feed.activation!r}")
        if feed.gate_half not in ("", "first", "second") or (feed.gate and feed.gate_half):
            raise ValueError(f'{feed.layers}: the gate is a layer or the "first" or "second" half, not both')
    return feeds


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
