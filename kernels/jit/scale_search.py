"""Squared errors of candidate scales, compiled: what the scale search of `streamquant.rounding.scales` compares.

Sums run over LANES interleaved partial sums in float32, joined in float64 by halves, in an order that does not depend on
the machine: the scale chosen is part of the file. LLVM's vectoriser keeps no partial sums in registers here and knows no
way to a book's value but fifteen selections, so the inner loops are written in its vector types. On a machine with
neither AVX2 nor AVX-512 they say what every target has; the bits are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from .strip_product import LANES, OPTIONS

INTEGER, INDEX, SINGLE, DOUBLE = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
SIGNLESS, EXPONENT = 0x7FFFFFFF, 0x7F800000
LARGEST = int(np.float32(448.0).view(np.int32))
SMALLEST_NORMAL = int(np.float32(2.0**-6).view(np.int32))
# What `_Vectors.tables` loads, eight entries each: a book's boundaries and values, where `_nearest_in_book` looks.
LOWER, UPPER, SECOND, THIRD, BOUNDARIES, VALUES, TABLE = 0, 8, 16, 24, 32, 48, 64
SMALLEST_LIVE = np.float32(1e-30)


class _Vectors:
    """Vectors of the width that the machine compiled for can permute at once, and what is not one instruction of LLVM's."""

    def __init__(self, context: Any, builder: Any):
        features = context.codegen().magic_tuple()[2].split(",")
        self.width, self.permutation = 16, None
        if "+avx512f" in features:
            self.permutation = "llvm.x86.avx512.permvar.sf.512"
        elif "+avx2" in features:
            self.width, self.permutation = 8, "llvm.x86.avx2.permps"
        self.builder = builder
        self.floats, self.integers = ir.VectorType(SINGLE, self.width), ir.VectorType(INTEGER, self.width)

    def load(self, pointer: Any, position: Any) -> Any:
        address = self.builder.gep(pointer, [position])
        return self.builder.load(self.builder.bitcast(address, self.floats.as_pointer()), align=4)

    def spread(self, number: Any) -> Any:
        """A float32 in every lane."""
        undefined = ir.Constant(self.floats, ir.Undefined)
        first = self.builder.insert_element(undefined, number, INTEGER(0))
        return self.builder.shuffle_vector(first, undefined, self.constant(0))

    def constant(self, number: int) -> Any:
        """An int32 in every lane."""
        return ir.Constant(self.integers, [number] * self.width)

    def permute(self, table: Any, index: Any) -> Any:
        """table[index], index below 8."""
        kind = ir.FunctionType(self.floats, [self.floats, self.integers])
        function = cgutils.get_or_insert_function(self.builder.module, kind, self.permutation)
        return self.builder.call(function, [table, index])

    def total(self, parts: list[Any]) -> Any:
        """The float64 sum of all lanes of `parts`, halves added to halves: lane l to lane l + LANES / 2, and so on."""
        doubles = ir.VectorType(DOUBLE, self.width)
        parts = [self.builder.fpext(part, doubles) for part in parts]
        while len(parts) > 1:
            middle = len(parts) // 2
            parts = [self.builder.fadd(*pair) for pair in zip(parts[:middle], parts[middle:], strict=True)]
        total, width = parts[0], self.width
        while width > 1:
            width //= 2
            halves = [ir.Constant(ir.VectorType(INTEGER, width), list(range(first, first + width))) for first in (0, width)]
            total = self.builder.fadd(*(self.builder.shuffle_vector(total, total, half) for half in halves))
        return self.builder.extract_element(total, INTEGER(0))


def _nearest_in_book(vectors: _Vectors, table: Any) -> Callable[[Any], Any]:
    """How to find the value of a book nearest to x, a value on a boundary going down. table: pointer to `_book_table`."""
    builder = vectors.builder

    def scalar(entry: int) -> Any:
        return vectors.spread(builder.load(builder.gep(table, [INDEX(entry)])))

    if vectors.permutation is None:
        boundaries, values = [scalar(BOUNDARIES + rank) for rank in range(15)], [scalar(VALUES + rank) for rank in range(16)]

        def by_selection(x: Any) -> Any:
            near = values[0]
            for boundary, value in zip(boundaries, values[1:], strict=True):
                near = builder.select(builder.fcmp_ordered(">", x, boundary), value, near)
            return near

        return by_selection

    # A vector of sixteen reads into the next table: what lies above entry 7 is never looked up.
    lower, upper, second, third = (vectors.load(table, INDEX(entry)) for entry in (LOWER, UPPER, SECOND, THIRD))
    middle, quarter, last_quarter = (scalar(BOUNDARIES + rank) for rank in (7, 3, 11))

    def by_halving(x: Any) -> Any:
        """Four comparisons, from the rank's highest bit down; its upper three bits are the index, the highest first."""

        def add(bit: int, where: Any, index: Any) -> Any:
            return builder.select(where, builder.or_(index, vectors.constant(bit)), index)

        eight = builder.fcmp_ordered(">", x, middle)
        four = builder.fcmp_ordered(">", x, builder.select(eight, last_quarter, quarter))
        index = add(2, four, builder.select(eight, vectors.constant(1), vectors.constant(0)))
        index = add(4, builder.fcmp_ordered(">", x, vectors.permute(second, index)), index)
        one = builder.fcmp_ordered(">", x, vectors.permute(third, index))
        return builder.select(one, vectors.permute(upper, index), vectors.permute(lower, index))

    return by_halving


