"""4-point butterflies on vectors of 16 floats, as LLVM's own vector instructions: numba's loops over quads stay scalar.

LLVM splits the vectors where the machine's registers are narrower. No addition is contracted or reordered.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

BLOCK = 64  # elements of a block: four vectors
WIDTH = 16
FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
HALVES, WORDS = ir.VectorType(ir.IntType(16), WIDTH), ir.VectorType(ir.IntType(32), WIDTH)


@intrinsic
def rotate_block(typing_context, source, place, factor, target, at, digits):
    """target[at : at + 64] = source[place : place + 64] * factor, through the first `digits` (1, 2 or 3) stages.

    source: uint16 (BF16 bits) or float32, target: float32; contiguous, their elements numbered as they lie. digits is a
    literal.
    """
    if not isinstance(digits, types.IntegerLiteral) or source.layout != "C" or target.layout != "C":
        return None
    stages = digits.literal_value

    def generate(context, builder, signature, arguments):
        source, place, factor, target, at, _ = arguments
        element = signature.args[0].dtype
        scale = _all(builder, factor)
        vectors = [
            builder.fmul(_load(builder, _address(context, builder, signature.args[0], source, place, i), element), scale)
            for i in range(4)
        ]
        # Vector l, element 4 j + k -> vector j, element 4 l + k: the second digit selects the vector.
        vectors = _transpose(builder, vectors, 4)
        # -> vector k, element 4 l + j, and back.
        vectors = _transpose(builder, _butterfly(builder, _transpose(builder, vectors, 1)), 1)
        if stages > 1:
            vectors = _butterfly(builder, vectors)
        vectors = _transpose(builder, vectors, 4)
        if stages > 2:
            vectors = _butterfly(builder, vectors)
        for i, vector in enumerate(vectors):
            _store(builder, vector, _address(context, builder, signature.args[3], target, at, i))
        return context.get_dummy_value()

    return types.void(source, types.intp, types.float32, target, types.intp, digits), generate


@intrinsic
def rotate_stride(typing_context, target, at, stride):
    """One stage, in place, of 16 neighbours each at target[at + i * stride], i = 0…3; target as above."""

    def generate(context, builder, signature, arguments):
        target, at, stride = arguments
        addresses = []
        for _ in range(4):
            addresses.append(_address(context, builder, signature.args[0], target, at, 0))
            at = builder.add(at, stride)
        vectors = _butterfly(builder, [_load(builder, address, types.float32) for address in addresses])
        for vector, address in zip(vectors, addresses, strict=True):
            _store(builder, vector, address)
        return context.get_dummy_value()

    return types.void(target, types.intp, types.intp), generate


def _address(context, builder, array_type, array, place, vector: int):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [builder.add(place, ir.Constant(place.type, vector * WIDTH))])


def _load(builder, address, element):
    """16 elements as float32. They lie at no vector's boundary."""
    kind = HALVES if element == types.uint16 else FLOATS
    loaded = builder.load(builder.bitcast(address, kind.as_pointer()), align=element.bitwidth // 8)
    if kind is FLOATS:
        return loaded
    shift = ir.Constant(WORDS, [16] * WIDTH)
    return builder.bitcast(builder.shl(builder.zext(loaded, WORDS), shift), FLOATS)


def _store(builder, vector, address):
    builder.store(vector, builder.bitcast(address, FLOATS.as_pointer()), align=4)


def _all(builder, scalar):
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return _shuffle(builder, one, one, [0] * WIDTH)


def _butterfly(builder, vectors):
    """The sums of one stage, in the order that is part of the definition."""
    x0, x1, x2, x3 = vectors
    plus, minus = builder.fadd(x0, x1), builder.fsub(x2, x3)
    first, second = builder.fadd(plus, minus), builder.fsub(plus, minus)
    plus, minus = builder.fadd(x2, x3), builder.fsub(x0, x1)
    return [first, second, builder.fadd(plus, minus), builder.fsub(plus, minus)]


def _transpose(builder, vectors, unit: int):
    """Exchange the vector's number with the base-4 digit of the element's number whose weight is `unit`."""
    for bit in (1, 2):
        weight = bit * unit
        low = [e if not e & weight else WIDTH + e - weight for e in range(WIDTH)]
        high = [e + weight if not e & weight else WIDTH + e for e in range(WIDTH)]
        vectors = [_shuffle(builder, vectors[i & ~bit], vectors[i | bit], high if i & bit else low) for i in range(4)]
    return vectors


def _shuffle(builder, first, second, order):
    return builder.shuffle_vector(first, second, ir.Constant(WORDS, order))
