"""NF4 and FP4 encoding on the GPU: absmax and packed codes of consecutive blocks, in one kernel.

    absmax = max |w|    v = w * (1 / max(absmax, 1e-38))    code = nearest book value to v, ties to the lower

Bit for bit `kernels.bnb4.encode`, which is what bitsandbytes computes (Dettmers et al., "QLoRA", 2023): the reciprocal
is rounded and multiplied with, except in the short last block, which divides; the first of two elements takes the high
nibble. Of the 15 boundaries four comparisons are enough: the rank is found from its highest bit down.

bitsandbytes' own CUDA kernel is not used: it writes other bytes than its CPU kernel. It multiplies by the device's
approximate reciprocal, gives a block of zeros the code of -1, and has four of NF4's fifteen boundaries one float32 step
off (0.50, by its machine code). Nor does it measure the error, which here costs no second reading.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl

from ..codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS
from . import launch
from .grids import as_float32, magnitude_bits
from .scaled import total

SMALLEST_DIVISOR_BITS = tl.constexpr(int(np.float32(1e-38).view(np.int32)))  # as bits: the number itself is subnormal


@triton.jit
def rank_among(value, B: tl.constexpr):
    """How many of the 15 ascending boundaries B lie below `value`; NaN lies above all, as torch.bucketize has it."""
    # "not below or at" instead of "above": true of NaN.
    eight = (value <= B[7]) == 0
    four = (value <= tl.where(eight, B[11], B[3])) == 0
    two = (value <= tl.where(eight, tl.where(four, B[13], B[9]), tl.where(four, B[5], B[1]))) == 0
    upper = tl.where(four, tl.where(two, B[14], B[12]), tl.where(two, B[10], B[8]))
    lower = tl.where(four, tl.where(two, B[6], B[4]), tl.where(two, B[2], B[0]))
    one = (value <= tl.where(eight, upper, lower)) == 0
    return (eight.to(tl.int32) << 3) | (four.to(tl.int32) << 2) | (two.to(tl.int32) << 1) | one.to(tl.int32)


@triton.jit
def nibble(table_low, table_high, index):
    """Entry `index` (0…15) of a table of nibbles: entries 0…7 in the int32 `table_low`, 8…15 in `table_high`."""
    return (tl.where(index < 8, table_low, table_high) >> ((index & 7) << 2)) & 15


@triton.jit
def encode_kernel(
    weight_pointer,  # [elements] float32, float16 or int16 (BF16 bits): the weights
    given_pointer,  # [ceil(elements / BLOCK)] float32: what is taken in place of absmax; read if GIVEN
    value_pointer,  # [16] float32: the book's values in the order of their codes; read if MEASURE
    packed_pointer,  # [ceil(elements / 2)] uint8, written: two codes a byte
    absmax_pointer,  # [ceil(elements / BLOCK)] int32, written: float32 bits, NaN where the block holds one
    sum_pointer,  # [2, ceil(elements / BLOCK)] float32, written if MEASURE: squared errors, squared v of each block
    end,  # elements up to which this launch encodes
    first_block,  # block of the first program
    blocks,  # of the whole tensor
    table_low,  # int32: codes of the ranks 0…7, a nibble each
    table_high,  # int32: codes of the ranks 8…15
    B: tl.constexpr,  # 15 ascending boundaries
    BLOCK: tl.constexpr,  # elements of a block, a power of two
    TOGETHER: tl.constexpr,  # blocks of a program
    SHORT: tl.constexpr,  # whether this is the short last block
    GIVEN: tl.constexpr,
    MEASURE: tl.constexpr,
):
    """Blocks of BLOCK elements: one program per TOGETHER of them."""
    # Only the first block's number needs 64 bits: offsets of that size, one for each element, would fill the registers.
    first = first_block + tl.program_id(0).to(tl.int64) * TOGETHER
    left = end - first * BLOCK  # elements from this program's first to the end
    offset = tl.arange(0, TOGETHER)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    weight = as_float32(tl.load(weight_pointer + first * BLOCK + offset, mask=offset < left, other=0))
    block = first + tl.arange(0, TOGETHER)
    here = block * BLOCK < end
    if GIVEN:
        absmax = magnitude_bits(tl.load(given_pointer + block, mask=here, other=1.0))
    else:
        absmax = tl.max(magnitude_bits(weight), axis=1)
    divisor_bits = tl.maximum(absmax, SMALLEST_DIVISOR_BITS)
    divisor = divisor_bits.to(tl.float32, bitcast=True)
    if SHORT:
        absmax = divisor_bits
        quotient = tl.math.div_rn(weight, tl.broadcast_to(divisor[:, None], [TOGETHER, BLOCK]))
        # An odd last byte is filled up with the code of 0, even where 0 / divisor would be NaN.
        value = tl.where(offset < left, quotient, 0.0)
    else:
        value = weight * tl.math.div_rn(tl.full([TOGETHER], 1.0, tl.float32), divisor)[:, None]
    tl.store(absmax_pointer + block, absmax, mask=here)
    code = nibble(table_low, table_high, rank_among(value, B))
    high, low = tl.split(tl.reshape(code, [TOGETHER, BLOCK // 2, 2]))
    byte = tl.arange(0, TOGETHER)[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    pointer = packed_pointer + first * (BLOCK // 2) + byte
    tl.store(pointer, ((high << 4) | low).to(tl.uint8), mask=byte * 2 < left)
    if MEASURE:
        error = tl.where(offset < left, tl.load(value_pointer + code) - value, 0.0)
        tl.store(sum_pointer + block, tl.sum(error * error, axis=1), mask=here)
        tl.store(sum_pointer + blocks + block, tl.sum(value * value, axis=1), mask=here)


def encode(
    flat: torch.Tensor, block_size: int, book: str, measure: bool = False, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Packed codes and absmax of consecutive blocks.

    flat [elements]: bfloat16, float16 or float32. block_size: a power of two. book: "nf4" or "fp4". given
    [ceil(elements / block_size)] float32, none negative: scales chosen otherwise, to be taken in place of absmax; what
    lies beyond them saturates.
    Returns uint8 [ceil(elements / 2)], float32 [ceil(elements / block_size)], and with `measure` float64 [2]: squared
    error and squared weight. A NaN makes its block's absmax NaN and all its codes those of the book's largest value.
    """
    launch.check_weight(flat, "flat", 1)
    assert block_size >= 2 and block_size & (block_size - 1) == 0, f"block size {block_size} is not a power of two"
    elements = flat.numel()
    blocks, whole = launch.ceil_divide(elements, block_size), elements // block_size
    if given is not None:
        launch.check(given, "given", torch.float32, (blocks,))
    packed = torch.empty((elements + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.int32, device=flat.device)
    sums = torch.empty((2, blocks) if measure else 1, dtype=torch.float32, device=flat.device)
    values = book_values(book, flat.device)
    low, high = nibble_tables(book)
    together = min(max(launch.STREAMED_ELEMENTS // block_size, 1), launch.next_power_of_2(whole))
    constants = {"B": tuple(BOUNDARIES[book].tolist()), "BLOCK": block_size, "MEASURE": measure, "GIVEN": given is not None}

    def start(first: int, last: int, together: int, short: bool) -> None:
        end = min(last * block_size, elements)
        pointers = (launch.bits(flat), values if given is None else given, values, packed, absmax, sums)
        arguments = (*pointers, end, first, blocks, low, high)
        programs = launch.ceil_divide(last - first, together)
        warps = launch.warps(together * block_size, block_size)
        launch.start(encode_kernel, programs, *arguments, **constants, TOGETHER=together, SHORT=short, num_warps=warps)

    start(0, whole, together, short=False)
    start(whole, blocks, 1, short=True)
    result = packed, absmax.view(torch.float32)
    return (*result, total(sums.double(), result[1])) if measure else result


@functools.cache
def nibble_tables(book: str) -> tuple[int, int]:
    """Codes of the ranks as nibbles of two signed 32-bit integers."""
    nibbles = (int(code) << 4 * rank for rank, code in enumerate(ASCENDING_CODES[book]))
    table = np.array([sum(nibbles)], dtype=np.uint64).view(np.int32)
    return int(table[0]), int(table[1])


@functools.cache
def book_values(book: str, device: torch.device) -> torch.Tensor:
    """float32 [16]: the book on the device, once."""
    return torch.from_numpy(CODE_BOOKS[book]).to(device)
