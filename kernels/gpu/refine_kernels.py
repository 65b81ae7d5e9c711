"""The kernels behind `refine`: rounding to nearest and what it costs, the error-feedback pass, a sweep.

A program is one warp and works on ROWS rows: no arithmetic crosses rows, and no warp waits for another. Per block of
BLOCK columns: a product of everything before it with the block's gains, term after term; a sequential loop that rounds
column after column, each found among the registers; a product that takes the block's errors on. What outlives a block
lies in memory, column by column, ROWS rows side by side, and a barrier stands between writing and reading it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import feedback
from .bnb4 import nibble, rank_among
from .grids import as_float32, nearest, number, scaled

BLOCK = tl.constexpr(feedback.BLOCK)


@triton.jit
def round_to_grid(value, scale, factor, book_pointer, low, high, B: tl.constexpr, GRID: tl.constexpr):
    """(rounded, code): the grid's value nearest to each of `value`, float32, and its code, int32.

    book_pointer [16] float32, low and high (codes of ranks as nibbles) and B (boundaries) are of a code book.
    """
    if GRID == "int8":
        code = nearest(scaled(value, scale, GRID), GRID)
        return number(code, GRID) * scale, code
    elif GRID == "e4m3":
        code = nearest(value * factor, GRID)
        return number(code, GRID) * scale, code
    else:
        code = nibble(low, high, rank_among(value * factor, B))
        return tl.load(book_pointer + code) * scale, code


@triton.jit
def rows_of_a_program(ROWS: tl.constexpr):
    """0 … ROWS - 1, which the compiler is told not to take for neighbours in memory.

    It would load four of them at a time into a thread, and all arithmetic would follow that layout: each thread would
    then round four rows, and the warp each row sixteen times, instead of four.
    """
    return tl.max_contiguous(tl.arange(0, ROWS), 1)


@triton.jit
def add_product(target, left_pointer, stride, right_pointer, terms, ROWS: tl.constexpr):
    """target [BLOCK, ROWS] + leftᵀ right, term after term, each product rounded first.

    left [terms, ≥ BLOCK], its rows `stride` elements apart, right [terms, ROWS]: float32. terms: a multiple of 4.
    """
    left = left_pointer + tl.arange(0, BLOCK)
    right = right_pointer + rows_of_a_program(ROWS)
    for _ in range(0, terms, 4):
        # Four terms are on their way at a time: memory's latency is what a lone warp would wait for.
        left_0, left_1 = tl.load(left), tl.load(left + stride)
        left_2, left_3 = tl.load(left + 2 * stride), tl.load(left + 3 * stride)
        right_0, right_1 = tl.load(right), tl.load(right + ROWS)
        right_2, right_3 = tl.load(right + 2 * ROWS), tl.load(right + 3 * ROWS)
        target += left_0[:, None] * right_0[None, :]
        target += left_1[:, None] * right_1[None, :]
        target += left_2[:, None] * right_2[None, :]
        target += left_3[:, None] * right_3[None, :]
        left += 4 * stride
        right += 4 * ROWS
    return target


@triton.jit
def add_errors(state_pointer, vector_pointer, error_pointer, rank, ROWS: tl.constexpr):
    """state += Vᵀ errors of one block: state [rank, ROWS], the block's rows of V [BLOCK, rank], errors [BLOCK, ROWS]."""
    offset = tl.arange(0, BLOCK)[:, None] * ROWS + rows_of_a_program(ROWS)[None, :]
    for first in range(0, rank, BLOCK):
        state = tl.load(state_pointer + first * ROWS + offset)
        state = add_product(state, vector_pointer + first, rank, error_pointer, BLOCK, ROWS)
        tl.store(state_pointer + first * ROWS + offset, state)


