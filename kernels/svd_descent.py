"""The peer's objective, ‖U_kᵀ (Q - W) V_k‖, by coordinate descent over the codes: the definition, in numpy.

U_k [M, k] and V_k [N, k] are singular vectors of W itself. This is what convert-to-quant's learned rounding minimises.
It is here for comparison only: the weight's own singular directions are not where inputs lie, and a lower value of it
makes outputs no better, often worse.

Rows are taken in groups of GROUP_ROWS, so that tiles are independent and a result does not depend on their size. Of a
group g, S_g = U_gᵀ E_g V_k [k, k], E = Q - W; the whole is their sum, and ‖Σ S_g‖ ≤ Σ ‖S_g‖. Each ‖S_g‖ is descended
on its own: an upper bound of the whole objective falls. What is given up is that errors of one group could cancel
those of another.

From nearest, every code in turn (row after row, columns ascending) moves to its neighbour on the grid if that lowers
‖S_g‖². Moving one by δ adds δ u v_jᵀ to S, so that ‖S‖² changes by 2δ uᵀS v_j + δ² ‖u‖² ‖v_j‖²; only the neighbour on
the side against the sign of uᵀS v_j can pay. A row keeps a = uᵀS, k multiplications a code. A sweep goes once over all.

Order of arithmetic: float64, each product rounded, then added. Sums over k in eight partial sums, element i to sum
i mod 8, added in pairs; all others in ascending order. The compiled path does exactly this: its codes are the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .codebooks import ASCENDING_CODES, CODE_BOOKS

GROUP_ROWS = 128
PARTIAL_SUMS = 8


class Descended(NamedTuple):
    """codes [rows, N]: int8 for the INT8 grid, else uint8. before, after [row groups] float64: ‖S_g‖² of rounding to
    nearest and as it is now, in the square of the weight's unit."""

    codes: np.ndarray
    before: np.ndarray
    after: np.ndarray


class GridSteps(NamedTuple):
    """A grid as a ladder. values [V] float32, ascending and distinct; codes [V] uint8; ranks [256] int64: the place of
    each code's value, -1 for codes that stand for no number."""

    values: np.ndarray
    codes: np.ndarray
    ranks: np.ndarray


def grid_steps(grid: str) -> GridSteps:
    """The ladder of one of `refined.GRIDS`. Of two codes for zero the first is kept to move to."""
    if grid == "int8":
        numbers = np.arange(-127, 128)
        values, codes = numbers.astype(np.float32), numbers.astype(np.int8).view(np.uint8)
    elif grid == "e4m3":
        magnitudes = np.arange(127)
        fraction, exponent = magnitudes & 7, magnitudes >> 3
        positive = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))
        values = np.concatenate([-positive[:0:-1], positive]).astype(np.float32)
        codes = np.concatenate([magnitudes[:0:-1] | 0x80, magnitudes]).astype(np.uint8)
    else:
        codes = ASCENDING_CODES[grid]
        values, first = np.unique(CODE_BOOKS[grid][codes], return_index=True)
        codes = codes[first]
    ranks = np.full(256, -1, dtype=np.int64)
    ranks[codes] = np.arange(codes.size)
    zero = ranks[codes[values == 0]]
    if grid == "e4m3":
        ranks[0x80] = zero[0]
    elif grid in CODE_BOOKS:
        ranks[np.flatnonzero(CODE_BOOKS[grid] == 0)] = zero[0]
    return GridSteps(values, codes, ranks)


def padded_vectors(vectors: np.ndarray) -> np.ndarray:
    """vectors [n, k] as float64, with zero columns up to a multiple of PARTIAL_SUMS."""
    return np.pad(np.asarray(vectors, dtype=np.float64), ((0, 0), (0, -vectors.shape[1] % PARTIAL_SUMS)))


def dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Σ_i left_i right_i over the last axis, in the order of arithmetic above."""
    products = (left * right).reshape(*np.broadcast_shapes(left.shape, right.shape)[:-1], -1, PARTIAL_SUMS)
    sums = products[..., 0, :].copy()
    for block in range(1, products.shape[-2]):
        sums += products[..., block, :]
    while sums.shape[-1] > 1:
        sums = sums[..., 0::2] + sums[..., 1::2]
    return sums[..., 0]


def svd_descent(
    tile: np.ndarray, scale: np.ndarray, column_group: np.ndarray, left_rows: np.ndarray, right: np.ndarray, grid: str,
    multiplier: np.ndarray | None = None, sweeps: int = 2,
) -> Descended:  # fmt: skip
    """Codes of a tile of whole groups of rows (the last group of a weight may be short).

    tile [rows, N] float32, finite. scale, multiplier [rows, groups] float32 and column_group [N]: as
    `streamquant.kernels.refine.refine` has them. left_rows [rows, k]: U_k's rows of this tile. right [N, k]: V_k.
    A group is worked on by steps over 128·N codes, all groups of the tile at once: give it many rows.
    """
    import torch

    from .refine import round_to_grid

    rows, columns = tile.shape
    groups = -(-rows // GROUP_ROWS)
    steps = grid_steps(grid)
    spread = np.ascontiguousarray(scale[:, column_group], dtype=np.float32)
    with np.errstate(divide="ignore"):
        factor = np.float32(1) / spread if multiplier is None else np.ascontiguousarray(multiplier[:, column_group])
    nearest = round_to_grid(*(torch.from_numpy(part) for part in (np.ascontiguousarray(tile), spread, factor)), grid)[1]

    def by_group(values: np.ndarray) -> np.ndarray:
        """[rows, n] as [row groups, GROUP_ROWS, n]; rows that are not there are zeros and never move."""
        return np.pad(values, ((0, groups * GROUP_ROWS - rows), (0, 0))).reshape(groups, GROUP_ROWS, -1)

    codes, weights, spread = (by_group(part) for part in (nearest.numpy().view(np.uint8), tile, spread))
    left, right = by_group(padded_vectors(left_rows)), padded_vectors(right)
    state = np.zeros((groups, right.shape[1], right.shape[1]))
    for row in range(GROUP_ROWS):
        change = np.zeros((groups, right.shape[1]))
        for column in range(columns):
            value = steps.values[steps.ranks[codes[:, row, column]]] * spread[:, row, column]
            error = value.astype(np.float64) - weights[:, row, column]
            change += error[:, None] * right[column]
        state += left[:, row, :, None] * change[:, None]
    before = np.square(state).sum(axis=(1, 2))
    lengths = dot(right, right)
    for _ in range(sweeps):
        for row in range(GROUP_ROWS):
            _sweep_row(steps, codes[:, row], spread[:, row], left[:, row], right, lengths, state)
    after = np.square(state).sum(axis=(1, 2))
    codes = codes.reshape(-1, columns)[:rows]
    return Descended(codes.view(np.int8) if grid == "int8" else codes, before, after)


def _sweep_row(steps: GridSteps, codes, scale, left, right, lengths, state) -> None:
    """One row of every group, in place on codes [groups, N] and state [groups, K, K]. scale [groups, N], left
    [groups, K]."""
    pull = np.zeros(left.shape)
    for term in range(left.shape[1]):
        pull += left[:, term, None] * state[:, term]
    square = dot(left, left)
    change = np.zeros(left.shape)
    for column in range(codes.shape[1]):
        slope = dot(pull, right[column])
        bend = square * lengths[column]
        rank = steps.ranks[codes[:, column]]
        upward = (slope < 0) == (scale[:, column] > 0)
        neighbour = np.clip(np.where(upward, rank + 1, rank - 1), 0, steps.values.size - 1)
        ends = [(steps.values[place] * scale[:, column]).astype(np.float64) for place in (neighbour, rank)]
        step = ends[0] - ends[1]
        better = 2.0 * step * slope + step * step * bend < 0.0
        step = np.where(better, step, 0.0)
        codes[:, column] = np.where(better, steps.codes[neighbour], codes[:, column])
        pull += (step * square)[:, None] * right[column]
        change += step[:, None] * right[column]
    state += left[:, :, None] * change[:, None]
