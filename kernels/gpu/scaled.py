"""Encoding with one scale per group, for every grid: the kernels behind `fp8` and `int8`.

`encode_groups` is given the factors. `encode_rows` and `encode_blocks` find each group's absmax, derive its scale and
encode, all in one kernel: a group that fits in registers is read once; a longer one is read twice by the same program,
the second time out of the cache. Non-finite weights take no part in a scale: NaN becomes the grid's own NaN, infinities
saturate, and the returned absmax (inf or NaN there) tells.

With `measure`, each group's squared error and squared weight are summed in the grid's units on the way; multiplied by
scale² they are what the pipeline reports.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .grids import as_float32, finite_or_zero, magnitude_bits, nearest, number, scaled, scales

CODE_DTYPES = {"e4m3": torch.uint8, "e5m2": torch.uint8, "int8": torch.int8}


@triton.jit
def encode_tile(weight, factor, code_pointers, inside, GRID: tl.constexpr):
    """Encode and store a float32 tile; squared errors and squared weights of its rows, in the grid's units.

    A caller that drops the sums does not pay for them: the compiler removes what nobody reads.
    """
    value = scaled(weight, factor, GRID)
    code = nearest(value, GRID)
    tl.store(code_pointers, code.to(code_pointers.dtype.element_ty), mask=inside)
    error = number(code, GRID) - value
    return tl.sum(error * error, axis=1), tl.sum(value * value, axis=1)


@triton.jit
def encode_groups_kernel(
    weight_pointer,  # [groups, group] float32, float16 or int16 (BF16 bits): the weights
    factor_pointer,  # [groups] float32: what `scaled` multiplies (FP8) or divides (INT8) a group's weights by
    code_pointer,  # [groups, group] uint8 (FP8) or int8: written
    sum_pointer,  # [groups, width_tiles, 2] float32, written if MEASURE: squared error, squared weight of a tile's row
    groups,
    group,  # elements that share a factor
    width_tiles,  # tiles of WIDTH that cover a group
    GRID: tl.constexpr,
    MEASURE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """code = nearest(weight * factor), or nearest(weight / factor): one program per [ROWS, WIDTH] tile."""
    # Only a tile's corner needs 64 bits: its offsets, one for each element, would take twice the registers.
    first_row = (tl.program_id(0) // width_tiles).to(tl.int64) * ROWS
    width_tile = tl.program_id(0) % width_tiles
    first_column = width_tile.to(tl.int64) * WIDTH
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = row < groups - first_row
    inside = here[:, None] & (column < group - first_column)[None, :]
    corner = first_row * group + first_column
    offset = row[:, None] * group + column[None, :]
    weight = as_float32(tl.load(weight_pointer + corner + offset, mask=inside, other=0))
    factor = tl.load(factor_pointer + first_row + row, mask=here, other=1.0)
    errors, squares = encode_tile(weight, factor[:, None], code_pointer + corner + offset, inside, GRID)
    if MEASURE:
        target = sum_pointer + ((first_row + row) * width_tiles + width_tile) * 2
        tl.store(target, errors, mask=here)
        tl.store(target + 1, squares, mask=here)


@triton.jit
def encode_rows_kernel(
    weight_pointer,  # [rows, columns] float32, float16 or int16 (BF16 bits): the weights
    code_pointer,  # [rows, columns] uint8 (FP8) or int8: written
    scale_pointer,  # [rows] float32, written: weight ≈ number(code) * scale
    absmax_pointer,  # [rows] int32, written: float32 bits of the largest magnitude, inf or NaN where a row holds one
    sum_pointer,  # [2, rows] float32, written if MEASURE: squared errors, squared weights
    rows,
    columns,
    floor,  # float32: the least absmax (FP8) or scale (INT8)
    GRID: tl.constexpr,
    MEASURE: tl.constexpr,
    RESIDENT: tl.constexpr,  # whether WIDTH covers a row, which then stays in registers
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """absmax, scale and codes of rows: one program per ROWS rows."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    weight_pointer += first * columns
    code_pointer += first * columns
    column = tl.arange(0, WIDTH)
    here = tl.arange(0, ROWS) < rows - first
    offset = tl.arange(0, ROWS)[:, None] * columns + column[None, :]
    if RESIDENT:
        inside = here[:, None] & (column < columns)[None, :]
        weight = as_float32(tl.load(weight_pointer + offset, mask=inside, other=0))
        magnitude = magnitude_bits(weight)
        absmax = tl.max(magnitude, axis=1)
        finite = tl.max(finite_or_zero(magnitude), axis=1)
    else:
        largest = tl.zeros([ROWS, WIDTH], dtype=tl.int32)
        largest_finite = tl.zeros([ROWS, WIDTH], dtype=tl.int32)
        for begin in range(0, columns, WIDTH):
            inside = here[:, None] & (begin + column < columns)[None, :]
            # Kept in the cache for the second reading, as far as it goes.
            element = tl.load(weight_pointer + offset + begin, mask=inside, other=0, eviction_policy="evict_last")
            magnitude = magnitude_bits(as_float32(element))
            largest = tl.maximum(largest, magnitude)
            largest_finite = tl.maximum(largest_finite, finite_or_zero(magnitude))
        absmax = tl.max(largest, axis=1)
        finite = tl.max(largest_finite, axis=1)
    factor, scale = scales(finite.to(tl.float32, bitcast=True), floor, GRID)
    row = first + tl.arange(0, ROWS)
    tl.store(absmax_pointer + row, absmax, mask=here)
    tl.store(scale_pointer + row, scale, mask=here)
    if RESIDENT:
        errors, squares = encode_tile(weight, factor[:, None], code_pointer + offset, inside, GRID)
    else:
        errors = tl.zeros([ROWS], dtype=tl.float32)
        squares = tl.zeros([ROWS], dtype=tl.float32)
        for begin in range(0, columns, WIDTH):
            inside = here[:, None] & (begin + column < columns)[None, :]
            element = tl.load(weight_pointer + offset + begin, mask=inside, other=0, eviction_policy="evict_first")
            sums = encode_tile(as_float32(element), factor[:, None], code_pointer + offset + begin, inside, GRID)
            errors += sums[0]
            squares += sums[1]
    if MEASURE:
        tl.store(sum_pointer + row, errors, mask=here)
        tl.store(sum_pointer + rows + row, squares, mask=here)