@triton.jit
def load_block(
    tile_pointer, scale_pointer, factor_pointer, order_pointer, group_pointer, live, columns, groups,
    GRID: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weights, scale and factor of BLOCK columns in the order of the visit, [BLOCK, ROWS] float32 each.

    order and group point to the block's first entry. Rows from `live` on are zeros with a scale of 1.
    """
    position = tl.load(order_pointer + tl.arange(0, BLOCK))
    group = tl.load(group_pointer + tl.arange(0, BLOCK))
    row = rows_of_a_program(ROWS)[None, :]
    weight = as_float32(tl.load(tile_pointer + row * columns + position[:, None], mask=row < live, other=0))
    scale = tl.load(scale_pointer + row * groups + group[:, None], mask=row < live, other=1.0)
    if GRID == "int8":
        return weight, scale, scale
    else:
        return weight, scale, tl.load(factor_pointer + row * groups + group[:, None], mask=row < live, other=1.0)


@triton.jit
def pick(block, chosen):
    """[ROWS]: the one row of `block` [BLOCK, ROWS] float32 where `chosen` [BLOCK] is true, to the bit."""
    # A sum of integers, for a sum of numbers would turn -0 into 0, and E4M3 has a code for either.
    bits = tl.where(chosen[:, None], block.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def nearest_kernel(
    tile_pointer,  # [rows, columns] float32, float16 or int16 (BF16 bits): the weights
    scale_pointer,  # [rows, groups] float32
    factor_pointer,  # [rows, groups] float32: what E4M3 and the code books multiply by before rounding
    book_pointer,  # [16] float32: a code book's values in the order of their codes
    order_pointer,  # [padded] int32: the column visited j-th
    group_pointer,  # [padded] int32: its scale
    gain_pointer,  # [rank, padded] float32: DeviceFeedback.gains; read if DENSE
    vector_pointer,  # [padded, rank] float32: DeviceFeedback.vectors; read unless DENSE
    share_pointer,  # [padded] float32: what a column's square weighs, D, or with DENSE the pivots
    error_pointer,  # [programs, kept, ROWS] float32, written: q - w; zeros at first
    state_pointer,  # [programs, rank, ROWS] float32, written unless DENSE: Σ e_j v_j; zeros at first
    objective_pointer,  # [rows] float64, written: e H eᵀ
    rows,
    columns,
    groups,
    rank,
    padded,
    kept,  # columns whose errors are kept: `padded` with DENSE, else BLOCK
    low,  # int32: codes of a book's ranks 0…7, a nibble each
    high,  # int32: codes of the ranks 8…15
    B: tl.constexpr,  # a book's boundaries
    GRID: tl.constexpr,
    DENSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What rounding to nearest costs each row: one program per ROWS rows."""
    program = tl.program_id(0).to(tl.int64)
    live = rows - program * ROWS
    tile_pointer += program * ROWS * columns
    scale_pointer += program * ROWS * groups
    factor_pointer += program * ROWS * groups
    error_pointer += program * kept * ROWS
    state_pointer += program * rank * ROWS
    index, row = tl.arange(0, BLOCK), rows_of_a_program(ROWS)
    square = index[:, None] * ROWS + row[None, :]
    objective = tl.zeros([ROWS], tl.float64)
    for begin in range(0, columns, BLOCK):
        weights, scales, factors = load_block(
            tile_pointer, scale_pointer, factor_pointer, order_pointer + begin, group_pointer + begin, live, columns,
            groups, GRID, ROWS
        )  # fmt: skip
        errors = error_pointer
        if DENSE:
            errors += begin * ROWS
        # One by one, as the compiled path adds them: where nearest and feedback are equally good, the last bit decides.
        for local in range(tl.minimum(columns - begin, BLOCK)):
            chosen = index == local
            weight, scale, factor = pick(weights, chosen), pick(scales, chosen), pick(factors, chosen)
            rounded, _ = round_to_grid(weight, scale, factor, book_pointer, low, high, B, GRID)
            tl.store(errors + local * ROWS + row, rounded - weight)
            if not DENSE:
                miss = (rounded - weight).to(tl.float64)
                objective += tl.load(share_pointer + begin + local).to(tl.float64) * miss * miss
        tl.debug_barrier()
        if DENSE:
            cross = tl.load(errors + square)
            cross = add_product(cross, gain_pointer + begin, padded, error_pointer, begin + BLOCK, ROWS)
            for local in range(tl.minimum(columns - begin, BLOCK)):
                miss = pick(cross, index == local).to(tl.float64)
                objective += tl.load(share_pointer + begin + local).to(tl.float64) * miss * miss
        else:
            add_errors(state_pointer, vector_pointer + begin * rank, errors, rank, ROWS)
        tl.debug_barrier()
    if not DENSE:
        for term in range(rank):
            state = tl.load(state_pointer + term * ROWS + row).to(tl.float64)
            objective += state * state
    tl.store(objective_pointer + program * ROWS + row, objective, mask=row < live)


@triton.jit
def forward_kernel(
    tile_pointer,  # [rows, columns] float32, float16 or int16 (BF16 bits): the weights
    scale_pointer,  # [rows, groups] float32
    factor_pointer,  # [rows, groups] float32: what E4M3 and the code books multiply by before rounding
    book_pointer,  # [16] float32: a code book's values in the order of their codes
    order_pointer,  # [padded] int32: the column visited j-th
    group_pointer,  # [padded] int32: its scale
    gain_pointer,  # [rank, padded] float32: DeviceFeedback.gains
    vector_pointer,  # [padded, rank] float32: DeviceFeedback.vectors; read unless DENSE
    coupling_pointer,  # [padded, BLOCK] float32: DeviceFeedback.coupling
    pivot_pointer,  # [padded] float32: DeviceFeedback.pivots
    code_pointer,  # [rows, columns] int8 or uint8: written
    error_pointer,  # [programs, kept, ROWS] float32, written: q - w; zeros at first
    state_pointer,  # [programs, rank, ROWS] float32, written unless DENSE: Σ e_j v_j; zeros at first
    objective_pointer,  # [rows] float64, written: e H eᵀ
    rows,
    columns,
    groups,
    rank,
    padded,
    kept,  # columns whose errors are kept: `padded` with KEEP, else BLOCK
    low,  # int32: codes of a book's ranks 0…7, a nibble each
    high,  # int32: codes of the ranks 8…15
    B: tl.constexpr,  # a book's boundaries
    GRID: tl.constexpr,
    DENSE: tl.constexpr,
    KEEP: tl.constexpr,  # whether the errors of all columns are kept, for a dense H or for sweeps
    ROWS: tl.constexpr,
):
    """The error-feedback pass: one program per ROWS rows."""
    program = tl.program_id(0).to(tl.int64)
    live = rows - program * ROWS
    tile_pointer += program * ROWS * columns
    code_pointer += program * ROWS * columns
    scale_pointer += program * ROWS * groups
    factor_pointer += program * ROWS * groups
    error_pointer += program * kept * ROWS
    state_pointer += program * rank * ROWS
    index, row = tl.arange(0, BLOCK), rows_of_a_program(ROWS)
    objective = tl.zeros([ROWS], tl.float64)
    for begin in range(0, columns, BLOCK):
        cross = tl.zeros([BLOCK, ROWS], tl.float32)
        errors = error_pointer
        if KEEP:
            errors += begin * ROWS
        if DENSE:
            cross = add_product(cross, gain_pointer + begin, padded, error_pointer, begin, ROWS)
        else:
            cross = add_product(cross, gain_pointer + begin, padded, state_pointer, rank, ROWS)
        weights, scales, factors = load_block(
            tile_pointer, scale_pointer, factor_pointer, order_pointer + begin, group_pointer + begin, live, columns,
            groups, GRID, ROWS
        )  # fmt: skip
        for local in range(tl.minimum(columns - begin, BLOCK)):
            chosen, column = index == local, begin + local
            # Loaded before anything is stored: the compiler must take a store for one to the same place.
            position, pivot = tl.load(order_pointer + column), tl.load(pivot_pointer + column)
            coupling = tl.load(coupling_pointer + column * BLOCK + index)
            weight = pick(weights, chosen)
            wanted = weight - pick(cross, chosen)
            scale, factor = pick(scales, chosen), pick(factors, chosen)
            rounded, code = round_to_grid(wanted, scale, factor, book_pointer, low, high, B, GRID)
            error = rounded - weight
            tl.store(errors + local * ROWS + row, error)
            tl.store(code_pointer + row * columns + position, code.to(code_pointer.dtype.element_ty), mask=row < live)
            miss = (rounded - wanted).to(tl.float64)
            objective += pivot.to(tl.float64) * miss * miss
            cross += coupling[:, None] * error[None, :]
        tl.debug_barrier()
        if not DENSE:
            add_errors(state_pointer, vector_pointer + begin * rank, errors, rank, ROWS)
            tl.debug_barrier()
    tl.store(objective_pointer + program * ROWS + row, objective, mask=row < live)


@triton.jit
def sweep_kernel(
    tile_pointer,  # [rows, columns] float32, float16 or int16 (BF16 bits): the weights
    scale_pointer,  # [rows, groups] float32
    factor_pointer,  # [rows, groups] float32: what E4M3 and the code books multiply by before rounding
    book_pointer,  # [16] float32: a code book's values in the order of their codes
    order_pointer,  # [padded] int32: the column visited j-th
    group_pointer,  # [padded] int32: its scale
    direction_pointer,  # [rank, padded] float32: DeviceFeedback.directions
    vector_pointer,  # [padded, rank] float32: DeviceFeedback.vectors; read unless DENSE
    slope_pointer,  # [padded, BLOCK] float32: DeviceFeedback.slopes
    diagonal_pointer,  # [padded] float32: DeviceFeedback.diagonal
    curvature_pointer,  # [padded] float32: DeviceFeedback.curvature
    code_pointer,  # [rows, columns] int8 or uint8: read and written
    error_pointer,  # [programs, padded, ROWS] float32, read and written: q - w
    change_pointer,  # [programs, BLOCK, ROWS] float32, written: new less old errors of a block; zeros at first
    state_pointer,  # [programs, rank, ROWS] float32, read and written unless DENSE: Σ e_j v_j
    objective_pointer,  # [rows] float64, read and written: e H eᵀ
    rows,
    columns,
    groups,
    rank,
    padded,
    low,  # int32: codes of a book's ranks 0…7, a nibble each
    high,  # int32: codes of the ranks 8…15
    B: tl.constexpr,  # a book's boundaries
    GRID: tl.constexpr,
    DENSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One sweep of coordinate descent: one program per ROWS rows."""
    program = tl.program_id(0).to(tl.int64)
    live = rows - program * ROWS
    tile_pointer += program * ROWS * columns
    code_pointer += program * ROWS * columns
    scale_pointer += program * ROWS * groups
    factor_pointer += program * ROWS * groups
    error_pointer += program * padded * ROWS
    change_pointer += program * BLOCK * ROWS
    state_pointer += program * rank * ROWS
    index, row = tl.arange(0, BLOCK), rows_of_a_program(ROWS)
    objective_pointer += program * ROWS + row
    objective = tl.load(objective_pointer, mask=row < live, other=0.0)
    for begin in range(0, columns, BLOCK):
        cross = tl.zeros([BLOCK, ROWS], tl.float32)
        before = error_pointer if DENSE else state_pointer
        cross = add_product(cross, direction_pointer + begin, padded, before, rank, ROWS)
        weights, scales, factors = load_block(
            tile_pointer, scale_pointer, factor_pointer, order_pointer + begin, group_pointer + begin, live, columns,
            groups, GRID, ROWS
        )  # fmt: skip
        for local in range(tl.minimum(columns - begin, BLOCK)):
            chosen, column = index == local, begin + local
            position, share = tl.load(order_pointer + column), tl.load(diagonal_pointer + column)
            slope = tl.load(slope_pointer + column * BLOCK + index)
            old = tl.load(error_pointer + column * ROWS + row)
            weight = pick(weights, chosen)
            scale, factor = pick(scales, chosen), pick(factors, chosen)
            bend = tl.broadcast_to(tl.load(curvature_pointer + column), [ROWS])
            wish = old - tl.math.div_rn(share * old + pick(cross, chosen), bend)
            rounded, code = round_to_grid(weight + wish, scale, factor, book_pointer, low, high, B, GRID)
            new = rounded - weight
            old_miss, new_miss = (old - wish).to(tl.float64), (new - wish).to(tl.float64)
            better = tl.abs(new_miss) < tl.abs(old_miss)
            change = tl.where(better, new - old, 0.0)
            tl.store(change_pointer + local * ROWS + row, change)
            tl.store(error_pointer + column * ROWS + row, tl.where(better, new, old))
            code = code.to(code_pointer.dtype.element_ty)
            tl.store(code_pointer + row * columns + position, code, mask=better & (row < live))
            saving = bend.to(tl.float64) * (old_miss * old_miss - new_miss * new_miss)
            objective -= tl.where(better, saving, 0.0)
            cross += slope[:, None] * change[None, :]
        tl.debug_barrier()
        if not DENSE:
            add_errors(state_pointer, vector_pointer + begin * rank, change_pointer, rank, ROWS)
            tl.debug_barrier()
    tl.store(objective_pointer, objective, mask=row < live)


@triton.jit
def restore_nearest_kernel(
    tile_pointer,  # [rows, columns] float32, float16 or int16 (BF16 bits): the weights
    scale_pointer,  # [rows, groups] float32
    factor_pointer,  # [rows, groups] float32: what E4M3 and the code books multiply by before rounding
    book_pointer,  # [16] float32: a code book's values in the order of their codes
    group_pointer,  # [columns] int32: the scale of each column as it stands in the tile
    worse_pointer,  # [rows] bool: the rows to round to nearest
    code_pointer,  # [rows, columns] int8 or uint8: written where `worse`
    rows,
    columns,
    groups,
    across,  # tiles of WIDTH that cover a row
    low,  # int32: codes of a book's ranks 0…7, a nibble each
    high,  # int32: codes of the ranks 8…15
    B: tl.constexpr,  # a book's boundaries
    GRID: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Codes of rounding to nearest for some rows: one program per [HEIGHT, WIDTH] tile; of other rows nothing is read."""
    row = (tl.program_id(0) // across).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    column = (tl.program_id(0) % across) * WIDTH + tl.arange(0, WIDTH)
    worse = tl.load(worse_pointer + row, mask=row < rows, other=0) != 0
    mask = worse[:, None] & (column < columns)[None, :]
    group = row[:, None] * groups + tl.load(group_pointer + column, mask=column < columns, other=0)[None, :]
    offset = row[:, None] * columns + column[None, :]
    weight = as_float32(tl.load(tile_pointer + offset, mask=mask, other=0))
    scale = tl.load(scale_pointer + group, mask=mask, other=1.0)
    factor = tl.load(factor_pointer + group, mask=mask, other=1.0)
    _, code = round_to_grid(weight, scale, factor, book_pointer, low, high, B, GRID)
    tl.store(code_pointer + offset, code.to(code_pointer.dtype.element_ty), mask=mask)
