"""A small matrix product on strips of rows, compiled to vector registers.

A strip is LANES rows of a weight, transposed, so that a lane is a row and arithmetic on one row never depends on its
neighbours. LLVM's own vectoriser keeps no accumulators in registers here (13 Gflop/s against 85 measured on Zen 4), so
the inner loop is written in its vector types, which every target has or splits. Products and sums are rounded one by
one, never fused: the torch reference then gives the same bits, on every machine.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

OPTIONS = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}
LANES = 32
ROWS = 8  # rows of the product held in registers at once
WIDTH = 16  # lanes held in registers at once


def _make_accumulate(rows: int, width: int):
    """An intrinsic for `rows` x `width` accumulators."""
    scalar, index = ir.FloatType(), ir.IntType(64)
    vector = ir.VectorType(scalar, width)
    spread = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)

    @intrinsic
    def accumulate(typing_context, target, left, right, row, lane, count):
        """target[row + r, lane + l] += Σ_i left[row + r, i] · right[i, lane + l], i ascending, count > 0."""

        def generate(context, builder, signature, arguments):
            arrays = [
                context.make_array(kind)(context, builder, value)
                for kind, value in zip(signature.args[:3], arguments[:3], strict=True)
            ]
            first_row, first_lane, terms = arguments[3:]

            def address(array, *where):
                """The address of an element, from the array's own strides (in bytes)."""
                strides = cgutils.unpack_tuple(builder, array.strides, 2)
                offset = builder.add(
                    *(builder.mul(position, stride) for position, stride in zip(where, strides, strict=True))
                )
                return cgutils.pointer_add(builder, array.data, offset)

            def vector_at(pointer):
                return builder.bitcast(pointer, vector.as_pointer())

            target, left, right = arrays
            row_numbers = [builder.add(first_row, index(offset)) for offset in range(rows)]
            targets = [vector_at(address(target, number, first_lane)) for number in row_numbers]
            initial = [builder.load(pointer, align=4) for pointer in targets]
            entry = builder.block
            loop, done = builder.append_basic_block("term"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            term = builder.phi(index)
            term.add_incoming(index(0), entry)
            sums = [builder.phi(vector) for _ in range(rows)]
            for phi, value in zip(sums, initial, strict=True):
                phi.add_incoming(value, entry)
            lanes = builder.load(vector_at(address(right, term, first_lane)), align=4)
            following = []
            for phi, number in zip(sums, row_numbers, strict=True):
                factor = builder.load(address(left, number, term))
                single = builder.insert_element(ir.Constant(vector, ir.Undefined), factor, ir.IntType(32)(0))
                factors = builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), spread)
                following.append(builder.fadd(phi, builder.fmul(factors, lanes)))
            next_term = builder.add(term, index(1))
            term.add_incoming(next_term, loop)
            for phi, value in zip(sums, following, strict=True):
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", next_term, terms), loop, done)
            builder.position_at_end(done)
            for pointer, value in zip(targets, following, strict=True):
                builder.store(value, pointer, align=4)
            return context.get_dummy_value()

        return types.void(target, left, right, types.int64, types.int64, types.int64), generate

    return accumulate


_accumulate_tile = _make_accumulate(ROWS, WIDTH)
_accumulate_row = _make_accumulate(1, LANES)


@njit(**OPTIONS)
def add_product(target, left, right, count):
    """target += left[:, :count] @ right[:count].

    target [R, LANES], R a multiple of ROWS; left [R, ≥ count], any strides; right [≥ count, LANES]: float32. The terms
    of a sum are added to what `target` holds, in ascending order, each product rounded first.
    """
    if count > 0:
        for row in range(0, target.shape[0], ROWS):
            for lane in range(0, LANES, WIDTH):
                _accumulate_tile(target, left, right, row, lane, count)


@njit(**OPTIONS)
def add_product_row(target, left, right, row, count):
    """target[row] += left[row, :count] @ right[:count]: one row of `add_product`."""
    if count > 0:
        _accumulate_row(target, left, right, row, 0, count)