@triton.jit
def encode_blocks_kernel(
    weight_pointer,  # [rows, columns] float32, float16 or int16 (BF16 bits): the weights
    code_pointer,  # [rows, columns] uint8 (FP8) or int8: written
    scale_pointer,  # [rows / size, columns / size] float32, written: weight ≈ number(code) * scale
    absmax_pointer,  # [rows / size, columns / size] int32, written: float32 bits of the largest magnitude, inf or NaN
    sum_pointer,  # [2, rows / size, columns / size] float32, written if MEASURE: squared errors, squared weights
    columns,
    blocks,  # rows / size * columns / size
    size,  # edge of a block; divides rows and columns
    floor,  # float32: the least absmax (FP8) or scale (INT8)
    GRID: tl.constexpr,
    MEASURE: tl.constexpr,
    RESIDENT: tl.constexpr,  # whether HEIGHT covers a block, which then stays in registers
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,  # covers `size`
):
    """absmax, scale and codes of size x size blocks: one program per block."""
    block = tl.program_id(0)
    across = columns // size
    corner = (block // across).to(tl.int64) * size * columns + (block % across) * size
    weight_pointer += corner
    code_pointer += corner
    row = tl.arange(0, HEIGHT)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    offset = row * columns + column
    if RESIDENT:
        inside = (row < size) & (column < size)
        weight = as_float32(tl.load(weight_pointer + offset, mask=inside, other=0))
        largest = magnitude_bits(weight)
        largest_finite = finite_or_zero(largest)
    else:
        largest = tl.zeros([HEIGHT, WIDTH], dtype=tl.int32)
        largest_finite = tl.zeros([HEIGHT, WIDTH], dtype=tl.int32)
        for begin in range(0, size, HEIGHT):
            inside = (begin + row < size) & (column < size)
            strip = (begin + row) * columns + column
            element = tl.load(weight_pointer + strip, mask=inside, other=0, eviction_policy="evict_last")
            magnitude = magnitude_bits(as_float32(element))
            largest = tl.maximum(largest, magnitude)
            largest_finite = tl.maximum(largest_finite, finite_or_zero(magnitude))
    absmax = tl.max(tl.max(largest, axis=1), axis=0)
    finite = tl.max(tl.max(largest_finite, axis=1), axis=0)
    factor, scale = scales(finite.to(tl.float32, bitcast=True), floor, GRID)
    tl.store(absmax_pointer + block, absmax)
    tl.store(scale_pointer + block, scale)
    if RESIDENT:
        errors, squares = encode_tile(weight, factor, code_pointer + offset, inside, GRID)
    else:
        errors = tl.zeros([HEIGHT], dtype=tl.float32)
        squares = tl.zeros([HEIGHT], dtype=tl.float32)
        for begin in range(0, size, HEIGHT):
            inside = (begin + row < size) & (column < size)
            strip = (begin + row) * columns + column
            element = tl.load(weight_pointer + strip, mask=inside, other=0, eviction_policy="evict_first")
            sums = encode_tile(as_float32(element), factor, code_pointer + strip, inside, GRID)
            errors += sums[0]
            squares += sums[1]
    if MEASURE:
        tl.store(sum_pointer + block, tl.sum(errors, axis=0))
        tl.store(sum_pointer + blocks + block, tl.sum(squares, axis=0))


def encode_groups(
    tile: torch.Tensor, factor: torch.Tensor, grid: str, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes of groups whose factors are known, and with `scale` the error sums.

    tile [groups, group]: bfloat16, float16 or float32. factor, scale [groups]: float32.
    Returns CODE_DTYPES[grid] [groups, group], and float64 [2] (squared error, squared weight) or None.
    """
    launch.check_weight(tile, "tile", 2)
    groups, group = tile.shape
    launch.check(factor, "factor", torch.float32, (groups,))
    codes = torch.empty(tile.shape, dtype=CODE_DTYPES[grid], device=tile.device)
    rows, width = launch.tile_shape(groups, group, launch.STREAMED_ELEMENTS)
    width_tiles = launch.ceil_divide(group, width)
    measure = scale is not None
    sums = factor.new_empty((groups, width_tiles, 2) if measure else 1)
    programs = launch.ceil_divide(groups, rows) * width_tiles
    arguments = (launch.bits(tile), factor, codes, sums, groups, group, width_tiles)
    constants = {"GRID": grid, "MEASURE": measure, "ROWS": rows, "WIDTH": width}
    launch.start(encode_groups_kernel, programs, *arguments, **constants, num_warps=4)
    return codes, total(sums.sum(dim=1, dtype=torch.float64).T, scale) if measure else None


def encode_rows(weight: torch.Tensor, grid: str, floor: float, measure: bool = False) -> tuple[torch.Tensor, ...]:
    """Codes, scales and magnitudes of rows, the data read once.

    weight [rows, columns]: bfloat16, float16 or float32; a view makes any run of consecutive elements a row.
    floor: the least absmax (FP8) or scale (INT8).
    Returns CODE_DTYPES[grid] [rows, columns], scale float32 [rows], absmax float32 [rows] (inf or NaN where the row
    holds one), and with `measure` float64 [2]: squared error and squared weight.
    """
    launch.check_weight(weight, "weight", 2)
    rows, columns = weight.shape
    codes, scale, absmax, sums = _results(weight, grid, (rows,), measure)
    limit = launch.resident_elements(columns)
    resident = columns <= limit
    # Long rows in big pieces: fewer are at work at a time, so that the second reading still finds them in L2.
    together, width = launch.row_tile(rows, columns) if resident else (1, limit // 2)
    arguments = (launch.bits(weight), codes, scale, absmax, sums, rows, columns, floor)
    constants = {"GRID": grid, "MEASURE": measure, "RESIDENT": resident, "ROWS": together, "WIDTH": width}
    warps = launch.warps(together * width, columns)
    launch.start(encode_rows_kernel, launch.ceil_divide(rows, together), *arguments, **constants, num_warps=warps)
    result = codes, scale, absmax.view(torch.float32)
    return (*result, total(sums.double(), scale)) if measure else result


def encode_blocks(weight: torch.Tensor, size: int, grid: str, floor: float, measure: bool = False) -> tuple[torch.Tensor, ...]:
    """Codes, scales and magnitudes of size x size blocks, the data read once (above 128 twice, through the cache).

    weight [rows, columns]: bfloat16, float16 or float32; `size` divides both. floor: the least absmax or scale.
    Returns CODE_DTYPES[grid] [rows, columns], scale and absmax float32 [rows / size, columns / size] (absmax inf or NaN
    where a block holds one), and with `measure` float64 [2]: squared error and squared weight.
    """
    launch.check_weight(weight, "weight", 2)
    rows, columns = weight.shape
    assert size > 0 and rows % size == 0 and columns % size == 0, f"{rows} x {columns} has no {size} x {size} blocks"
    codes, scale, absmax, sums = _results(weight, grid, (rows // size, columns // size), measure)
    width, limit = launch.next_power_of_2(size), launch.resident_elements(size)
    assert width <= limit and size * columns < 1 << 31, f"blocks of {size} are too large"
    height = min(width, limit // width)
    arguments = (launch.bits(weight), codes, scale, absmax, sums, columns, scale.numel(), size, floor)
    constants = {"GRID": grid, "MEASURE": measure, "RESIDENT": height >= size, "HEIGHT": height, "WIDTH": width}
    warps = launch.warps(height * width, size)
    launch.start(encode_blocks_kernel, scale.numel(), *arguments, **constants, num_warps=warps)
    result = codes, scale, absmax.view(torch.float32)
    return (*result, total(sums.double().view(2, -1), scale.view(-1))) if measure else result


def _results(weight: torch.Tensor, grid: str, scale_shape: tuple[int, ...], measure: bool) -> tuple[torch.Tensor, ...]:
    """Uninitialised codes, scale, absmax bits and sums."""
    scale = torch.empty(scale_shape, dtype=torch.float32, device=weight.device)
    codes = torch.empty(weight.shape, dtype=CODE_DTYPES[grid], device=weight.device)
    absmax = scale.new_empty(scale_shape, dtype=torch.int32)
    return codes, scale, absmax, scale.new_empty((2, *scale_shape) if measure else 1)


def total(sums: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float64 [2] of sums float64 [2, groups] in the grid's units and scale float32 [groups]."""
    return (sums * scale.double().square()).sum(dim=1)
