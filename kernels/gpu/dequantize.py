"""Back to floating point on the GPU: FP8 and INT8 with any scales, NF4 and FP4 with plain or double-quantized absmax.

    FP8, INT8    w = number(code) * scale
    NF4, FP4     w = book[code] * absmax,    absmax = nested_map[q] * nested_absmax[block // 256] + offset

in float32, then rounded to the output's dtype: bit for bit the references' decode (`kernels.fp8`, `int8`, `bnb4`). FP8
is decoded by integer arithmetic, so that it runs below sm_89 too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .grids import number, store_float

GRIDS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}


@triton.jit
def decode_groups_kernel(
    code_pointer,  # [groups, group] uint8 (FP8) or int8
    scale_pointer,  # [groups] float32, or with BLOCKED [rows / size, across] float32
    output_pointer,  # [groups, group] float32, float16 or int16 (BF16 bits): written
    groups,
    group,  # contiguous elements that share a scale
    width_tiles,  # tiles of WIDTH that cover a group
    across,  # with BLOCKED: groups in a row of the weight
    size,  # with BLOCKED: rows that share their scales
    GRID: tl.constexpr,
    BLOCKED: tl.constexpr,  # whether the groups are rows of 2-D blocks
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """output = number(code) * scale: one program per [ROWS, WIDTH] tile."""
    first_row = (tl.program_id(0) // width_tiles).to(tl.int64) * ROWS
    first_column = (tl.program_id(0) % width_tiles).to(tl.int64) * WIDTH
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = row < groups - first_row
    inside = here[:, None] & (column < group - first_column)[None, :]
    corner = first_row * group + first_column
    offset = row[:, None] * group + column[None, :]
    code = tl.load(code_pointer + corner + offset, mask=inside, other=0).to(tl.int32)
    scale_index = first_row + row
    if BLOCKED:
        scale_index = scale_index // (across * size) * across + scale_index % across
    scale = tl.load(scale_pointer + scale_index, mask=here, other=1.0)
    store_float(output_pointer + corner + offset, number(code, GRID) * scale[:, None], inside)


@triton.jit
def decode_4bit_kernel(
    packed_pointer,  # [ceil(elements / 2)] uint8: two codes a byte, the first in the high nibble
    book_pointer,  # [16] float32: the value of each code
    absmax_pointer,  # [ceil(elements / BLOCK)] float32, or with NESTED uint8
    nested_absmax_pointer,  # with NESTED: [ceil(blocks / NESTED_BLOCK)] float32
    nested_map_pointer,  # with NESTED: [256] float32, the value of each code of absmax
    nested_offset,  # with NESTED: float32, the mean that absmax was stored around
    output_pointer,  # [elements] float32, float16 or int16 (BF16 bits): written
    elements,
    BLOCK: tl.constexpr,  # elements that share an absmax, a power of two
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,  # blocks that share a nested absmax
    TOGETHER: tl.constexpr,  # blocks of a program
):
    """output = book[code] * absmax: one program per TOGETHER blocks."""
    first = tl.program_id(0).to(tl.int64) * TOGETHER
    left = elements - first * BLOCK  # elements from this program's first to the end
    block = first + tl.arange(0, TOGETHER)
    here = block * BLOCK < elements
    absmax = tl.load(absmax_pointer + block, mask=here, other=0)
    if NESTED:
        nested_absmax = tl.load(nested_absmax_pointer + block // NESTED_BLOCK, mask=here, other=0.0)
        # Two roundings, as in the reference: `launch.start` forbids the fused multiply-add.
        absmax = tl.load(nested_map_pointer + absmax.to(tl.int32)) * nested_absmax + nested_offset
    byte = tl.arange(0, TOGETHER)[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    packed = tl.load(packed_pointer + first * (BLOCK // 2) + byte, mask=byte * 2 < left, other=0).to(tl.int32)
    code = tl.reshape(tl.join(packed >> 4, packed & 15), [TOGETHER, BLOCK])
    offset = tl.arange(0, TOGETHER)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(book_pointer + code) * absmax[:, None]
    store_float(output_pointer + first * BLOCK + offset, value, offset < left)


class Nested(NamedTuple):
    """What double quantization stores beside the 8-bit absmax codes."""

    absmax: torch.Tensor
    """float32 [ceil(blocks / block_size)]."""
    map: torch.Tensor
    """float32 [256]: the value of each code."""
    block_size: int
    """Blocks that share one entry of `absmax`."""
    offset: float
    """The mean that was taken off before."""


def decode_groups(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`codes * scale` with a scale per group: tensor-wise (one group), rows, row groups.

    codes [groups, group]: float8_e4m3fn, float8_e5m2 or int8. scale [groups]: float32. dtype: bfloat16, float16 or
    float32. Returns `dtype` [groups, group].
    """
    launch.check(scale, "scale", torch.float32, tuple(codes.shape[:1]))
    return _decode(codes, scale, dtype, tuple(codes.shape), across=1, size=0)