def _error(vectors: _Vectors, near: Any, x: Any, weight: Any) -> Any:
    """weight · (near - x)²."""
    miss = vectors.builder.fsub(near, x)
    return vectors.builder.fmul(weight, vectors.builder.fmul(miss, miss))


def _book_error(vectors: _Vectors, table: Any) -> Callable[[Any, Any], list[Any]]:
    nearest = _nearest_in_book(vectors, table)
    return lambda x, weight: [_error(vectors, nearest(x), x, weight)]


def _book_moments(vectors: _Vectors, table: Any) -> Callable[[Any, Any], list[Any]]:
    nearest, multiply = _nearest_in_book(vectors, table), vectors.builder.fmul

    def terms(x: Any, weight: Any) -> list[Any]:
        near = nearest(x)
        weighted = multiply(weight, near)
        return [_error(vectors, near, x, weight), multiply(weighted, x), multiply(weighted, near)]

    return terms


def _e4m3_error(vectors: _Vectors, table: Any) -> Callable[[Any, Any], list[Any]]:
    """Adding 2**20 times the power of two below a magnitude and taking it off again rounds it to four digits, to even (no
    fastmath here); at the smallest normal number's, to a multiple of 2**-9, as subnormal numbers are."""
    builder = vectors.builder

    def pick(comparison: str, left: Any, right: Any) -> Any:
        return builder.select(builder.icmp_signed(comparison, left, right), left, right)

    def terms(x: Any, weight: Any) -> list[Any]:
        signless = builder.and_(builder.bitcast(x, vectors.integers), vectors.constant(SIGNLESS))
        magnitude = pick("<", signless, vectors.constant(LARGEST))
        power = pick(">", builder.and_(magnitude, vectors.constant(EXPONENT)), vectors.constant(SMALLEST_NORMAL))
        aligner = builder.bitcast(builder.add(power, vectors.constant(20 << 23)), vectors.floats)
        exact = builder.bitcast(magnitude, vectors.floats)
        return [_error(vectors, builder.fsub(builder.fadd(exact, aligner), aligner), exact, weight)]

    return terms


