"""Coordinate descent on the peer's objective, compiled: see `streamquant.kernels.svd_descent` for the definition, whose
codes this gives."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..feedback import low_rank_feedback
from ..svd_descent import GROUP_ROWS, Descended, grid_steps, padded_vectors
from .refine import refine

# No reassociation: the order of a sum decides codes.
OPTIONS = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}


@njit(inline="always")
def _dot(left, right):
    """Σ_i left_i right_i in eight partial sums; the length is a multiple of eight."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    for base in range(0, left.size, 8):
        s0 += left[base] * right[base]
        s1 += left[base + 1] * right[base + 1]
        s2 += left[base + 2] * right[base + 2]
        s3 += left[base + 3] * right[base + 3]
        s4 += left[base + 4] * right[base + 4]
        s5 += left[base + 5] * right[base + 5]
        s6 += left[base + 6] * right[base + 6]
        s7 += left[base + 7] * right[base + 7]
    return ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))


@njit(**OPTIONS)
def _squares(state):
    total = 0.0
    for first in range(state.shape[0]):
        for second in range(state.shape[1]):
            total += state[first, second] * state[first, second]
    return total


@njit(**OPTIONS)
def _descend_group(tile, scale, column_group, left, right, lengths, values, codes_of, ranks, codes, sweeps):
    """One group of rows, in place on its codes [rows, N] uint8. Returns ‖S‖² before and after.

    tile [rows, N], scale [rows, groups] float32. column_group [N] int64. left [rows, K], right [N, K], lengths [N]
    float64. values, codes_of, ranks: `GridSteps`.
    """
    rows, columns = tile.shape
    rank_count, width = values.size, right.shape[1]
    state = np.zeros((width, width))
    change, pull = np.empty(width), np.empty(width)
    for row in range(rows):
        change[:] = 0.0
        for column in range(columns):
            value = values[ranks[codes[row, column]]] * scale[row, column_group[column]]
            error = np.float64(value) - np.float64(tile[row, column])
            for term in range(width):
                change[term] += error * right[column, term]
        for first in range(width):
            for second in range(width):
                state[first, second] += left[row, first] * change[second]
    before = _squares(state)
    for _ in range(sweeps):
        for row in range(rows):
            pull[:] = 0.0
            change[:] = 0.0
            for first in range(width):
                for second in range(width):
                    pull[second] += left[row, first] * state[first, second]
            square = _dot(left[row], left[row])
            for column in range(columns):
                slope = _dot(pull, right[column])
                bend = square * lengths[column]
                unit = scale[row, column_group[column]]
                rank = ranks[codes[row, column]]
                neighbour = rank + 1 if (slope < 0.0) == (unit > np.float32(0)) else rank - 1
                if neighbour < 0 or neighbour >= rank_count:
                    continue
                step = np.float64(values[neighbour] * unit) - np.float64(values[rank] * unit)
                if 2.0 * step * slope + step * step * bend < 0.0:
                    codes[row, column] = codes_of[neighbour]
                    share = step * square
                    for term in range(width):
                        pull[term] += share * right[column, term]
                        change[term] += step * right[column, term]
            for first in range(width):
                for second in range(width):
                    state[first, second] += left[row, first] * change[second]
    return before, _squares(state)


@njit(**OPTIONS)
def _lengths(right, lengths):
    for column in range(right.shape[0]):
        lengths[column] = _dot(right[column], right[column])


def svd_descent(
    tile: np.ndarray, scale: np.ndarray, column_group: np.ndarray, left_rows: np.ndarray, right: np.ndarray, grid: str,
    multiplier: np.ndarray | None = None, sweeps: int = 2,
) -> Descended:  # fmt: skip
    """Codes of a tile of whole groups of rows: `streamquant.kernels.svd_descent.svd_descent`, releasing the GIL."""
    rows, columns = tile.shape
    tile = np.ascontiguousarray(tile, dtype=np.float32)
    scale = np.ascontiguousarray(scale, dtype=np.float32)
    column_group = np.ascontiguousarray(column_group, dtype=np.int64)
    # Under the identity the error-feedback pass rounds to nearest.
    identity = low_rank_feedback(np.ones(columns), np.zeros((columns, 0)))
    nearest = refine(tile, scale, column_group, identity, grid, multiplier, guard=False).codes
    codes = nearest.view(np.uint8)
    left, right = padded_vectors(left_rows), padded_vectors(right)
    lengths = np.empty(columns)
    _lengths(right, lengths)
    steps = grid_steps(grid)
    objectives = [
        _descend_group(
            tile[part], scale[part], column_group, left[part], right, lengths, *steps, codes[part], sweeps
        )
        for part in (slice(begin, begin + GROUP_ROWS) for begin in range(0, rows, GROUP_ROWS))
    ]  # fmt: skip
    before, after = np.array(objectives).T
    return Descended(codes.view(np.int8) if grid == "int8" else codes, before, after)