def decode_blocks(codes: torch.Tensor, scale: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """`codes * scale` with a scale per size x size block.

    codes [rows, columns]: float8_e4m3fn, float8_e5m2 or int8; `size` divides both. scale [rows / size, columns / size]:
    float32. dtype: bfloat16, float16 or float32. Returns `dtype` [rows, columns].
    """
    rows, columns = codes.shape
    assert size > 0 and rows % size == 0 and columns % size == 0, f"{rows} x {columns} has no {size} x {size} blocks"
    across = columns // size
    launch.check(scale, "scale", torch.float32, (rows // size, across))
    return _decode(codes, scale, dtype, (rows * across, size), across, size)


def _decode(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int], across: int, size: int
) -> torch.Tensor:
    """Decode `codes` seen as [groups, group]; size is 0 where every group has a scale of its own."""
    assert codes.dtype in GRIDS, f"codes are {codes.dtype}, not FP8 or int8"
    assert codes.is_contiguous(), f"codes of shape {tuple(codes.shape)} are not contiguous"
    output = _output(codes.shape, dtype, codes.device)
    groups, group = shape
    rows, width = launch.tile_shape(groups, group, launch.STREAMED_ELEMENTS)
    width_tiles = launch.ceil_divide(group, width)
    arguments = (launch.bits(codes), scale, launch.bits(output), groups, group, width_tiles, across, size)
    constants = {"GRID": GRIDS[codes.dtype], "BLOCKED": size > 0, "ROWS": rows, "WIDTH": width}
    programs = launch.ceil_divide(groups, rows) * width_tiles
    launch.start(decode_groups_kernel, programs, *arguments, **constants, num_warps=4)
    return output


def decode_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    code_book: torch.Tensor,
    elements: int,
    dtype: torch.dtype,
    nested: Nested | None = None,
) -> torch.Tensor:
    """`dtype` [elements] of packed NF4 or FP4 codes.

    packed [ceil(elements / 2)] or [ceil(elements / 2), 1]: uint8. absmax [ceil(elements / block_size)]: float32, or
    with `nested` uint8. block_size: a power of two. code_book [16]: float32, a file's quant_map. dtype: bfloat16,
    float16 or float32.
    """
    assert block_size >= 2 and block_size & (block_size - 1) == 0, f"block size {block_size} is not a power of two"
    blocks = launch.ceil_divide(elements, block_size)
    packed = packed.reshape(-1)
    launch.check(packed, "packed", torch.uint8, ((elements + 1) // 2,))
    launch.check(absmax, "absmax", torch.float32 if nested is None else torch.uint8, (blocks,))
    launch.check(code_book, "code_book", torch.float32, (16,))
    if nested is not None:
        launch.check(nested.absmax, "nested absmax", torch.float32, (launch.ceil_divide(blocks, nested.block_size),))
        launch.check(nested.map, "nested map", torch.float32, (256,))
    # Without nesting, the kernel never looks at its nested arguments.
    nested_absmax, nested_map, nested_block, offset = nested or (code_book, code_book, 1, 0.0)
    output = _output((elements,), dtype, packed.device)
    together = min(max(launch.STREAMED_ELEMENTS // block_size, 1), launch.next_power_of_2(blocks))
    arguments = (packed, code_book, absmax, nested_absmax, nested_map, offset, launch.bits(output), elements)
    constants = {"BLOCK": block_size, "NESTED": nested is not None, "NESTED_BLOCK": nested_block, "TOGETHER": together}
    programs = launch.ceil_divide(blocks, together)
    warps = launch.warps(together * block_size, block_size)
    launch.start(decode_4bit_kernel, programs, *arguments, **constants, num_warps=warps)
    return output


def _output(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    assert dtype in launch.LOADABLE, f"{dtype} is not a dtype that weights are decoded to"
    return torch.empty(shape, dtype=dtype, device=device)
