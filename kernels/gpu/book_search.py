"""Scales of least squared error of 4-bit code books on the GPU, searched and used in one kernel.

    13 ratios of absmax from 0.70 to 1.15, then two least-squares refits of the scale to the chosen codes

The definition is `kernels.scale_search` (method A), which sums in float64; here errors are summed in float32 and compared
in units of absmax: where two scales are as good as equal, the choice may differ, and a refitted scale may differ in its
last digits. Codes are those of `kernels.bnb4` under the scale chosen, bit for bit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS
from ..search_grid import BOOK_RATIOS, BOOK_REFITS
from ..search_grid import SMALLEST_LIVE as LIVE
from . import launch
from .bnb4 import SMALLEST_DIVISOR_BITS, encode, nibble, nibble_tables, rank_among
from .grids import as_float32, magnitude_bits
from .scale_search import importance_of
from .scaled import total

PROGRAM_ELEMENTS = 1024  # 8 a thread: the book takes registers too
RATIOS = tl.constexpr(len(BOOK_RATIOS))
SMALLEST_LIVE = tl.constexpr(LIVE)


@triton.jit
def nearest_value(value, B: tl.constexpr, V: tl.constexpr):
    """The nearest of the ascending values V [16], whose boundaries are B [15]; a value on a boundary goes down."""
    eight = value > B[7]
    b0, b1, b2 = tl.where(eight, B[8], B[0]), tl.where(eight, B[9], B[1]), tl.where(eight, B[10], B[2])
    b3, b4, b5 = tl.where(eight, B[11], B[3]), tl.where(eight, B[12], B[4]), tl.where(eight, B[13], B[5])
    b6 = tl.where(eight, B[14], B[6])
    v0, v1, v2, v3 = (
        tl.where(eight, V[8], V[0]), tl.where(eight, V[9], V[1]), tl.where(eight, V[10], V[2]), tl.where(eight, V[11], V[3])
    )  # fmt: skip
    v4, v5, v6, v7 = (
        tl.where(eight, V[12], V[4]), tl.where(eight, V[13], V[5]), tl.where(eight, V[14], V[6]), tl.where(eight, V[15], V[7])
    )  # fmt: skip
    four = value > b3
    b0, b1, b2 = tl.where(four, b4, b0), tl.where(four, b5, b1), tl.where(four, b6, b2)
    v0, v1, v2, v3 = tl.where(four, v4, v0), tl.where(four, v5, v1), tl.where(four, v6, v2), tl.where(four, v7, v3)
    two = value > b1
    v0, v1 = tl.where(two, v2, v0), tl.where(two, v3, v1)
    return tl.where(value > tl.where(two, b2, b0), v1, v0)


@triton.jit
def block_sums(weight, tried, importance, B: tl.constexpr, V: tl.constexpr, WEIGHTED: tl.constexpr):
    """([rows] error in units of `tried`, [rows] the least-squares scale for the same codes: tried · Σ x c / Σ c²).

    A caller that drops the second does not pay for it: the compiler removes what nobody reads.
    """
    factor = tl.math.div_rn(tl.full(tried.shape, 1.0, tl.float32), tried)
    x = weight * factor[:, None]
    near = nearest_value(x, B, V)
    miss = near - x
    error = miss * miss
    weighted = near
    if WEIGHTED:
        error *= importance
        weighted *= importance
    square = tl.sum(weighted * near, axis=1)
    product = tl.sum(weighted * x, axis=1)
    fitted = tried * tl.math.div_rn(product, tl.where(square > 0.0, square, 1.0))
    return tl.sum(error, axis=1), tl.where(square > 0.0, fitted, 0.0)


@triton.jit
def search_blocks_kernel(
    weight_pointer,  # [elements] float32, float16 or int16 (BF16 bits): the weights
    importance_pointer,  # [cycle, SIZE] float32: block i has those of i mod cycle; read if WEIGHTED
    ratio_pointer,  # [RATIOS] float32: tried scales / absmax
    packed_pointer,  # [ceil(elements / 2)] uint8, written if PACK: two codes a byte
    absmax_pointer,  # [ceil(elements / SIZE)] int32, written: float32 bits of the scales; of a block with NaN, NaN
    sum_pointer,  # [2, ceil(elements / SIZE)] float32, written if MEASURE: squared errors, squared v of each block
    end,  # elements up to which this launch works
    first_block,  # block of the first program
    blocks,  # of the whole tensor
    cycle,
    floor,  # float32: the least share of absmax that a scale may be
    table_low,  # int32: codes of the ranks 0…7, a nibble each
    table_high,  # int32: codes of the ranks 8…15
    B: tl.constexpr,  # 15 ascending boundaries
    V: tl.constexpr,  # 16 ascending values
    SIZE: tl.constexpr,  # elements of a block
    WIDTH: tl.constexpr,  # covers SIZE, a power of two
    TOGETHER: tl.constexpr,  # blocks of a program
    REFITS: tl.constexpr,  # least-squares refits after the ratios
    WEIGHTED: tl.constexpr,
    PACK: tl.constexpr,  # only of whole blocks: a short one is encoded differently
    MEASURE: tl.constexpr,  # only with PACK
):
    """The scales of least error of blocks, and their codes: one program per TOGETHER blocks."""
    first = first_block + tl.program_id(0).to(tl.int64) * TOGETHER
    left = end - first * SIZE  # elements from this program's first to the end
    column = tl.arange(0, WIDTH)[None, :]
    offset = tl.arange(0, TOGETHER)[:, None] * SIZE + column
    inside = (column < SIZE) & (offset < left)
    weight = as_float32(tl.load(weight_pointer + first * SIZE + offset, mask=inside, other=0))
    block = first + tl.arange(0, TOGETHER)
    here = block * SIZE < end
    importance = 1.0
    if WEIGHTED:
        which = (block % cycle).to(tl.int32)[:, None] * SIZE + column
        importance = tl.load(importance_pointer + which, mask=inside, other=0.0)
    largest = tl.max(magnitude_bits(weight), axis=1).to(tl.float32, bitcast=True)
    live = largest > SMALLEST_LIVE
    unit = tl.where(live, largest, 1.0)
    lowest = largest * floor
    best = largest
    least = tl.full([TOGETHER], float("inf"), tl.float32)
    for candidate in range(RATIOS):
        tried = tl.where(live, largest * tl.load(ratio_pointer + candidate), 1.0)
        error, _ = block_sums(weight, tried, importance, B, V, WEIGHTED)
        # In units of absmax²: the square of a scale may be no float32.
        error *= (tried / unit) * (tried / unit)
        better = live & (error < least) & (tried > SMALLEST_LIVE) & (tried >= lowest)
        best = tl.where(better, tried, best)
        least = tl.where(better, error, least)
    _, fitted = block_sums(weight, tl.where(live, best, 1.0), importance, B, V, WEIGHTED)
    for _refit in range(REFITS):
        fitted = tl.maximum(fitted, lowest)
        tried = tl.where(live & (fitted > SMALLEST_LIVE), fitted, 1.0)
        error, following = block_sums(weight, tried, importance, B, V, WEIGHTED)
        error *= (tried / unit) * (tried / unit)
        better = live & (error < least) & (fitted > SMALLEST_LIVE)
        best = tl.where(better, fitted, best)
        least = tl.where(better, error, least)
        fitted = tl.where(better, following, fitted)
    if PACK:
        divisor_bits = tl.maximum(magnitude_bits(best), SMALLEST_DIVISOR_BITS)
        divisor = divisor_bits.to(tl.float32, bitcast=True)
        value = weight * tl.math.div_rn(tl.full([TOGETHER], 1.0, tl.float32), divisor)[:, None]
        code = nibble(table_low, table_high, rank_among(value, B))
        high, low = tl.split(tl.reshape(code, [TOGETHER, WIDTH // 2, 2]))
        pair = tl.arange(0, WIDTH // 2)[None, :]
        byte = tl.arange(0, TOGETHER)[:, None] * (SIZE // 2) + pair
        there = (pair < SIZE // 2) & (byte * 2 < left)
        tl.store(packed_pointer + first * (SIZE // 2) + byte, ((high << 4) | low).to(tl.uint8), mask=there)
        if MEASURE:
            miss = tl.where(inside, nearest_value(value, B, V) - value, 0.0)
            tl.store(sum_pointer + block, tl.sum(miss * miss, axis=1), mask=here)
            tl.store(sum_pointer + blocks + block, tl.sum(value * value, axis=1), mask=here)
    tl.store(absmax_pointer + block, best.to(tl.int32, bitcast=True), mask=here)


def book_absmax(
    tile: torch.Tensor, block_size: int, weights: torch.Tensor | None, book: str, floor: float = 0.0
) -> torch.Tensor:
    """The scale of least weighted error for each block: float32 [ceil(elements / block_size)].

    tile [elements]: bfloat16, float16 or float32, finite. block_size: even. weights float32 [cycle, block_size], block i
    taking row i mod cycle; None for equal ones. book: "nf4" or "fp4". floor: the least share of absmax that a scale may be.
    """
    return _search(tile, block_size, book, weights, floor, pack=False, measure=False)[1]


def pack(
    flat: torch.Tensor, block_size: int, book: str, weights: torch.Tensor | None = None, measure: bool = False,
    floor: float = 0.0,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Packed codes and the scales of least error of consecutive blocks.

    flat [elements]: bfloat16, float16 or float32. block_size: a power of two. book: "nf4" or "fp4". weights,
    floor: as in `book_absmax`.
    Returns uint8 [ceil(elements / 2)], float32 [ceil(elements / block_size)], and with `measure` float64 [2]: squared error
    and squared weight, not weighted. A block that holds NaN or an infinity is encoded with its absmax.
    """
    assert block_size & (block_size - 1) == 0, f"block size {block_size} is not a power of two"
    packed, absmax, sums = _search(flat, block_size, book, weights, floor, pack=True, measure=measure)
    return (packed, absmax, sums) if measure else (packed, absmax)


