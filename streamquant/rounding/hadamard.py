"""The Hadamard matrix of ConvRot, and which layers are better for it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from streamquant.checkpoint.reader import TileReader
from streamquant.formats.plain import to_float32
from streamquant.kernels.codebooks import INT8_MAX
from streamquant.plan import Plan, Unit

from .hessian import LayerHessian

SAMPLED_ROWS = 64
SMALLEST_SCALE = np.float32(1e-12)
LARGEST = np.finfo(np.float32).max  # beyond which a sum of a group's weights may lead
H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=np.float64)


@functools.cache
def hadamard(group_size: int) -> np.ndarray:
    """H of a group: float64 [g, g], symmetric and orthonormal; see `streamquant.kernels.hadamard`."""
    matrix = np.ones((1, 1))
    while len(matrix) < group_size:
        matrix = np.kron(H4, matrix)
    return matrix / np.sqrt(group_size)


def unrotated_layers(
    plan: Plan, reader: TileReader, hessian: Callable[[Unit], LayerHessian | None]
) -> frozenset[str]:
    """Layers of INT8 rows that were left to us and come out no better rotated: decided on a sample of rows.

    Rotation takes outliers out of a row; a row without any (all weights of one size, say) it only makes longer-tailed.
    The error is that of the outputs where their inputs are known, else that of the weights.
    """
    layers = set()
    for unit in plan.units:
        if unit.choice is None or unit.choice.convrot is not None or not getattr(unit.format, "convrot_group_size", 0):
            continue
        rows = _sample(unit, reader)
        known = hessian(unit)

        def cost(error: np.ndarray, known: LayerHessian | None = known) -> float:
            return float(np.square(error).sum() if known is None else known.output_error(error).sum())

        size = unit.format.convrot_group_size
        if np.abs(rows).max() > LARGEST / size or cost(_rotated_error(rows, size)) >= cost(_error(rows)):
            layers.add(unit.layer)
    return frozenset(layers)


def _sample(unit: Unit, reader: TileReader) -> np.ndarray:
    """Some rows of a weight, evenly spread: float32 [n, N]; what is not finite counts as 0."""
    rows, columns = unit.shape
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).round().astype(np.int64))
    ranges = [(row * columns, (row + 1) * columns) for row in chosen.tolist()]
    raw = [np.frombuffer(unit.read(reader.tile, begin, end), np.uint8) for begin, end in ranges]
    return np.nan_to_num(to_float32(np.concatenate(raw), unit.dtype), posinf=0.0, neginf=0.0).reshape(-1, columns)


def _error(rows: np.ndarray) -> np.ndarray:
    """Q - W of rows rounded to nearest INT8 with row scales: [n, N]."""
    scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / INT8_MAX, SMALLEST_SCALE)
    return np.rint(rows / scale) * scale - rows


def _rotated_error(rows: np.ndarray, group_size: int) -> np.ndarray:
    """The same, rounded in the rotated space and rotated back."""
    matrix = hadamard(group_size)
    turned = (rows.reshape(-1, group_size) @ matrix).reshape(rows.shape)
    return (_error(turned).reshape(-1, group_size) @ matrix).reshape(rows.shape)
