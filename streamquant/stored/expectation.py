"""What error a format has to make: the reference encoded afresh, to nearest, with scales of its own.

A file is judged by that, layer by layer, and not by a constant: INT8 with one scale may be off by 20 % on a layer with
outliers and be perfectly sound.
"""

from __future__ import annotations

import math

import numpy as np

from streamquant.formats.fp8 import SMALLEST_ABSMAX
from streamquant.formats.int8 import SMALLEST_SCALE
from streamquant.kernels import ErrorSums, select
from streamquant.kernels.codebooks import INT8_MAX

from .four_bit import Blocks4bit
from .layouts import Layout, ScaledCodes, largest_value, rotate
from .truth import Truth

SMALLEST_BLOCK = 1e-36  # from which down float32 has too few digits left to speak of an error
NESTED_SLACK = 0.02  # of an absmax in 8 bits, beside what the codes make
ROUNDING_SLACK = 1e-6  # of float32 arithmetic, where a format represents all weights exactly


def nearest_error(layout: Layout, truth: Truth, begin: int, end: int) -> float | None:
    """Relative Frobenius error of elements [begin, end), whole rows, in this layout, codes rounded to nearest.

    None when there is no knowing: a tensor scale where not all weights were seen, rows cut in pieces, weights that are not
    finite.
    """
    reference = truth.values(begin, end)
    if not np.isfinite(reference).all():
        return None
    if isinstance(layout, ScaledCodes):
        return _scaled_error(layout, truth, reference, begin)
    if isinstance(layout, Blocks4bit):
        return _book_error(layout, truth, reference)
    return 0.0 if layout.relative_error is None else layout.relative_error


def _book_error(layout: Blocks4bit, truth: Truth, reference: np.ndarray) -> float:
    sums = ErrorSums()
    largest = float(np.abs(reference).max(initial=0.0))
    if 0 < largest < SMALLEST_BLOCK:
        return 1.0
    # Brought near 1, where squares neither vanish nor overflow; the error of a block does not depend on its size.
    exponent = math.frexp(largest)[1]
    values = np.ldexp(reference, -exponent)
    _backend().bnb4(_load(values), layout.block_size, layout.book_name, sums)
    error = _relative(sums)
    if layout.nested is None:
        return error + ROUNDING_SLACK
    # What 8 bits hold is how far an absmax lies from the mean of all: where weights are smaller than most, a share of that.
    mean_square = float(np.square(values, dtype=np.float64).mean()) * 4.0**exponent
    quiet = math.sqrt(truth.mean_square / mean_square) if mean_square else 1.0
    return error + NESTED_SLACK * max(1.0, 2 * quiet - 1)


def _scaled_error(layout: ScaledCodes, truth: Truth, reference: np.ndarray, begin: int) -> float | None:
    values = rotate(reference, layout.rotation) if layout.rotation else reference
    per_run, run = _run_absmax(layout, truth, values, begin)
    if per_run is None or not np.isfinite(per_run).all():
        return None
    tile, dtype = _load(values), layout.codes.info.dtype
    if dtype == "I8":
        return max(_int8_error(tile, run, per_run, SMALLEST_SCALE[mode], reference.any()) for mode in _int8_modes(layout))
    scale = np.maximum(per_run, SMALLEST_ABSMAX) / np.float32(largest_value(dtype))
    if layout.scale is None:
        scale = np.ones_like(per_run)
    sums = ErrorSums()
    _backend().fp8(tile, run, np.float32(1) / scale, scale, {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}[dtype], sums)
    return _of_sums(sums, reference.any())


def _int8_modes(layout: ScaledCodes) -> list[str]:
    """What INT8 scales may be of: a single one, or those of a single row or column, may be of a block too."""
    if layout.scale is None or layout.scale.info.elements == 1 or (layout.row_block == 1 and 1 in layout.shape):
        return ["row", "block"]
    return ["block"] if layout.row_block > 1 or layout.column_block < layout.columns else ["row"]


def _int8_error(tile, run: int, per_run: np.ndarray, smallest: np.float32, has_weights: bool) -> float:
    sums = ErrorSums()
    _backend().int8(tile, run, np.maximum(per_run / np.float32(INT8_MAX), smallest), sums)
    return _of_sums(sums, has_weights)


def _of_sums(sums: ErrorSums, has_weights: bool) -> float:
    """The error; 1 for weights too small to be squared, and far below the smallest code."""
    return 1.0 if not sums.weight and has_weights else _relative(sums) + ROUNDING_SLACK


def _run_absmax(layout: ScaledCodes, truth: Truth, values: np.ndarray, begin: int) -> tuple[np.ndarray | None, int]:
    """The magnitude that each run of contiguous values shares its scale for (float32 [runs]), and the length of a run.

    values: as they are encoded, from element `begin` on.
    """
    if layout.scale is None:
        return np.ones(1, dtype=np.float32), values.size
    columns, width = layout.columns, layout.column_block
    if layout.scale.info.elements == 1:
        if truth.absmax is None:
            return None, 0
        largest = truth.rotated_absmax(layout.rotation) if layout.rotation else truth.absmax
        return np.array([largest], dtype=np.float32), values.size
    if values.size % columns or columns % width:
        return None, 0
    if layout.row_block == 1:
        return np.abs(values).reshape(-1, width).max(axis=1), width
    first_row = begin // columns
    return truth.block_absmax(layout, first_row, first_row + values.size // columns).reshape(-1), width


def _backend():
    return select("cpu")


def _load(values: np.ndarray):
    return _backend().load(memoryview(np.ascontiguousarray(values)).cast("B"), "F32")


def _relative(sums: ErrorSums) -> float:
    return math.sqrt(sums.error / sums.weight) if sums.weight else 0.0
