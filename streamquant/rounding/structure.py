"""Method B (`--structure`): what an MLP's second layer sees, guessed from its first layer alone.

The first layer of such a pair stands behind a norm, so that its inputs have about unit size in every channel. Standard
normal inputs are pushed through its weight and the activation, and what arrives is sketched. That tells which hidden
units are always on, which are loud and which move together, as far as the weights decide it. It misses what the data
decide: the norm's output is not white (adaLN shifts it, a few channels carry much of its energy), and this moves the
means of the hidden units. Hence H is drawn far toward the identity, and the method is offered, not imposed.

Nothing is learned of columns that something else feeds (attention, in blocks that join both): they get the mean energy
of the others, and no correlation.

Inputs come from a fixed generator and weights are read in runs of a fixed size, so that the result does not depend on
budgets: products in float32, sums over inputs and columns in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamquant.calibration.sketch import DEFAULT_RANK, OVERSAMPLING, probe
from streamquant.calibration.statistics import LayerStatistics
from streamquant.presets.graph import Feed, compiled

from .weights import ACTIVATIONS, Weights, linear_rows, matrix_shape, row_chunks

# Toward the identity, in place of the sketch's 0.1 (`LayerHessian.shrunk`).
SHRINKAGE = 0.4
INPUTS = 512
SEED = 0


@dataclass(frozen=True)
class _Pair:
    """A second layer's feed, names filled in. rows: the first of the rows that feed it, of the gate's rows within the
    same layer (-1: none); kept: leading columns fed by something else; width: the columns fed."""

    feed: Feed
    first: str
    gate: str
    norm: str
    rows: tuple[int, int]
    kept: int
    width: int


def feeds(graph: tuple[Feed, ...], layer: str) -> str | None:
    """The layer that feeds a layer through an activation, as the preset has it; None for layers of other kinds."""
    for feed in graph:
        if match := compiled(feed.layers).search(layer):
            return match.expand(feed.first)
    return None


def is_fed(graph: tuple[Feed, ...], weights: Weights, layer: str) -> bool:
    """Whether `statistics` can say something of a layer (bare name), so far as names and shapes tell."""
    return any(_pair(feed, weights, layer) for feed in graph)


def statistics(
    graph: tuple[Feed, ...], weights: Weights, layer: str, rank: int = DEFAULT_RANK, seed: int = SEED
) -> LayerStatistics | None:
    """The moments of what a layer (bare name) would see if its MLP's inputs were standard normal; `shrunk(SHRINKAGE)`
    suits them.

    None where the preset knows no feed, where the first layer is missing, quantized or not finite, or where shapes do
    not fit. Memory: 4·INPUTS·N bytes for N columns (38 MB for 18432), and about 40 MB. Raises SourceReadError.
    """
    pair = next(filter(None, (_pair(feed, weights, layer) for feed in graph)), None)
    if pair is None:
        return None
    hidden = _hidden(pair, weights, seed)
    if not np.isfinite(hidden).all():
        return None
    columns = pair.kept + pair.width
    signs = probe(columns, min(rank + OVERSAMPLING, columns), 0)[pair.kept :]
    chunks = [slice(*span) for span in row_chunks(0, pair.width, INPUTS)]
    projected = sum(hidden[:, part].astype(np.float64) @ signs[part] for part in chunks)
    sketch = np.zeros((columns, signs.shape[1]), dtype=np.float32)
    mean, diagonal = np.zeros((2, columns), dtype=np.float32)
    for part in chunks:
        block, target = hidden[:, part].astype(np.float64), slice(pair.kept + part.start, pair.kept + part.stop)
        sketch[target] = block.T @ projected / INPUTS
        mean[target] = block.mean(axis=0)
        diagonal[target] = np.square(block).mean(axis=0)
    diagonal[: pair.kept] = diagonal[pair.kept :].mean(dtype=np.float64)
    return LayerStatistics(INPUTS, mean, diagonal, sketch=sketch)


def _pair(feed: Feed, weights: Weights, layer: str) -> _Pair | None:
    """The feed of a layer where its regular expression and all shapes fit, else None."""
    match = compiled(feed.layers).search(layer)
    second = matrix_shape(weights, layer)
    if match is None or second is None:
        return None
    first, gate, norm = (match.expand(template) for template in (feed.first, feed.gate, feed.norm))
    shape = matrix_shape(weights, first)
    if shape is None:
        return None
    kept, skipped = feed.keep_columns * shape[1], feed.skip_rows * shape[1]
    width = second[1] - kept
    if width <= 0 or skipped + width * (2 if feed.gate_half else 1) != shape[0]:
        return None
    if (gate and matrix_shape(weights, gate) != shape) or (norm and weights.shape(norm) != (shape[1],)):
        return None
    rows = {"": (skipped, -1), "first": (skipped + width, skipped), "second": (skipped, skipped + width)}[feed.gate_half]
    return _Pair(feed, first, gate, norm, rows, kept, width)


def _hidden(pair: _Pair, weights: Weights, seed: int) -> np.ndarray:
    """What arrives at the fed columns: float32 [INPUTS, width]."""
    features = matrix_shape(weights, pair.first)[1]
    # The legacy generator, whose stream numpy promises never to change.
    inputs = np.random.RandomState(seed).standard_normal((INPUTS, features)).astype(np.float32)
    if pair.norm:
        inputs *= weights.rows(pair.norm, 0, features)
    activation, (first_row, gate_row) = ACTIVATIONS[pair.feed.activation], pair.rows
    hidden = np.empty((INPUTS, pair.width), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for begin, end in row_chunks(0, pair.width, features):
            values = linear_rows(weights, pair.first, inputs, first_row + begin, first_row + end)
            if pair.gate:
                values *= activation(linear_rows(weights, pair.gate, inputs, begin, end))
            elif gate_row >= 0:
                values *= activation(linear_rows(weights, pair.first, inputs, gate_row + begin, gate_row + end))
            else:
                values = activation(values)
            hidden[:, begin:end] = values
    return hidden
