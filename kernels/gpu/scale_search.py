"""FP8 scales of least squared error on the GPU, searched and used in one kernel.

    multiplier = 448 / absmax · 2^(-i/17), i = 0 … 16: never clips    scale = 1 / multiplier

The definition is `kernels.scale_search` (method A), which sums in float64; here errors are summed in float32: where two
candidates are as good as equal, the choice may differ. Codes are those of `kernels.fp8` under the multiplier chosen, bit
for bit. A search costs some 200 operations for a weight that is read once, so rows are simply read again for the next
step, out of the cache.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl

from ..codebooks import E4M3_MAX
from ..search_grid import FP8_STEPS, FP8_STRETCH
from . import launch
from .fp8 import SMALLEST_ABSMAX
from .grids import as_float32, finite_or_zero, magnitude_bits, scales
from .scaled import encode_tile, total

LARGEST_BLOCK = 64  # edge of a block that is searched: 16 elements a thread with 8 warps
STEPS = tl.constexpr(FP8_STEPS)
SLOTS = tl.constexpr(launch.next_power_of_2(FP8_STEPS))
EXPONENT = tl.constexpr(0x7F800000)
LARGEST_BITS = tl.constexpr(int(np.float32(E4M3_MAX).view(np.int32)))
SMALLEST_NORMAL_BITS = tl.constexpr(int(np.float32(2.0**-6).view(np.int32)))


@triton.jit
def load_finite(pointer, mask):
    """Weights as float32, with 0 for what is NaN, infinite or masked."""
    weight = as_float32(tl.load(pointer, mask=mask, other=0))
    return tl.where(magnitude_bits(weight) < EXPONENT, weight, 0.0)


@triton.jit
def e4m3_error(weight, factor):
    """(e4m3(weight · factor) - weight · factor)², saturating.

    Adding 2**20 times the power of two below a magnitude and taking it off again rounds it to four digits, to even; at the
    smallest normal number's, to a multiple of 2**-9, as subnormal numbers are.
    """
    magnitude = tl.minimum(magnitude_bits(weight * factor), LARGEST_BITS)
    power = tl.maximum(magnitude & EXPONENT, SMALLEST_NORMAL_BITS)
    aligner = (power + (20 << 23)).to(tl.float32, bitcast=True)
    exact = magnitude.to(tl.float32, bitcast=True)
    miss = ((exact + aligner) - aligner) - exact
    return miss * miss


@triton.jit
def stretched(multiplier, stretch):
    """The candidate multiplier: multiplier / stretch, rounded to nearest."""
    return tl.math.div_rn(multiplier, tl.broadcast_to(stretch, multiplier.shape))


@triton.jit
def row_errors(
    weight_pointer,  # the first weight of ROWS rows
    offset,  # [ROWS, WIDTH]: of the rows' first weights
    importance_pointer,  # [cycle, columns] float32: read if WEIGHTED
    importance_offset,  # [ROWS, WIDTH]: of the rows' first importances
    stretch_pointer,  # [STEPS] float32
    multiplier,  # [ROWS] float32: candidate 0
    here,  # [ROWS]: which rows there are
    columns,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """[ROWS, SLOTS]: the error of each row under each candidate, in the grid's units; 0 in the slots above STEPS."""
    slot = tl.arange(0, SLOTS)[None, :]
    column = tl.arange(0, WIDTH)[None, :]
    errors = tl.zeros([ROWS, SLOTS], dtype=tl.float32)
    for begin in range(0, columns, WIDTH):
        inside = here[:, None] & (begin + column < columns)
        weight = load_finite(weight_pointer + offset + begin, inside)
        if WEIGHTED:
            importance = tl.load(importance_pointer + importance_offset + begin, mask=inside, other=0.0)
        for candidate in range(STEPS):
            factor = stretched(multiplier, tl.load(stretch_pointer + candidate))
            error = e4m3_error(weight, factor[:, None])
            if WEIGHTED:
                error *= importance
            errors += tl.where(slot == candidate, tl.sum(error, axis=1)[:, None], 0.0)
    return errors


@triton.jit
def chosen_stretch(errors, stretch_pointer):
    """The stretch [rows] of least error in units of the weights; errors [rows, SLOTS] in the grid's."""
    slot = tl.arange(0, SLOTS)[None, :]
    stretch = tl.load(stretch_pointer + slot, mask=slot < STEPS, other=1.0)
    candidate = tl.argmin(tl.where(slot < STEPS, errors * (stretch * stretch), float("inf")), axis=1)
    return tl.load(stretch_pointer + candidate)