def _make_sums(prepare: Callable[[_Vectors, Any], Callable[[Any, Any], list[Any]]], sums: int):
    """An intrinsic that adds up what `prepare`'s function makes of the scaled elements of a run and their weights."""

    @intrinsic
    def run_sums(typing_context, run, weight, factor, table):
        """float64 sums over a run, a tuple if there are several.

        run, weight [group]: float32, group a positive multiple of LANES. factor: float32. table: `_book_table`, or any.
        """
        for array in (run, weight, table):
            if not (isinstance(array, types.Array) and array.layout == "C" and array.dtype == types.float32):
                raise TypingError(f"{array} is no contiguous array of float32")

        def generate(context, builder, signature, arguments):
            run, weight, table = (
                context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 1, 3)
            )
            vectors = _Vectors(context, builder)
            terms, factor = prepare(vectors, table.data), vectors.spread(arguments[2])
            (elements,) = cgutils.unpack_tuple(builder, run.shape, 1)
            entry = builder.block
            loop, done = builder.append_basic_block("strip"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            position = builder.phi(INDEX)
            position.add_incoming(INDEX(0), entry)
            nothing = ir.Constant(vectors.floats, [0.0] * vectors.width)
            partial = [[builder.phi(vectors.floats) for _ in range(0, LANES, vectors.width)] for _ in range(sums)]
            following: list[list[Any]] = [[] for _ in range(sums)]
            for piece in range(LANES // vectors.width):
                offset = builder.add(position, INDEX(piece * vectors.width))
                x = builder.fmul(vectors.load(run.data, offset), factor)
                for number, term in enumerate(terms(x, vectors.load(weight.data, offset))):
                    following[number].append(builder.fadd(partial[number][piece], term))
            next_position = builder.add(position, INDEX(LANES))
            position.add_incoming(next_position, loop)
            for phi, value in zip(sum(partial, []), sum(following, []), strict=True):
                phi.add_incoming(nothing, entry)
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", next_position, elements), loop, done)
            builder.position_at_end(done)
            totals = [vectors.total(parts) for parts in following]
            return totals[0] if sums == 1 else cgutils.pack_array(builder, totals)

        result = types.float64 if sums == 1 else types.UniTuple(types.float64, sums)
        return result(run, weight, types.float32, table), generate

    return run_sums


_sum_e4m3_error = _make_sums(_e4m3_error, 1)
_sum_book_error = _make_sums(_book_error, 1)
_sum_book_moments = _make_sums(_book_moments, 3)


@njit(**OPTIONS)
def _pad(elements, padded):
    """The elements, in `padded`, which has room for them and holds zeros above, if they are no multiple of LANES."""
    if elements.shape[0] == padded.shape[0]:
        return elements
    for element in range(elements.shape[0]):
        padded[element] = elements[element]
    return padded


@njit(**OPTIONS)
def e4m3_errors(runs, multipliers, weights, first, errors):
    """errors[i, c] = Σ weights · (e4m3(run · m) - run · m)², in the grid's units, for the multiplier m of each
    candidate c.

    runs [n, group]: float32. multipliers [n, candidates]: float32. weights [cycle, group]: float32; run i has the
    weights (first + i) mod cycle. errors [n, candidates]: float64, written.
    """
    count, group = runs.shape
    room = -(-group // LANES) * LANES
    padded, padded_weight = np.zeros(room, np.float32), np.zeros(room, np.float32)
    for index in range(count):
        run = _pad(runs[index], padded)
        weight = _pad(weights[(first + index) % weights.shape[0]], padded_weight)
        for candidate in range(multipliers.shape[1]):
            errors[index, candidate] = _sum_e4m3_error(run, weight, multipliers[index, candidate], padded)


@njit(**OPTIONS)
def _book_table(boundaries, values):
    """The tables of a book for `_nearest_in_book`: float32 [TABLE]. Bits 1, 2 and 4 of an index are bits 8, 4 and 2 of a
    rank."""
    table = np.zeros(TABLE, np.float32)
    for index in range(8):
        rank = (index & 1) * 8 + (index & 2) * 2 + (index >> 2) * 2
        table[LOWER + index], table[UPPER + index] = values[rank], values[rank + 1]
        table[THIRD + index] = boundaries[rank]
        if index < 4:  # where bit 2 of the rank is not known yet
            table[SECOND + index] = boundaries[rank + 1]
    for rank in range(15):
        table[BOUNDARIES + rank] = boundaries[rank]
    for rank in range(16):
        table[VALUES + rank] = values[rank]
    return table


@njit(**OPTIONS)
def book_absmax(runs, ratios, refits, floor, weights, first, boundaries, values, absmax):
    """The absmax of least weighted error for each run: the best ratio of the true one, then least-squares refits.

    runs [n, group]: float32, group a multiple of LANES. ratios [candidates] float32. floor: float32, the least share of the
    true absmax that a refit may be. weights, first: as in `e4m3_errors`. boundaries, values: tuples of 15 and 16 float32,
    the book, ascending. absmax [n]: float32, the true one; overwritten.
    """
    table = _book_table(boundaries, values)
    candidates = ratios.shape[0]
    tried, factors, errors = np.empty(candidates, np.float32), np.empty(candidates, np.float32), np.empty(candidates)
    for index in range(runs.shape[0]):
        run, weight = runs[index], weights[(first + index) % weights.shape[0]]
        largest = absmax[index]
        if not largest > SMALLEST_LIVE:
            continue
        for candidate in range(candidates):
            tried[candidate] = largest * ratios[candidate]
            factors[candidate] = np.float32(1) / tried[candidate]
        for candidate in range(candidates):
            errors[candidate] = _sum_book_error(run, weight, factors[candidate], table)
        # Without a branch, which would be foreseen wrongly several times a run.
        least, best = np.inf, -1
        for candidate in range(candidates):
            error = errors[candidate] * (np.float64(tried[candidate]) * np.float64(tried[candidate]))
            better = error < least
            least, best = (error if better else least), (candidate if better else best)
        if best < 0:
            continue
        absmax[index] = tried[best]
        _, product, square = _sum_book_moments(run, weight, factors[best], table)
        for _ in range(refits):
            if not square > 0.0:
                break
            # For fixed codes c the best scale is Σ w c / Σ c²; x above is w / scale.
            refit = max(np.float32(np.float64(absmax[index]) * (product / square)), floor * largest)
            if not refit > SMALLEST_LIVE:
                break
            error, product, square = _sum_book_moments(run, weight, np.float32(1) / refit, table)
            error *= np.float64(refit) * np.float64(refit)
            if not error < least:
                break
            least, absmax[index] = error, refit
