"""The number grids inside a kernel: from a weight to a code and back, and from an absmax to a scale.

Each function takes GRID, one of "e4m3", "e5m2" and "int8", as a compile-time constant. Everything is spelled out in
float32 and integer operations that round the same way on every device and in Triton's interpreter:

    FP8    multiplier = largest / max(absmax, floor)    scale = 1 / multiplier    code = fp8(weight * multiplier)
    INT8   scale = max(absmax / 127, floor)                                       code = round(weight / scale)

(streamquant/formats/fp8.py and int8.py; kernels/fp8.py and int8.py.) Rounding is to nearest, ties to even, saturating.
FP8 codes follow "OCP 8-bit Floating Point Specification", 2023: E4M3 has bias 7, no infinity, 0x7F as NaN; E5M2 is the
upper byte of a float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)
SIGNLESS = tl.constexpr(0x7FFFFFFF)
# 1.5 * 2**23: after adding it, the low mantissa bits of a float32 are the number rounded to an integer.
INTEGER_ALIGNER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def as_float32(element):
    """Loaded elements as float32: int16 holds BF16 bits, which are the upper half of a float32's."""
    if element.dtype == tl.int16:
        return (element.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return element.to(tl.float32)


@triton.jit
def magnitude_bits(value):
    """|value| as float32 bits: integers that order like magnitudes, with inf above all numbers and NaN above inf."""
    return value.to(tl.int32, bitcast=True) & SIGNLESS


@triton.jit
def finite_or_zero(magnitude):
    """Magnitude bits with 0 in place of infinities and NaN."""
    return tl.where(magnitude < INFINITY_BITS, magnitude, 0)


@triton.jit
def scales(absmax, floor, GRID: tl.constexpr):
    """(factor, scale) of groups whose largest magnitude is `absmax`.

    `factor` is what `scaled` takes; `scale` is what a file stores. floor: the least absmax (FP8) or scale (INT8).
    """
    if GRID == "int8":
        scale = tl.maximum(tl.math.div_rn(absmax, tl.full(absmax.shape, 127.0, tl.float32)), floor)
        return scale, scale
    else:
        largest: tl.constexpr = 448.0 if GRID == "e4m3" else 57344.0
        multiplier = tl.math.div_rn(tl.full(absmax.shape, largest, tl.float32), tl.maximum(absmax, floor))
        return multiplier, tl.math.div_rn(tl.full(absmax.shape, 1.0, tl.float32), multiplier)


@triton.jit
def scaled(weight, factor, GRID: tl.constexpr):
    """The weight in units of the grid. INT8 truly divides: a reciprocal would round exact ties differently."""
    if GRID == "int8":
        return tl.math.div_rn(weight, factor)
    else:
        return weight * factor


@triton.jit
def nearest(value, GRID: tl.constexpr):
    """Code, as int32, of the grid's number nearest to `value`. NaN gives 0x7F on the FP8 grids and 0 on INT8's."""
    if GRID == "int8":
        number = tl.where(value == value, value, 0.0)
        clamped = tl.minimum(tl.maximum(number, -127.0), 127.0)
        aligner = tl.full([1], INTEGER_ALIGNER_BITS, tl.int32).to(tl.float32, bitcast=True)
        return (clamped + aligner).to(tl.int32, bitcast=True) - INTEGER_ALIGNER_BITS
    elif GRID == "e4m3":
        return _nearest_fp8(value, 3, 7, 0x43E00000)
    else:
        return _nearest_fp8(value, 2, 15, 0x47600000)


@triton.jit
def _nearest_fp8(value, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST_BITS: tl.constexpr):
    """FP8 code with MANTISSA bits of mantissa and exponent bias BIAS; LARGEST_BITS: its largest number's float32 bits.

    A normal number's code is its own upper bits, rounded and rebiased. Below the smallest normal number, adding
    2**23 times the grid's step to a magnitude leaves the code in the low mantissa bits, rounded by the adder itself.
    """
    shift: tl.constexpr = 23 - MANTISSA
    aligner_bits: tl.constexpr = (1 - BIAS - MANTISSA + 23 + 127) << 23
    smallest_normal: tl.constexpr = (1 - BIAS + 127) << 23
    bits = value.to(tl.int32, bitcast=True)
    signless = bits & SIGNLESS
    magnitude = tl.minimum(signless, LARGEST_BITS)
    rounded = magnitude + ((1 << (shift - 1)) - 1) + ((magnitude >> shift) & 1)
    normal = (rounded >> shift) - ((127 - BIAS) << MANTISSA)
    aligner = tl.full([1], aligner_bits, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (magnitude.to(tl.float32, bitcast=True) + aligner).to(tl.int32, bitcast=True) - aligner_bits
    code = tl.where(magnitude >= smallest_normal, normal, subnormal) | ((bits >> 24) & 0x80)
    return tl.where(signless > INFINITY_BITS, 0x7F, code)


@triton.jit
def number(code, GRID: tl.constexpr):
    """float32 of int32 codes: the grid's numbers, before any scale. Only the low eight bits of an FP8 code count."""
    if GRID == "int8":
        return code.to(tl.float32)
    else:
        # The code's exponent and mantissa, moved to their place in a float32, are the number but for the bias: a power
        # of two mends that, exactly, for subnormal codes too.
        shift: tl.constexpr = 20 if GRID == "e4m3" else 21
        rebias_bits: tl.constexpr = (127 + 120) << 23 if GRID == "e4m3" else (127 + 112) << 23
        signless = code & 0x7F
        rebias = tl.full([1], rebias_bits, tl.int32).to(tl.float32, bitcast=True)
        magnitude = ((signless << shift).to(tl.float32, bitcast=True) * rebias).to(tl.int32, bitcast=True)
        if GRID == "e4m3":
            magnitude = tl.where(signless == 0x7F, 0x7FC00000, magnitude)
        else:
            # Exponent 31 means infinity and NaN, as in a float16.
            magnitude = tl.where(signless >= 0x7C, INFINITY_BITS | ((signless & 3) << 21), magnitude)
        return (magnitude | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def store_float(pointer, value, mask):
    """Store float32 values as the pointer's type: float32, float16, or int16 for BF16, rounded to nearest even."""
    if pointer.dtype.element_ty == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding must not carry a NaN's mantissa into the exponent or the sign.
        bf16 = tl.where((bits & SIGNLESS) > INFINITY_BITS, 0x7FC0, rounded)
        tl.store(pointer, bf16.to(tl.int16), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)
