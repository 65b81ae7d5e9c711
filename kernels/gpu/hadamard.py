"""Hadamard group rotation on the GPU, alone and fused with INT8 row quantization (ConvRot).

    w' = w @ blockdiag(H)    scale = max(max |w'| / 127, floor)    code = clamp(round(w' / scale), -127, 127)

`rotate` is bit for bit `kernels.hadamard.rotate`: the same additions in the same order, radix-4 butterflies on one
base-4 digit of the column number after the other. `encode_rows` gives what `int8.encode_rows` gives of the rotated
weight, without ever writing that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..hadamard import check_group_size
from . import launch
from .grids import as_float32, finite_or_zero, magnitude_bits, scales
from .int8 import SMALLEST_ROW_SCALE
from .scaled import encode_tile, total


@triton.jit
def rotate_tile(value, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr):
    """float32 [ROWS, WIDTH], each run of GROUP = 4**STAGES columns multiplied by H."""
    groups: tl.constexpr = ROWS * WIDTH // GROUP
    run = tl.reshape(value * (1.0 / (1 << STAGES)), [groups, GROUP])
    for _ in tl.static_range(STAGES):
        even, odd = tl.split(tl.reshape(run, [groups, GROUP // 4, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        plus = x0 + x1
        minus = x2 - x3
        y0 = plus + minus
        y1 = plus - minus
        plus = x2 + x3
        minus = x0 - x1
        y2 = plus + minus
        y3 = plus - minus
        # The digit comes back at the front of the column number: see the reference.
        quarters = tl.permute(tl.join(tl.join(y0, y2), tl.join(y1, y3)), (0, 2, 3, 1))
        run = tl.reshape(quarters, [groups, GROUP])
    return tl.reshape(run, [ROWS, WIDTH])


@triton.jit
def rotate_kernel(
    weight_pointer,  # [groups, GROUP] float32, float16 or int16 (BF16 bits): the weight's runs of GROUP columns
    output_pointer,  # [groups, GROUP] float32: written
    groups,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,  # GROUP = 4**STAGES
    TOGETHER: tl.constexpr,  # groups of a program
):
    """output = weight @ H: one program per TOGETHER groups."""
    first = tl.program_id(0).to(tl.int64) * TOGETHER
    group = tl.arange(0, TOGETHER)
    offset = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    here = (group < groups - first)[:, None]
    weight = as_float32(tl.load(weight_pointer + first * GROUP + offset, mask=here, other=0))
    rotated = rotate_tile(weight, TOGETHER, GROUP, GROUP, STAGES)
    tl.store(output_pointer + first * GROUP + offset, rotated, mask=here)


@triton.jit
def encode_rotated_rows_kernel(
    weight_pointer,  # [rows, columns] float32, float16 or int16 (BF16 bits): the weights, not rotated
    code_pointer,  # [rows, columns] int8: written
    scale_pointer,  # [rows] float32, written: rotated weight ≈ code * scale
    absmax_pointer,  # [rows] int32, written: float32 bits of the largest rotated magnitude, inf or NaN if any
    sum_pointer,  # [2, rows] float32, written if MEASURE: squared errors, squared weights, in units of the scale
    rows,
    columns,  # a multiple of GROUP
    floor,  # float32: the least scale
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,  # GROUP = 4**STAGES
    MEASURE: tl.constexpr,
    RESIDENT: tl.constexpr,  # whether WIDTH covers a row, which then stays in registers
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # a multiple of GROUP
):
    """Rotation, absmax, scale and codes of rows: one program per ROWS rows. A row too long for registers is read and
    rotated twice."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    weight_pointer += first * columns
    code_pointer += first * columns
    column = tl.arange(0, WIDTH)
    here = tl.arange(0, ROWS) < rows - first
    offset = tl.arange(0, ROWS)[:, None] * columns + column[None, :]
    if RESIDENT:
        # Columns beyond the last are whole groups of zeros, and stay zeros.
        inside = here[:, None] & (column < columns)[None, :]
        element = tl.load(weight_pointer + offset, mask=inside, other=0)
        rotated = rotate_tile(as_float32(element), ROWS, WIDTH, GROUP, STAGES)
        largest = magnitude_bits(rotated)
        largest_finite = finite_or_zero(largest)
    else:
        largest = tl.zeros([ROWS, WIDTH], dtype=tl.int32)
        largest_finite = tl.zeros([ROWS, WIDTH], dtype=tl.int32)
        for begin in range(0, columns, WIDTH):
            inside = here[:, None] & (begin + column < columns)[None, :]
            element = tl.load(weight_pointer + offset + begin, mask=inside, other=0, eviction_policy="evict_last")
            magnitude = magnitude_bits(rotate_tile(as_float32(element), ROWS, WIDTH, GROUP, STAGES))
            largest = tl.maximum(largest, magnitude)
            largest_finite = tl.maximum(largest_finite, finite_or_zero(magnitude))
    finite = tl.max(largest_finite, axis=1).to(tl.float32, bitcast=True)
    factor, scale = scales(finite, floor, "int8")
    row = first + tl.arange(0, ROWS)
    tl.store(absmax_pointer + row, tl.max(largest, axis=1), mask=here)
    tl.store(scale_pointer + row, scale, mask=here)
    if RESIDENT:
        errors, squares = encode_tile(rotated, factor[:, None], code_pointer + offset, inside, "int8")
    else:
        errors = tl.zeros([ROWS], dtype=tl.float32)
        squares = tl.zeros([ROWS], dtype=tl.float32)
        for begin in range(0, columns, WIDTH):
            inside = here[:, None] & (begin + column < columns)[None, :]
            element = tl.load(weight_pointer + offset + begin, mask=inside, other=0, eviction_policy="evict_first")
            rotated = rotate_tile(as_float32(element), ROWS, WIDTH, GROUP, STAGES)
            sums = encode_tile(rotated, factor[:, None], code_pointer + offset + begin, inside, "int8")
            errors += sums[0]
            squares += sums[1]
    if MEASURE:
        tl.store(sum_pointer + row, errors, mask=here)
        tl.store(sum_pointer + rows + row, squares, mask=here)


