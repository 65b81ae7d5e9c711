"""What a refinement gives back, and the number grids it works on."""

from __future__ import annotations

from typing import Any, NamedTuple

# INT8 with codes -127…127, FP8 E4M3, and the two code books of bitsandbytes.
GRIDS = ("int8", "e4m3", "nf4", "fp4")


class Refined(NamedTuple):
    """codes [rows, N]: int8 for the INT8 grid, else uint8 (E4M3 bytes, or the book's 4-bit codes unpacked).

    before, after [rows] float64: each row's output error e H eᵀ when rounded to nearest, and as it is now. Without the
    guard `before` is NaN.
    """

    codes: Any
    before: Any
    after: Any