def _search(
    flat: torch.Tensor, block_size: int, book: str, weights: torch.Tensor | None, floor: float, pack: bool, measure: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Packed codes (if `pack`), scales, and float64 [2] (if `measure`)."""
    launch.check_weight(flat, "flat", 1)
    assert block_size >= 2 and block_size % 2 == 0, f"block size {block_size} is odd"
    elements = flat.numel()
    blocks, whole = launch.ceil_divide(elements, block_size), elements // block_size
    importance, cycle = importance_of(weights, block_size, flat)
    packed = torch.empty((elements + 1) // 2 if pack else 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.int32, device=flat.device)
    sums = torch.empty((2, blocks) if measure else 1, dtype=torch.float32, device=flat.device)
    values = tuple(CODE_BOOKS[book][ASCENDING_CODES[book]].tolist())
    width = launch.next_power_of_2(block_size)
    constants = {
        "B": tuple(BOUNDARIES[book].tolist()), "V": values, "SIZE": block_size, "WIDTH": width, "REFITS": BOOK_REFITS,
        "WEIGHTED": weights is not None,
    }  # fmt: skip

    def start(first: int, last: int, together: int, pack: bool, measure: bool) -> None:
        pointers = (launch.bits(flat), importance, book_ratios(flat.device), packed, absmax, sums)
        arguments = (*pointers, min(last * block_size, elements), first, blocks, cycle, float(floor), *nibble_tables(book))
        shape = {"TOGETHER": together, "PACK": pack, "MEASURE": measure}
        programs = launch.ceil_divide(last - first, together)
        # With 16 warps ptxas makes room for two programs, and a long weighted block would spill.
        warps = min(2 * launch.warps(together * width, block_size), 16 if weights is None else 8)
        launch.start(search_blocks_kernel, programs, *arguments, **constants, **shape, num_warps=warps)

    start(0, whole, min(max(PROGRAM_ELEMENTS // width, 1), launch.next_power_of_2(whole)), pack, measure)
    start(whole, blocks, 1, pack=False, measure=False)
    scales = absmax.view(torch.float32)
    if pack and whole < blocks:
        rest = encode(flat[whole * block_size :], block_size, book, measure, scales[whole:])
        packed[whole * block_size // 2 :] = rest[0]
        scales[whole:] = rest[1]
        if measure:
            return packed, scales, total(sums[:, :whole].double(), scales[:whole]) + rest[2]
    return packed, scales, total(sums.double(), scales) if measure else None


@functools.cache
def book_ratios(device: torch.device) -> torch.Tensor:
    """float32 [13]: the scales tried, over absmax, on the device, once."""
    return torch.from_numpy(BOOK_RATIOS).to(device)
