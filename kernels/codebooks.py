"""The value tables that 4-bit and 8-bit code books are made of, and the limits of the number grids.

Plain numpy, so that planning and the JIT path need nothing heavier.
"""

from __future__ import annotations

import numpy as np

E4M3_MAX = 448.0
E5M2_MAX = 57344.0
INT8_MAX = 127

# Quantiles of a normal distribution, QLoRA (Dettmers et al. 2023), appendix E; the digits are bitsandbytes' own.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)

_FP4_MAGNITUDES = [
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
]

# bitsandbytes' FP4: sign in bit 3, magnitudes in no sorted order, both zeros positive. It is not the E2M1 of NVFP4.
FP4 = np.array(_FP4_MAGNITUDES + [0.0 - magnitude for magnitude in _FP4_MAGNITUDES], dtype=np.float32)

CODE_BOOKS = {"nf4": NF4, "fp4": FP4}

# Codes in ascending order of their values. Of FP4's two zeros code 0 comes first.
ASCENDING_CODES = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], dtype=np.uint8),
}


def midpoints(values: np.ndarray) -> np.ndarray:
    """Decision boundaries of ascending float32 `values` [n]: float32 [n - 1], halfway between neighbours.

    A value equal to a boundary belongs to the lower neighbour.
    """
    return ((values[:-1] + values[1:]) / np.float32(2)).astype(np.float32)


BOUNDARIES = {name: midpoints(book[ASCENDING_CODES[name]]) for name, book in CODE_BOOKS.items()}


def _e4m3_values() -> np.ndarray:
    """The number each E4M3 byte stands for: bias 7, no infinity, 0x7F and 0xFF are NaN ("OCP 8-bit Floating Point
    Specification", 2023)."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


# What each code byte stands for before any scale: float32 [256]. A book's upper codes do not exist.
CODE_VALUES = {
    "int8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
    "e4m3": _e4m3_values(),
    **{name: np.concatenate([book, np.full(240, np.nan, np.float32)]) for name, book in CODE_BOOKS.items()},
}


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """float32 linspace built from both ends towards the middle, as torch does: the same bits without torch."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count, dtype=np.float64)
    # One rounding per value, as of a fused multiply-add: float64 holds step * index exactly.
    return np.where(index < count // 2, first + step * index, last - step * (count - 1 - index)).astype(np.float32)


def _dynamic_map() -> np.ndarray:
    """bitsandbytes' signed dynamic 8-bit map: 256 ascending float32 values.

    For i = 0…6 the 2**i midpoints of linspace(0.1, 1, 2**i + 1), times 10**(i - 6), with both signs; and 0 and 1.
    (Dettmers, "8-bit Approximations for Parallelism in Deep Learning", 2016.)
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        means = midpoints(_linspace(0.1, 1.0, 2**exponent + 1)) * np.float32(10.0 ** (exponent - 6))
        values += means.tolist() + (-means).tolist()
    return np.sort(np.array(values, dtype=np.float32))


DYNAMIC_MAP = _dynamic_map()
DYNAMIC_BOUNDARIES = midpoints(DYNAMIC_MAP)


def book_steps(book: np.ndarray) -> np.ndarray:
    """float32 like `book`: the larger distance of each value to its neighbours."""
    order = np.argsort(book, kind="stable")
    gaps = np.diff(book[order])
    steps = np.empty_like(book)
    steps[order] = np.maximum(np.append(gaps, 0), np.insert(gaps, 0, 0))
    return steps
