"""Why a layer decodes to something else than its source: the ways in which files go wrong, tried one by one.

Each hypothesis is a reading of the same bytes (other nibbles, no rotation, the reciprocal scale) or of the source (another
layer, transposed). The one whose error is what the format should have is the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from streamquant.checkpoint.header import printable

from .difference import Difference, measure
from .expectation import nearest_error
from .four_bit import Blocks4bit
from .layouts import Layout, Read, ScaledCodes

FITS = 2.5  # times the error of rounding to nearest: a hypothesis as good as this is the cause
FITS_AT_LEAST = 0.02  # so small an error fits any format here
SAME_DIRECTION = 0.9  # cosine from which two weights are the same but for their scales
FACTOR_TOLERANCE = 0.02
TRANSPOSED_ROWS = 8
CLIPPED = 0.02  # a share of saturated codes that no scale made from the largest magnitude gives


@dataclass(frozen=True)
class Case:
    """A suspect layer. ranges: where to look, whole tiles. others: (name, layout) of source weights of the same shape."""

    layout: Layout
    reference: Layout
    read: Read
    read_reference: Read
    ranges: tuple[tuple[int, int], ...]
    absmax: float | None
    others: Callable[[], Iterable[tuple[str, Layout]]]

    def decoded(self, layout: Layout) -> list[np.ndarray]:
        return [layout.decode(self.read, begin, end).values for begin, end in self.ranges]

    def references(self, layout: Layout) -> list[np.ndarray]:
        return [layout.decode(self.read_reference, begin, end).values for begin, end in self.ranges]


def diagnose(case: Case) -> str:
    """The cause, as a clause without a subject (\"its scale is stored as the reciprocal\")."""
    references = case.references(case.reference)
    decoded = case.decoded(case.layout)
    total = _total(decoded, references)
    if total.nonfinite:
        return _nonfinite(total, decoded)
    if not total.decoded_energy and total.weight:
        return "it decodes to nothing but zeros"
    if _one_code(case.layout, decoded) and total.weight:
        return "all its codes are the same"
    for text, reading in case.layout.misreadings():
        if _fits(_total(case.decoded(reading), references), reading, references, case.absmax):
            return text
    for cause in (_wrong_scale, _transposed, _other_layer, _clipped, _partly):
        if text := cause(case, decoded, references):
            return text
    if total.cosine > SAME_DIRECTION:
        return "it resembles its source, but not as closely as its format allows"
    return "it does not resemble its source, and nothing tried explains how"


def _total(decoded: list[np.ndarray], references: list[np.ndarray]) -> Difference:
    total = Difference()
    with np.errstate(over="ignore", invalid="ignore"):
        for values, reference in zip(decoded, references, strict=True):
            total.add(measure(values, reference))
    return total


def _fits(total: Difference, layout: Layout, references: list[np.ndarray], absmax: float | None) -> bool:
    """Whether a reading's error is what its format makes."""
    if total.nonfinite or not total.weight:
        return False
    expected = [nearest_error(layout, reference, absmax) for reference in references]
    known = [error for error in expected if error is not None]
    return total.relative_error <= max(FITS * max(known, default=0.0), FITS_AT_LEAST) and total.relative_error < 0.7


def _nonfinite(total: Difference, decoded: list[np.ndarray]) -> str:
    share = total.nonfinite / max(sum(values.size for values in decoded), 1)
    return f"{share:.2%} of it decodes to NaN or infinity where its source is finite"


def _wrong_scale(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    """Fit one factor to everything that shares a scale: if that mends the layer, its scales were wrong."""
    run = _scale_run(case.layout)
    factors, energies, error, weight = [], [], 0.0, 0.0
    for values, reference in zip(decoded, references, strict=True):
        length = run if run and values.size % run == 0 else values.size
        d, w = (part.reshape(-1, length).astype(np.float64) for part in (values, reference))
        dd, ww, dw = (d * d).sum(axis=1), (w * w).sum(axis=1), (d * w).sum(axis=1)
        factor = np.divide(dw, dd, out=np.zeros_like(dw), where=dd > 0)
        factors.append(factor)
        energies.append(ww)
        error += float((ww - factor * dw).sum())
        weight += float(ww.sum())
    if not weight or (max(error, 0.0) / weight) ** 0.5 > _scale_limit(case, references):
        return None
    every, energy = np.concatenate(factors), np.concatenate(energies)
    every = every[energy > 0]
    together = run or min(values.size for values in decoded)
    wrong = np.abs(every - 1) > max(FACTOR_TOLERANCE, 3 * _scale_limit(case, references) / np.sqrt(together))
    if not wrong.any():
        return None
    middle = float(np.median(every))
    if np.all(np.abs(every - middle) <= 0.2 * abs(middle)):
        words = "too small" if middle > 1 else "too large"
        size = middle if middle > 1 else 1 / middle if middle else np.inf
        return f"its scale is wrong: all of it decodes {size:.3g} times {words}" if middle > 0 else "its signs are inverted"
    worst = every[np.abs(np.log(np.maximum(np.abs(every), 1e-30))).argmax()]
    return (
        f"its scales are wrong: {np.count_nonzero(wrong):,} of the {every.size:,} looked at, the worst by a factor of "
        f"{1 / worst if worst else np.inf:.3g}"
    )


def _one_code(layout: Layout, decoded: list[np.ndarray]) -> bool:
    run = _scale_run(layout)
    return all(np.ptp(values.reshape(-1, run if run and values.size % run == 0 else values.size), axis=1).max() == 0
               for values in decoded)  # fmt: skip


def _scale_run(layout: Layout) -> int:
    """Contiguous elements that share a scale; 0 for all of them."""
    if isinstance(layout, ScaledCodes):
        is_tensor = layout.scale is None or layout.scale.info.elements == 1
        return 0 if is_tensor or layout.rotation > layout.column_block else layout.column_block
    if isinstance(layout, Blocks4bit):
        return layout.block_size
    return getattr(layout, "group", 0) or layout.columns


def _scale_limit(case: Case, references: list[np.ndarray]) -> float:
    expected = [nearest_error(case.layout, reference, case.absmax) for reference in references]
    return max(FITS * max((error for error in expected if error is not None), default=0.05), FITS_AT_LEAST)


def _transposed(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    """Compare the first rows with the source's first columns."""
    shape = case.layout.shape
    if len(shape) != 2 or shape[0] != shape[1]:
        return None
    size = shape[0]
    rows = min(TRANSPOSED_ROWS, size)
    first = case.layout.decode(case.read, 0, rows * size).values.reshape(rows, size)
    columns = np.empty((size, rows), dtype=np.float32)
    step = max((1 << 18) // size, 1)
    for begin in range(0, size, step):
        end = min(begin + step, size)
        values = case.reference.decode(case.read_reference, begin * size, end * size).values
        columns[begin:end] = values.reshape(-1, size)[:, :rows]
    found = measure(np.ascontiguousarray(first).reshape(-1), np.ascontiguousarray(columns.T).reshape(-1))
    return "it is stored transposed" if found.cosine > SAME_DIRECTION else None


def _other_layer(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    """Look for a source weight of the same shape that these bytes come from."""
    begin, end = case.ranges[0]
    for name, layout in case.others():
        reference = layout.decode(case.read_reference, begin, end).values
        if measure(decoded[0], reference).cosine > SAME_DIRECTION:
            return f"it holds the weights of {printable(name)}"
    return None


def _clipped(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    """Whether a scale was too small when the codes were made: they pile up at the ends of their grid."""
    if not isinstance(case.layout, ScaledCodes):
        return None
    tiles = [case.layout.decode(case.read, begin, end) for begin, end in case.ranges]
    share = sum(tile.saturated for tile in tiles) / max(sum(tile.values.size for tile in tiles), 1)
    return f"{share:.1%} of its codes are at an end of their grid: its weights were clipped" if share > CLIPPED else None


def _partly(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    """Whether some of the ranges looked at are as they should be: then the others are damaged, and where is known."""
    bad = []
    for index, (values, reference) in enumerate(zip(decoded, references, strict=True)):
        if not _fits(_total([values], [reference]), case.layout, [reference], case.absmax):
            bad.append(index)
    if not 0 < len(bad) < len(decoded):
        return None
    begin, end = case.ranges[bad[0]]
    columns = case.layout.columns
    what = "holds nothing but zeros" if not decoded[bad[0]].any() else "does not resemble its source"
    rows = f"{begin // columns:,} to {(end - 1) // columns:,}"
    return f"part of it is damaged: what lies from row {rows} {what}, other parts are right"
