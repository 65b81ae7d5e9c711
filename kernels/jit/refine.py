"""The error-feedback pass and coordinate-descent sweeps, compiled: see `streamquant.kernels.feedback` for what they do
and `streamquant.kernels.refine` for the definition, whose bits this gives.

Rows go through in strips of LANES, a lane each. Per block of columns: a matrix product brings in the feedback of all
blocks before, a short sequential loop rounds column after column, a matrix product takes the block's errors on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from ..codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS
from ..feedback import BLOCK, Feedback
from ..refined import GRIDS, Refined
from .bits import SIGNLESS, bits_float, float_bits, int32
from .strip_product import LANES, OPTIONS, add_product, add_product_row

INT8, E4M3 = GRIDS.index("int8"), GRIDS.index("e4m3")
ZERO, INT8_LIMIT = np.float32(0), np.float32(127)
# 1.5 · 2**23: after this addition the low mantissa bits are the integer rounded to nearest even.
ALIGNER, ALIGNER_BITS = np.float32(12582912), np.int32(0x4B400000)
E4M3_LARGEST = int32(np.float32(448.0).view(np.int32))
E4M3_SMALLEST_NORMAL = int32(np.float32(2.0**-6).view(np.int32))
# Added to a magnitude below the smallest normal, this leaves the subnormal code in the low bits, rounded by the adder.
E4M3_ALIGNER = np.float32(2.0**14)
E4M3_ALIGNER_BITS = int32(E4M3_ALIGNER.view(np.int32))
E4M3_QUANTUM = np.float32(2.0**-9)
E4M3_REBIAS, E4M3_KEPT, E4M3_HALF = int32((127 - 7) << 3), int32(-(1 << 20)), int32((1 << 19) - 1)
_NO_BOOK = (np.zeros(15, np.float32), np.zeros(16, np.float32), np.zeros(16, np.uint8))


class _Grid(NamedTuple):
    """The grid's number in GRIDS, and of a code book boundaries [15], values [16] float32 and codes [16] uint8,
    ascending."""

    number: int
    boundaries: np.ndarray
    values: np.ndarray
    codes: np.ndarray


class _Inputs(NamedTuple):
    """A tile and what belongs to it. weights [rows, N], scale and factor [rows, groups]: float32, C order.

    group [N] int64: the scale of the column visited j-th. order [N] int64. codes [rows, N] uint8: written.
    """

    weights: np.ndarray
    scale: np.ndarray
    factor: np.ndarray
    group: np.ndarray
    order: np.ndarray
    codes: np.ndarray


class _Prepared(NamedTuple):
    """The fields of `Feedback`, but `order`."""

    dense: bool
    gains: np.ndarray
    vectors: np.ndarray
    coupling: np.ndarray
    slopes: np.ndarray
    pivots: np.ndarray
    diagonal: np.ndarray
    curvature: np.ndarray


class _Strip(NamedTuple):
    """Room for one strip, float32, a lane a row.

    weights, cross, changes [BLOCK, LANES]: of one block. errors [P or BLOCK, LANES]: q - w, of all columns where a
    dense H or a sweep asks for them. state [K, LANES]: Σ e_j v_j. scale, factor [groups, LANES]. wanted, rounded
    [LANES]. codes [BLOCK, LANES] uint8.
    """

    weights: np.ndarray
    cross: np.ndarray
    changes: np.ndarray
    errors: np.ndarray
    state: np.ndarray
    scale: np.ndarray
    factor: np.ndarray
    wanted: np.ndarray
    rounded: np.ndarray
    codes: np.ndarray


@njit(**OPTIONS)
def _round(wanted, strip, group, grid, codes):
    """The grid's value nearest to each lane's wish, into strip.rounded, and its code, into codes [LANES] uint8."""
    factor, scale, rounded = strip.factor[group], strip.scale[group], strip.rounded
    boundaries, values, book_codes = grid.boundaries, grid.values, grid.codes
    if grid.number == INT8:
        for lane in range(LANES):
            steps = min(max(wanted[lane] / scale[lane], -INT8_LIMIT), INT8_LIMIT)
            code = int32(float_bits(steps + ALIGNER) - ALIGNER_BITS)
            codes[lane] = np.uint8(code & int32(255))
            rounded[lane] = np.float32(code) * scale[lane]
    elif grid.number == E4M3:
        for lane in range(LANES):
            bits = float_bits(wanted[lane] * factor[lane])
            sign = int32(bits & ~SIGNLESS)
            magnitude = min(int32(bits & SIGNLESS), E4M3_LARGEST)
            raised = int32(int32(magnitude + E4M3_HALF) + int32(int32(magnitude >> int32(20)) & int32(1)))
            aligned = float_bits(bits_float(magnitude) + E4M3_ALIGNER)
            is_normal = magnitude >= E4M3_SMALLEST_NORMAL
            code = int32(int32(raised >> int32(20)) - E4M3_REBIAS) if is_normal else int32(aligned - E4M3_ALIGNER_BITS)
            value = bits_float(int32(raised & E4M3_KEPT)) if is_normal else np.float32(code) * E4M3_QUANTUM
            codes[lane] = np.uint8(int32(code | int32(int32(sign >> int32(24)) & int32(0x80))))
            rounded[lane] = bits_float(int32(float_bits(value) | sign)) * scale[lane]
    else:
        scaled, ranks = np.empty(LANES, dtype=np.float32), np.zeros(LANES, dtype=np.int32)
        for lane in range(LANES):
            scaled[lane] = wanted[lane] * factor[lane]
            rounded[lane] = values[0] * scale[lane]
        # A selection per boundary instead of a look-up per lane: it vectorises.
        for step in range(15):
            boundary, value = boundaries[step], values[step + 1]
            for lane in range(LANES):
                above = scaled[lane] > boundary
                ranks[lane] = int32(ranks[lane] + int32(above))
                rounded[lane] = value * scale[lane] if above else rounded[lane]
        for lane in range(LANES):
            codes[lane] = book_codes[ranks[lane]]


@njit(**OPTIONS)
def _gather(inputs, first, live, begin, end, weights):
    """The columns visited in [begin, end), of rows [first, first + live), transposed; idle lanes are 0."""
    for lane in range(LANES):
        if lane < live:
            row = inputs.weights[first + lane]
            for column in range(begin, end):
                weights[column - begin, lane] = row[inputs.order[column]]
        else:
            for column in range(begin, end):
                weights[column - begin, lane] = ZERO


@njit(**OPTIONS)
def _scatter(inputs, first, live, begin, end, codes):
    """The way back of `_gather`, for codes."""
    for lane in range(live):
        row = inputs.codes[first + lane]
        for column in range(begin, end):
            row[inputs.order[column]] = codes[column - begin, lane]


@njit(**OPTIONS)
def _transposed(per_row, first, live, strip):
    """Rows [first, first + live) of [rows, groups] as [groups, LANES]; idle lanes are 1."""
    for group in range(per_row.shape[1]):
        for lane in range(LANES):
            strip[group, lane] = per_row[first + lane, group] if lane < live else np.float32(1)


@njit(**OPTIONS)
def _block_errors(strip, begin):
    """The errors of the block that begins at a column: [BLOCK, LANES]."""
    return strip.errors[begin : begin + BLOCK] if strip.errors.shape[0] > BLOCK else strip.errors


@njit(**OPTIONS)
def _nearest(inputs, prepared, strip, grid, first, live, objective):
    """What rounding to nearest costs each lane under H: objective [LANES] float64, written."""
    columns = inputs.order.size
    objective[:] = 0.0
    strip.state[:] = ZERO
    shares = prepared.pivots if prepared.dense else prepared.diagonal
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors, cross = _block_errors(strip, begin), strip.cross
        errors[:] = ZERO
        _gather(inputs, first, live, begin, end, strip.weights)
        for column in range(begin, end):
            local = column - begin
            _round(strip.weights[local], strip, inputs.group[column], grid, strip.codes[local])
            for lane in range(LANES):
                errors[local, lane] = strip.rounded[lane] - strip.weights[local, lane]
        cross[:] = errors
        if prepared.dense:
            add_product(cross, prepared.gains[begin : begin + BLOCK], strip.errors, begin + BLOCK)
        else:
            add_product(strip.state, prepared.vectors[begin : begin + BLOCK].T, errors, BLOCK)
        for column in range(begin, end):
            share = np.float64(shares[column])
            for lane in range(LANES):
                error = np.float64(cross[column - begin, lane])
                objective[lane] += share * error * error
    if not prepared.dense:
        for index in range(strip.state.shape[0]):
            for lane in range(LANES):
                objective[lane] += np.float64(strip.state[index, lane]) * np.float64(strip.state[index, lane])


@njit(**OPTIONS)
def _forward(inputs, prepared, strip, grid, first, live, objective):
    """The error-feedback pass: codes, errors and state of a strip; objective [LANES] float64, written."""
    columns = inputs.order.size
    objective[:] = 0.0
    strip.state[:] = ZERO
    for block in range(prepared.coupling.shape[0]):
        begin, end = block * BLOCK, min((block + 1) * BLOCK, columns)
        errors, cross = _block_errors(strip, begin), strip.cross
        errors[:] = ZERO
        cross[:] = ZERO
        _gather(inputs, first, live, begin, end, strip.weights)
        gains = prepared.gains[begin : begin + BLOCK]
        if prepared.dense:
            add_product(cross, gains, strip.errors, begin)
        else:
            add_product(cross, gains, strip.state, strip.state.shape[0])
        for column in range(begin, end):
            local = column - begin
            add_product_row(cross, prepared.coupling[block], errors, local, local)
            for lane in range(LANES):
                strip.wanted[lane] = strip.weights[local, lane] - cross[local, lane]
            _round(strip.wanted, strip, inputs.group[column], grid, strip.codes[local])
            pivot = np.float64(prepared.pivots[column])
            for lane in range(LANES):
                errors[local, lane] = strip.rounded[lane] - strip.weights[local, lane]
                miss = np.float64(strip.rounded[lane] - strip.wanted[lane])
                objective[lane] += pivot * miss * miss
        _scatter(inputs, first, live, begin, end, strip.codes)
        if not prepared.dense:
            add_product(strip.state, prepared.vectors[begin : begin + BLOCK].T, errors, BLOCK)


@njit(**OPTIONS)
def _sweep(inputs, prepared, strip, grid, first, live, objective):
    """One sweep of coordinate descent, in place on codes, errors, state and objective."""
    columns = inputs.order.size
    for block in range(prepared.slopes.shape[0]):
        begin, end = block * BLOCK, min((block + 1) * BLOCK, columns)
        errors, cross, changes = _block_errors(strip, begin), strip.cross, strip.changes
        cross[:] = ZERO
        changes[:] = ZERO
        _gather(inputs, first, live, begin, end, strip.weights)
        vectors = prepared.vectors[begin : begin + BLOCK]
        add_product(cross, vectors, strip.errors if prepared.dense else strip.state, vectors.shape[1])
        for column in range(begin, end):
            local = column - begin
            add_product_row(cross, prepared.slopes[block], changes, local, local)
            share, bend = prepared.diagonal[column], prepared.curvature[column]
            for lane in range(LANES):
                wish = errors[local, lane] - (share * errors[local, lane] + cross[local, lane]) / bend
                cross[local, lane] = wish
                strip.wanted[lane] = strip.weights[local, lane] + wish
            _round(strip.wanted, strip, inputs.group[column], grid, strip.codes[local])
            for lane in range(LANES):
                old, new = errors[local, lane], strip.rounded[lane] - strip.weights[local, lane]
                old_miss, new_miss = np.float64(old - cross[local, lane]), np.float64(new - cross[local, lane])
                if abs(new_miss) < abs(old_miss):
                    changes[local, lane] = new - old
                    errors[local, lane] = new
                    objective[lane] -= np.float64(bend) * (old_miss * old_miss - new_miss * new_miss)
                    if lane < live:
                        inputs.codes[first + lane, inputs.order[column]] = strip.codes[local, lane]
        if not prepared.dense:
            add_product(strip.state, vectors.T, changes, BLOCK)


@njit(**OPTIONS)
def _restore_nearest(inputs, strip, grid, first, live, worse):
    """Codes of rounding to nearest for the lanes that came out worse. worse [LANES]: bool."""
    columns = inputs.order.size
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        _gather(inputs, first, live, begin, end, strip.weights)
        for column in range(begin, end):
            local = column - begin
            _round(strip.weights[local], strip, inputs.group[column], grid, strip.codes[local])
            for lane in range(live):
                if worse[lane]:
                    inputs.codes[first + lane, inputs.order[column]] = strip.codes[local, lane]


@njit(**OPTIONS)
def _refine_rows(inputs, prepared, grid, sweeps, guard, before, after):
    """All strips of a tile. before, after [rows]: float64, written; `before` only with the guard."""
    rows, groups = inputs.weights.shape[0], inputs.scale.shape[1]
    kept = prepared.pivots.size if prepared.dense or sweeps > 0 else BLOCK
    strip = _Strip(
        np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK, LANES),
        np.float32), np.zeros((kept, LANES), np.float32), np.empty((prepared.vectors.shape[1], LANES), np.float32),
        np.empty((groups, LANES), np.float32), np.empty((groups, LANES), np.float32),
        np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty((BLOCK, LANES), np.uint8),
    )  # fmt: skip
    nearest, reached = np.empty(LANES, np.float64), np.empty(LANES, np.float64)
    for first in range(0, rows, LANES):
        live = min(LANES, rows - first)
        _transposed(inputs.scale, first, live, strip.scale)
        _transposed(inputs.factor, first, live, strip.factor)
        if guard:
            _nearest(inputs, prepared, strip, grid, first, live, nearest)
        _forward(inputs, prepared, strip, grid, first, live, reached)
        for _ in range(sweeps):
            _sweep(inputs, prepared, strip, grid, first, live, reached)
        if guard:
            worse = reached > nearest
            if worse[:live].any():
                _restore_nearest(inputs, strip, grid, first, live, worse)
            reached = np.minimum(reached, nearest)
            before[first : first + live] = nearest[:live]
        after[first : first + live] = reached[:live]


def refine(
    tile: np.ndarray, scale: np.ndarray, column_group: np.ndarray, feedback: Feedback, grid: str,
    multiplier: np.ndarray | None = None, sweeps: int = 0, guard: bool = True,
) -> Refined:  # fmt: skip
    """Codes of a tile of whole rows: `streamquant.kernels.refine.refine` on numpy arrays, releasing the GIL.

    tile [rows, N] float32, finite. scale [rows, groups] float32. column_group [N]: the scale of each column as it
    stands in the tile. multiplier [rows, groups] float32, None for 1 / scale. The feedback must be in float32.
    Returns codes uint8 [rows, N] (int8 for the INT8 grid) and float64 [rows] objectives. Memory: 4·32·N bytes where
    sweeps or a dense H need the errors of a strip, else nothing of the tile's size but the codes.
    """
    ascending = ASCENDING_CODES.get(grid)
    book = _NO_BOOK if ascending is None else (BOUNDARIES[grid], CODE_BOOKS[grid][ascending], ascending)
    scale = np.ascontiguousarray(scale, dtype=np.float32)
    with np.errstate(divide="ignore"):
        factor = np.float32(1) / scale if multiplier is None else np.ascontiguousarray(multiplier, dtype=np.float32)
    codes = np.empty(tile.shape, dtype=np.uint8)
    groups = np.ascontiguousarray(np.asarray(column_group, dtype=np.int64)[feedback.order])
    weights = np.ascontiguousarray(tile, dtype=np.float32)
    inputs = _Inputs(weights, scale, factor, groups, feedback.order, codes)
    prepared = _Prepared(*(getattr(feedback, name) for name in _Prepared._fields))
    before, after = np.full(tile.shape[0], np.nan), np.empty(tile.shape[0])
    _refine_rows(inputs, prepared, _Grid(GRIDS.index(grid), *book), sweeps, guard, before, after)
    return Refined(codes.view(np.int8) if grid == "int8" else codes, before, after)
