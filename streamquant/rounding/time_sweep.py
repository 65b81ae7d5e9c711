"""Layers that see only the time embedding, calibrated with no data and no model run: t is swept through the small graph
that a preset describes (`streamquant.presets.graph`).

Modulations, the final adaLN and the embedding's own layers have as inputs a curve in t, at most a surface in t and the
distilled guidance scale. Its second moment H = E[x xᵀ] is computed here from the checkpoint's own weights. Such an H is
nearly of low rank, so that rounding can push almost all of its error out of the way.

t is spread evenly over [0, 1], both ends included, because schedules differ: every shift, step count and resolution
puts a sampler's steps elsewhere, and the ends are visited by all (t = 0 also as the time of reference images). A model
that is shown 1 - t sees the same. The embedding's fastest sines turn 1000 radians in that interval: products of two are
summed exactly by a regular grid of more than 2000 / 2π points, and with fewer two frequencies would seem one. Every
guidance scale of the preset goes with every t, with the same weight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streamquant.calibration.sketch import DEFAULT_RANK, OVERSAMPLING, probe
from streamquant.calibration.statistics import LayerStatistics
from streamquant.presets.graph import NORM, Embedding, Term, TimeGraph, Vector, compiled, is_layer

from .weights import ACTIVATIONS, Weights, linear, matrix_shape

POINTS = 512
# H is exact but for the spread of t, so it is drawn toward the identity far less than one measured on a few images: with
# the sketch's 0.1 outputs are about twice as wrong, below 0.01 the weight's own error grows faster than theirs falls.
SHRINKAGE = 0.01
BLOCK = 128  # inputs summed at once
DENSE_COLUMNS = 1024  # up to here H is kept whole: 4 MB
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class _Sight:
    """What a layer sees: a vector, or one embedding of its own, taken through a chain of steps."""

    vector: Vector
    chain: tuple[str, ...]


def sweep_times() -> np.ndarray:
    """The values of t: float64 [POINTS + 2], ascending, from 0 to 1."""
    return np.concatenate([[0.0], (np.arange(POINTS) + 0.5) / POINTS, [1.0]])


def embed(embedding: Embedding, values: np.ndarray, dimension: int) -> np.ndarray:
    """The sinusoids of values [n]: float64 [n, dimension] (Vaswani et al., "Attention is all you need", 2017, 3.5)."""
    half = dimension // 2
    exponents = -np.arange(half) / (half - 1 if embedding.period_reached else half)
    frequencies = embedding.factor * embedding.maximum_period**exponents
    angles = values[:, None] * frequencies
    parts = (np.sin(angles), np.cos(angles)) if embedding.sine_first else (np.cos(angles), np.sin(angles))
    return np.concatenate(parts, axis=1)


def sees_only_time(graph: TimeGraph, layer: str) -> bool:
    """Whether the preset says that a layer (bare name) sees only time, whatever the checkpoint holds.

    A checkpoint may hold tensors that say otherwise (`Vector.unless`): `TimeSweep.sees_only_time` looks for them.
    """
    return _sight(graph, layer) is not None


def _sight(graph: TimeGraph, layer: str) -> _Sight | None:
    for entry in graph.layers:
        if match := compiled(entry.layers).search(layer):
            return _Sight(graph.vectors[entry.vector], tuple(match.expand(step) for step in entry.chain))
    for vector in graph.vectors.values():
        for term in vector.terms:
            if layer in term.chain:
                return _Sight(Vector((Term(term.embedding, ()),)), term.chain[: term.chain.index(layer)])
    return None


class TimeSweep:
    """The sweep of one checkpoint. Layers that see the same share the work; safe to use from several threads.

    rank: the largest that will be asked of the statistics' low-rank form; the sketch is twice as wide, so that the
    form is as good as exact. Memory: about 85 MB while a layer of 6144 features is worked on; 13 MB kept for each
    different vector.
    """

    def __init__(self, graph: TimeGraph, weights: Weights, rank: int = DEFAULT_RANK):
        self.graph, self.weights, self.rank = graph, weights, rank
        self._lock = threading.Lock()
        self._sums: dict[Vector, list[np.ndarray] | None] = {}
        self._statistics: dict[_Sight, LayerStatistics | None] = {}

    def sees_only_time(self, layer: str) -> bool:
        """Whether a layer (bare name) of this checkpoint sees only time."""
        sight = _sight(self.graph, layer)
        return sight is not None and not any(name in self.weights for name in sight.vector.unless)

    def statistics(self, layer: str) -> LayerStatistics | None:
        """The moments of what a layer (bare name) sees, over all t and guidance scales; `shrunk(SHRINKAGE)` suits them.

        None where it sees more than time, where a weight on the way is missing, quantized or not finite, or where
        shapes do not fit the preset. Raises SourceReadError.
        """
        shape = matrix_shape(self.weights, layer)
        if shape is None or not self.sees_only_time(layer):
            return None
        sight = _sight(self.graph, layer)
        with self._lock:
            found = self._statistics[sight] if sight in self._statistics else self._measured(sight)
            if not any(is_layer(step) for step in sight.chain):  # else no other layer sees the same
                self._statistics[sight] = found
        return found if found is not None and found.columns == shape[1] else None

    def _measured(self, sight: _Sight) -> LayerStatistics | None:
        parts = self._parts(sight.vector)
        if parts is None:
            return None
        count, total, squares, moment, signs = 0, 0.0, 0.0, 0.0, None
        for block in _combinations(parts):
            inputs = self._through(block, sight.chain)
            if inputs is None or not np.isfinite(inputs).all():
                return None
            columns = inputs.shape[1]
            dense = columns <= DENSE_COLUMNS
            if signs is None and not dense:
                signs = probe(columns, min(2 * self.rank + OVERSAMPLING, columns), 0).astype(np.float64)
            count += inputs.shape[0]
            total = total + inputs.sum(axis=0)
            squares = squares + np.square(inputs).sum(axis=0)
            moment = moment + inputs.T @ (inputs if dense else inputs @ signs)
        moments = {"hessian" if signs is None else "sketch": (moment / count).astype(np.float32)}
        mean, diagonal = ((values / count).astype(np.float32) for values in (total, squares))
        return LayerStatistics(count, mean, diagonal, **moments)

    def _parts(self, vector: Vector) -> list[np.ndarray] | None:
        """The vector's terms, those of one variable added up: float32 [values, C] each, of time first."""
        if vector not in self._sums:
            self._sums[vector] = self._added(vector)
        return self._sums[vector]

    def _added(self, vector: Vector) -> list[np.ndarray] | None:
        sums: dict[tuple[float, ...], np.ndarray] = {}
        for term in vector.terms:
            first = next((step for step in term.chain if is_layer(step)), None)
            if term.optional and f"{first}.weight" not in self.weights:
                continue
            embedding = self.graph.embeddings[term.embedding]
            dimension = embedding.dimension or (self.weights.shape(embedding.dimension_of) or (0,))[-1]
            if dimension < 4:
                return None
            values = np.array(embedding.values) if embedding.values else sweep_times()
            result = self._through(embed(embedding, values, dimension), term.chain)
            if result is None or any(other.shape[1] != result.shape[1] for other in sums.values()):
                return None
            sums[embedding.values] = sums[embedding.values] + result if embedding.values in sums else result
        return [part.astype(np.float32) for _, part in sorted(sums.items(), key=lambda item: len(item[0]))]

    def _through(self, values: np.ndarray, chain: tuple[str, ...]) -> np.ndarray | None:
        """values [n, C] float64 taken through a chain: float64 [n, C'], None where a weight is not there or not so wide."""
        for step in chain:
            if step in ACTIVATIONS:
                values = ACTIVATIONS[step](values)
            elif step.startswith(NORM):
                name = step.removeprefix(NORM)
                if self.weights.shape(name) != (values.shape[1],):
                    return None
                root = np.sqrt(np.square(values).mean(axis=1, keepdims=True) + NORM_EPSILON)
                values = values / root * self.weights.rows(name, 0, values.shape[1])
            else:
                shape = matrix_shape(self.weights, step)
                if shape is None or shape[1] != values.shape[1]:
                    return None
                values = linear(self.weights, step, values)
        return values


def _combinations(parts: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Sums of one row of each part, every combination once: blocks of at most BLOCK rows [n, C], float64."""
    if len(parts) < 2:
        for begin in range(0, len(parts[0]), BLOCK):
            yield parts[0][begin : begin + BLOCK].astype(np.float64)
        return
    for row in parts[-1]:
        for block in _combinations(parts[:-1]):
            yield block + row
