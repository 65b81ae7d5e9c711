"""What error a format has to make: the reference encoded afresh, to nearest, with scales of its own.

A file is judged by that, layer by layer, and not by a constant: INT8 with one scale may be off by 20 % on a layer with
outliers and be perfectly sound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from streamquant.formats.fp8 import SMALLEST_ABSMAX
from streamquant.formats.int8 import SMALLEST_SCALE
from streamquant.kernels import ErrorSums, select
from streamquant.kernels.codebooks import INT8_MAX

from .four_bit import Blocks4bit
from .layouts import Layout, Read, ScaledCodes, largest_value, rotate, tiles

SMALLEST_BLOCK = 1e-36  # from which down float32 has too few digits left to speak of an error
NESTED_SLACK = 0.02  # of an absmax in 8 bits, beside what the codes make
ROUNDING_SLACK = 1e-6  # of float32 arithmetic, where a format represents all weights exactly


@dataclass(frozen=True)
class Truth:
    """The weights that a layer was made from. absmax: the largest magnitude of all of them, None where not all were seen."""

    layout: Layout
    read: Read
    absmax: float | None
    _rotated: dict[int, float] = field(default_factory=dict)

    def values(self, begin: int, end: int) -> np.ndarray:
        """Elements [begin, end): float32, whole rows or a part of one."""
        return self.layout.decode(self.read, begin, end).values

    def seen_whole(self) -> Truth:
        """The same, after a look at all of them."""
        backend = _backend()
        absmax = 0.0
        for begin, end in tiles(self.layout.shape):
            tile = backend.without_nonfinite(self.layout.tile(self.read, begin, end))
            absmax = max(absmax, float(backend.absmax(tile, end - begin)[0]))
        return replace(self, absmax=absmax)

    def rotated_absmax(self, group: int) -> float:
        """The largest magnitude after a rotation of groups, which spreads outliers: of every weight."""
        if group not in self._rotated:
            ranges = tiles(self.layout.shape)
            self._rotated[group] = max(float(np.abs(rotate(self.values(*part), group)).max()) for part in ranges)
        return self._rotated[group]

    def block_absmax(self, scaled: ScaledCodes, first_row: int, end_row: int) -> np.ndarray:
        """The largest magnitudes of whole blocks, also of what lies outside the rows: float32 [rows, columns / width]."""
        columns, width, edge = scaled.columns, scaled.column_block, scaled.row_block
        all_rows = math.prod(scaled.shape[:-1])
        blocks = range(first_row // edge, (end_row - 1) // edge + 1)
        found = np.zeros((len(blocks), columns // width), dtype=np.float32)
        for absmax, block in zip(found, blocks, strict=True):
            rows = min((block + 1) * edge, all_rows) - block * edge
            for begin, end in tiles((rows, columns)):
                values = self.values(block * edge * columns + begin, block * edge * columns + end)
                values = rotate(values, scaled.rotation) if scaled.rotation else values
                peaks = _backend().absmax(_load(values), width).reshape(-1, columns // width)
                np.maximum(absmax, peaks.max(axis=0), out=absmax)
        return found[np.arange(first_row, end_row) // edge - blocks.start]


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
        sums = ErrorSums()
        largest = float(np.abs(reference).max(initial=0.0))
        if 0 < largest < SMALLEST_BLOCK:
            return 1.0
        # Brought near 1, where squares neither vanish nor overflow; the error of a block does not depend on its size.
        reference = np.ldexp(reference, -math.frexp(largest)[1])
        _backend().bnb4(_load(reference), layout.block_size, layout.book_name, sums)
        return _relative(sums) + (NESTED_SLACK if layout.nested else ROUNDING_SLACK)
    return 0.0 if layout.relative_error is None else layout.relative_error


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