def rotate(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """`weight @ blockdiag(H)`, and from there back again.

    weight [rows, columns]: bfloat16, float16 or float32. group_size: a power of 4 that divides columns.
    Returns float32 [rows, columns].
    """
    launch.check_weight(weight, "weight", 2)
    check_group_size(weight.shape[1], group_size)
    rotated = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    groups = weight.numel() // group_size
    together, _ = launch.row_tile(groups, group_size)
    constants = {"GROUP": group_size, "STAGES": _stages(group_size), "TOGETHER": together}
    programs, warps = launch.ceil_divide(groups, together), launch.warps(together * group_size, group_size)
    launch.start(rotate_kernel, programs, launch.bits(weight), rotated, groups, **constants, num_warps=warps)
    return rotated


def encode_rows(
    weight: torch.Tensor, group_size: int, floor: float = SMALLEST_ROW_SCALE, measure: bool = False
) -> tuple[torch.Tensor, ...]:
    """INT8 codes of the rotated weight with a scale per row, in one kernel.

    weight [rows, columns]: bfloat16, float16 or float32. group_size: a power of 4 that divides columns. floor: the
    least scale. Returns int8 [rows, columns], scale float32 [rows], absmax float32 [rows] (of the rotated weight; inf
    or NaN where a row holds one), and with `measure` float64 [2]: squared error and squared weight.
    """
    launch.check_weight(weight, "weight", 2)
    rows, columns = weight.shape
    check_group_size(columns, group_size)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, dtype=torch.float32, device=weight.device)
    absmax = torch.empty(rows, dtype=torch.int32, device=weight.device)
    sums = scale.new_empty((2, rows) if measure else 1)
    # Half of what others hold: the butterflies pass through shared memory, four bytes an element.
    limit = launch.resident_elements(columns) // 2
    resident = columns <= limit
    together, width = launch.row_tile(rows, columns) if resident else (1, limit // 2)
    assert width >= group_size, f"groups of {group_size} are too large"
    arguments = (launch.bits(weight), codes, scale, absmax, sums, rows, columns, floor)
    constants = {"GROUP": group_size, "STAGES": _stages(group_size), "MEASURE": measure, "RESIDENT": resident}
    # In a loop the butterflies need more registers, so a thread gets half as many elements.
    warps = launch.warps(together * width * (1 if resident else 2), columns)
    tile = {"ROWS": together, "WIDTH": width, "num_warps": warps}
    launch.start(encode_rotated_rows_kernel, launch.ceil_divide(rows, together), *arguments, **constants, **tile)
    result = codes, scale, absmax.view(torch.float32)
    return (*result, total(sums.double(), scale)) if measure else result


def _stages(group_size: int) -> int:
    return (group_size.bit_length() - 1) // 2