@triton.jit
def e4m3_errors_kernel(
    weight_pointer,  # [rows, columns] float32, float16 or int16 (BF16 bits): the weights
    importance_pointer,  # [cycle, columns] float32: row i has those of i mod cycle; read if WEIGHTED
    multiplier_pointer,  # [rows] float32: candidate 0
    stretch_pointer,  # [STEPS] float32
    error_pointer,  # [rows, STEPS] float32, written: in the grid's units
    rows,
    columns,
    cycle,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The errors of rows under every candidate: one program per ROWS rows."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    here = row < rows
    column = tl.arange(0, WIDTH)[None, :]
    offset = tl.arange(0, ROWS)[:, None] * columns + column
    importance_offset = (row % cycle).to(tl.int32)[:, None] * columns + column
    multiplier = tl.load(multiplier_pointer + row, mask=here, other=1.0)
    errors = row_errors(
        weight_pointer + first * columns, offset, importance_pointer, importance_offset, stretch_pointer, multiplier,
        here, columns, WEIGHTED, ROWS, WIDTH,
    )  # fmt: skip
    slot = tl.arange(0, SLOTS)[None, :]
    tl.store(error_pointer + row[:, None] * STEPS + slot, errors, mask=here[:, None] & (slot < STEPS))


@triton.jit
def encode_rows_kernel(
    weight_pointer,  # [rows, columns] float32, float16 or int16 (BF16 bits): the weights
    importance_pointer,  # [cycle, columns] float32: row i has those of i mod cycle; read if WEIGHTED
    stretch_pointer,  # [STEPS] float32
    code_pointer,  # [rows, columns] uint8: written
    scale_pointer,  # [rows] float32, written: weight ≈ number(code) * scale
    absmax_pointer,  # [rows] int32, written: float32 bits of the largest magnitude, inf or NaN where a row holds one
    sum_pointer,  # [2, rows] float32, written if MEASURE: squared errors, squared weights
    rows,
    columns,
    cycle,
    floor,  # float32: the least absmax
    WEIGHTED: tl.constexpr,
    MEASURE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """absmax, the scale of least error and codes of rows: one program per ROWS rows."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    weight_pointer += first * columns
    code_pointer += first * columns
    row = first + tl.arange(0, ROWS)
    here = row < rows
    column = tl.arange(0, WIDTH)[None, :]
    offset = tl.arange(0, ROWS)[:, None] * columns + column
    absmax = tl.zeros([ROWS], dtype=tl.int32)
    largest_finite = tl.zeros([ROWS], dtype=tl.int32)
    for begin in range(0, columns, WIDTH):
        inside = here[:, None] & (begin + column < columns)
        magnitude = magnitude_bits(as_float32(tl.load(weight_pointer + offset + begin, mask=inside, other=0)))
        absmax = tl.maximum(absmax, tl.max(magnitude, axis=1))
        largest_finite = tl.maximum(largest_finite, tl.max(finite_or_zero(magnitude), axis=1))
    finite = largest_finite.to(tl.float32, bitcast=True)
    multiplier, _ = scales(finite, floor, "e4m3")
    importance_offset = (row % cycle).to(tl.int32)[:, None] * columns + column
    errors = row_errors(
        weight_pointer, offset, importance_pointer, importance_offset, stretch_pointer, multiplier, here, columns,
        WEIGHTED, ROWS, WIDTH,
    )  # fmt: skip
    factor = stretched(multiplier, chosen_stretch(errors, stretch_pointer))
    tl.store(absmax_pointer + row, absmax, mask=here)
    tl.store(scale_pointer + row, tl.math.div_rn(tl.full([ROWS], 1.0, tl.float32), factor), mask=here)
    error = tl.zeros([ROWS], dtype=tl.float32)
    square = tl.zeros([ROWS], dtype=tl.float32)
    for begin in range(0, columns, WIDTH):
        inside = here[:, None] & (begin + column < columns)
        weight = as_float32(tl.load(weight_pointer + offset + begin, mask=inside, other=0))
        sums = encode_tile(weight, factor[:, None], code_pointer + offset + begin, inside, "e4m3")
        error += sums[0]
        square += sums[1]
    if MEASURE:
        tl.store(sum_pointer + row, error, mask=here)
        tl.store(sum_pointer + rows + row, square, mask=here)


@triton.jit
def encode_blocks_kernel(
    weight_pointer,  # [rows, columns] float32, float16 or int16 (BF16 bits): the weights
    importance_pointer,  # [columns] float32: read if WEIGHTED
    stretch_pointer,  # [STEPS] float32
    code_pointer,  # [rows, columns] uint8: written
    scale_pointer,  # [rows / size, columns / size] float32, written: weight ≈ number(code) * scale
    absmax_pointer,  # [rows / size, columns / size] int32, written: float32 bits of the largest magnitude, inf or NaN
    sum_pointer,  # [2, rows / size, columns / size] float32, written if MEASURE: squared errors, squared weights
    columns,
    blocks,  # rows / size * columns / size
    size,  # edge of a block; divides rows and columns
    floor,  # float32: the least absmax
    WEIGHTED: tl.constexpr,
    MEASURE: tl.constexpr,
    WIDTH: tl.constexpr,  # covers `size`
):
    """absmax, the scale of least error and codes of size x size blocks: one program per block."""
    block = tl.program_id(0)
    across = columns // size
    first_column = block % across * size
    corner = (block // across).to(tl.int64) * size * columns + first_column
    row = tl.arange(0, WIDTH)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    offset = row * columns + column
    inside = (row < size) & (column < size)
    weight_pointer += corner
    magnitude = magnitude_bits(as_float32(tl.load(weight_pointer + offset, mask=inside, other=0)))
    absmax = tl.max(magnitude)
    finite = tl.max(finite_or_zero(magnitude)).to(tl.float32, bitcast=True)
    # One row of results, for what works on rows.
    multiplier, _ = scales(tl.full([1], 0.0, tl.float32) + finite, floor, "e4m3")
    weight = load_finite(weight_pointer + offset, inside)
    slot = tl.arange(0, SLOTS)[None, :]
    errors = tl.zeros([1, SLOTS], dtype=tl.float32)
    if WEIGHTED:
        importance = tl.load(importance_pointer + first_column + column, mask=column < size, other=0.0)
    for candidate in range(STEPS):
        error = e4m3_error(weight, stretched(multiplier, tl.load(stretch_pointer + candidate))[:, None])
        if WEIGHTED:
            error *= importance
        errors += tl.where(slot == candidate, tl.sum(error), 0.0)
    factor = stretched(multiplier, chosen_stretch(errors, stretch_pointer))
    one = tl.arange(0, 1)
    tl.store(absmax_pointer + block, absmax)
    tl.store(scale_pointer + block + one, tl.math.div_rn(tl.full([1], 1.0, tl.float32), factor))
    weight = as_float32(tl.load(weight_pointer + offset, mask=inside, other=0))
    sums = encode_tile(weight, factor[:, None], code_pointer + corner + offset, inside, "e4m3")
    if MEASURE:
        tl.store(sum_pointer + block, tl.sum(sums[0]))
        tl.store(sum_pointer + blocks + block, tl.sum(sums[1]))


def e4m3_errors(tile: torch.Tensor, group: int, absmax: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Σ weight·(Q - W)² of each run of `group` elements under each of `fp8_candidates(absmax)`: float64 [n, 17].

    tile [n * group]: bfloat16, float16 or float32, finite. absmax float32 [n], of all that shares the run's scale. weights
    float32 [cycle, group], run i taking row i mod cycle; None for equal ones.
    """
    runs = tile.view(-1, group)
    launch.check_weight(runs, "tile", 2)
    count = runs.shape[0]
    launch.check(absmax, "absmax", torch.float32, (count,))
    importance, cycle = importance_of(weights, group, absmax)
    # Of a number and a tensor torch would multiply with the reciprocal.
    multiplier = torch.full_like(absmax, E4M3_MAX) / absmax.clamp(min=SMALLEST_ABSMAX)
    stretch = stretches(tile.device)
    errors = absmax.new_empty((count, FP8_STEPS))
    rows, width = launch.tile_shape(count, group, launch.STREAMED_ELEMENTS)
    pointers = (launch.bits(runs), importance, multiplier, stretch, errors)
    constants = {"WEIGHTED": weights is not None, "ROWS": rows, "WIDTH": width}
    programs, warps = launch.ceil_divide(count, rows), launch.warps(rows * width, group)
    launch.start(e4m3_errors_kernel, programs, *pointers, count, group, cycle, **constants, num_warps=warps)
    return errors.double() / (multiplier[:, None] / stretch).double().square()


def encode_rows(weight: torch.Tensor, weights: torch.Tensor | None = None, measure: bool = False) -> tuple[torch.Tensor, ...]:
    """absmax, the scale of least error and E4M3 codes of rows in one kernel (row groups: a view [rows * groups, group]).

    weight [rows, columns]: bfloat16, float16 or float32. weights float32 [cycle, columns], row i taking row i mod cycle;
    None for equal ones.
    Returns float8 [rows, columns], scale float32 [rows], absmax float32 [rows] (inf or NaN where the row holds one; the
    scale is that of its finite weights), and with `measure` float64 [2]: squared error and squared weight, not weighted.
    """
    launch.check_weight(weight, "weight", 2)
    rows, columns = weight.shape
    importance, cycle = importance_of(weights, columns, weight)
    codes, scale, absmax, sums = _results(weight, (rows,), measure)
    together, width = launch.tile_shape(rows, columns, launch.STREAMED_ELEMENTS)
    pointers = (launch.bits(weight), importance, stretches(weight.device), codes, scale, absmax, sums)
    constants = {"WEIGHTED": weights is not None, "MEASURE": measure, "ROWS": together, "WIDTH": width}
    programs, warps = launch.ceil_divide(rows, together), launch.warps(together * width, columns)
    arguments = (*pointers, rows, columns, cycle, SMALLEST_ABSMAX)
    launch.start(encode_rows_kernel, programs, *arguments, **constants, num_warps=warps)
    result = codes.view(torch.float8_e4m3fn), scale, absmax.view(torch.float32)
    return (*result, total(sums.double(), scale)) if measure else result


def encode_blocks(
    weight: torch.Tensor, size: int, weights: torch.Tensor | None = None, measure: bool = False
) -> tuple[torch.Tensor, ...]:
    """absmax, the scale of least error and E4M3 codes of size x size blocks in one kernel.

    weight [rows, columns]: bfloat16, float16 or float32; `size`, at most 64, divides both. weights float32 [columns]; None
    for equal ones.
    Returns as `encode_rows`, scale and absmax [rows / size, columns / size].
    """
    launch.check_weight(weight, "weight", 2)
    rows, columns = weight.shape
    assert size > 0 and rows % size == 0 and columns % size == 0, f"{rows} x {columns} has no {size} x {size} blocks"
    assert size <= LARGEST_BLOCK, f"blocks of {size} are too large"
    width = launch.next_power_of_2(size)
    importance, _ = importance_of(None if weights is None else weights.view(1, -1), columns, weight)
    codes, scale, absmax, sums = _results(weight, (rows // size, columns // size), measure)
    pointers = (launch.bits(weight), importance, stretches(weight.device), codes, scale, absmax, sums)
    constants = {"WEIGHTED": weights is not None, "MEASURE": measure, "WIDTH": width}
    arguments = (*pointers, columns, scale.numel(), size, SMALLEST_ABSMAX)
    warps = max(width * width // 512, 1)
    launch.start(encode_blocks_kernel, scale.numel(), *arguments, **constants, num_warps=warps)
    result = codes.view(torch.float8_e4m3fn), scale, absmax.view(torch.float32)
    return (*result, total(sums.double().view(2, -1), scale.view(-1))) if measure else result


@functools.cache
def stretches(device: torch.device) -> torch.Tensor:
    """float32 [17]: candidate 0 over each candidate, on the device, once."""
    return torch.from_numpy(FP8_STRETCH).to(device)


def importance_of(weights: torch.Tensor | None, group: int, anything: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What a kernel is given for `weights` [cycle, group], and the cycle. anything: what it is given where there are none."""
    if weights is None:
        return launch.bits(anything), 1
    cycle = weights.shape[0]
    launch.check(weights, "weights", torch.float32, (cycle, group))
    assert cycle * group < 1 << 31, f"{cycle} x {group} weights are too many"
    return weights, cycle


def _results(weight: torch.Tensor, scale_shape: tuple[int, ...], measure: bool) -> tuple[torch.Tensor, ...]:
    """Uninitialised codes, scale, absmax bits and sums."""
    scale = torch.empty(scale_shape, dtype=torch.float32, device=weight.device)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    return codes, scale, scale.new_empty(scale_shape, dtype=torch.int32), scale.new_empty((2, *scale_shape) if measure else 1)
