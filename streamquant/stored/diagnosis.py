"""Why a layer decodes to something else than its source: the ways in which files go wrong, tried one by one.

Each hypothesis is another reading of the same bytes (`misreadings`) or of the source (another layer, other rows). The one
whose error is what the format should have is the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from streamquant.checkpoint.header import printable
from streamquant.kernels import Steps
from streamquant.kernels.sums import SPAN

from .difference import Difference, compare, measure
from .expectation import nearest_error
from .four_bit import Blocks4bit
from .layouts import Layout, Read, ScaledCodes, rotate
from .misreadings import misreadings, same_scales, with_scales_of
from .reordered import reordered
from .truth import Truth

FITS = 2.5  # times the error of rounding to nearest: a hypothesis as good as this is the cause
FITS_EXACTLY = 1.15  # the same, of a hypothesis beside which there are many that are nearly as good
FITS_AT_LEAST = 0.02  # so small an error fits any format here
SAME = 0.95  # cosine, a factor for each scale allowed, from which two weights are the same
FACTOR_TOLERANCE = 0.02
CLIPPED = 0.02  # a share of saturated codes that no scale made from the largest magnitude gives
MOST_OTHERS = 512  # layers of the same shape that are looked at
MENDED = 0.25  # of the squared error, or less, is left by a reading that is right
FEW = 8  # elements that are named as such, and not as a damaged part
LOOSE = "it resembles its source, but not as closely as its format allows"


@dataclass(frozen=True)
class Case:
    """A suspect layer. ranges: where to look, whole tiles. others: (name, layout in the source, layout in the output or None)
    of weights of the same shape.
    """

    layout: Layout
    truth: Truth
    read: Read
    ranges: tuple[tuple[int, int], ...]
    others: Callable[[], Iterable[tuple[str, Layout, Layout | None]]]

    def decoded(self) -> list[np.ndarray]:
        return [self.layout.decode(self.read, begin, end).values for begin, end in self.ranges]

    def references(self) -> list[np.ndarray]:
        return [self.truth.values(begin, end) for begin, end in self.ranges]

    def nearest_errors(self, layout: Layout) -> list[float]:
        """What rounding to nearest makes of each range in this layout, where that can be known."""
        found = [nearest_error(layout, self.truth, begin, end) for begin, end in self.ranges]
        return [error for error in found if error is not None]

    def difference(self, layout: Layout, read: Read) -> Difference:
        """Of another reading of the layer."""
        total = Difference()
        with np.errstate(over="ignore", invalid="ignore"):
            for begin, end in self.ranges:
                total.add(compare(layout, read, self.truth.layout, self.truth.read, begin, end))
        return total


def diagnose(case: Case) -> str:
    """The cause, as a clause without a subject (\"its scale is stored as the reciprocal\")."""
    with np.errstate(over="ignore", invalid="ignore"):
        references, decoded = case.references(), case.decoded()
    total = case.difference(case.layout, case.read)
    if not total.nonfinite and total.weight:
        if not total.decoded_energy:
            return "it decodes to nothing but zeros"
        if _one_code(case.layout, decoded):
            return "all its codes are the same"
    for text, layout, read in misreadings(case.layout, case.read):
        found = case.difference(layout, read)
        mends = total.nonfinite or found.error < MENDED * total.error
        if mends and _fits(case, found, layout):
            return text
    if total.nonfinite:
        return _nonfinite(case, decoded, references)
    for cause in (_signs_lost, _scales_of_another, _wrong_scale, _other_layer, _reordered, _partly, _clipped):
        if text := cause(case, decoded, references):
            return text
    if total.cosine > 0.9:
        return LOOSE
    return "it does not resemble its source, and nothing tried explains how"


def diagnose_damage(case: Case, steps: Steps) -> str:
    """What is said of a layer that is right but for a few places. case.ranges: the rows of the first of them."""
    references, decoded = case.references(), case.decoded()
    if text := _wrong_scale(case, decoded, references) or _partly(case, decoded, references):
        return text
    if steps.wild_spans and steps.far > FEW:
        begin = steps.wild_at // case.layout.columns
        what = "hold nothing but zeros" if not any(values.any() for values in decoded) else "do not resemble their source"
        runs = f"{steps.wild_spans:,} of its {steps.spans:,} runs of {SPAN:,} elements"
        return f"part of it is damaged: {runs} {what}, the first from row {begin:,} on"
    first = place(case.layout.shape, steps.far_at)
    if steps.far == 1:
        return f"one of its elements, at {first}, lies further from its source than rounding puts it: it was changed"
    return (
        f"{steps.far:,} of its elements, the first at {first}, lie further from their source than rounding puts them: they "
        f"were changed"
    )


def codes_are_right(case: Case) -> bool:
    """Whether the codes are those of the source, whatever their scales."""
    every, error, weight = _factors(case, case.decoded(), case.references())
    there = every != 0
    return not there.any() or float(1 - error[there].sum() / weight[there].sum()) ** 0.5 > SAME


def _fits(case: Case, total: Difference, layout: Layout, times: float = FITS) -> bool:
    """Whether a reading's error is what its format makes, or as many times that."""
    if total.nonfinite or not total.weight or total.relative_error >= 0.7:
        return False
    if total.relative_error <= FITS_AT_LEAST:
        return True
    return total.relative_error <= times * max(case.nearest_errors(layout), default=0.0)


def _nonfinite(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str:
    bad, first = 0, None
    for (begin, _), values, reference in zip(case.ranges, decoded, references, strict=True):
        found = np.flatnonzero(~np.isfinite(values) & np.isfinite(reference))
        bad += found.size
        if found.size and first is None:
            first = begin + int(found[0])
    looked = sum(values.size for values in decoded)
    return (
        f"{bad:,} of the {looked:,} elements looked at decode to NaN or infinity where the source is finite, the first at "
        f"{place(case.layout.shape, first)}"
    )


def place(shape: tuple[int, ...], index: int) -> str:
    """A flat index as people write it: [3, 17]."""
    return str([int(part) for part in np.unravel_index(index, shape or (1,))])


def _signs_lost(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    layout = case.layout
    group = layout.rotation if isinstance(layout, ScaledCodes) else 0
    if group:
        layout = replace(layout, rotation=0)
        decoded = [layout.decode(case.read, begin, end).values for begin, end in case.ranges]
        references = [rotate(reference, group) for reference in references]
    total = Difference()
    for values, reference in zip(decoded, references, strict=True):
        if (values < 0).any():
            return None
        total.add(measure(values, np.abs(reference)))
    return "the signs of its weights are lost" if total.cosine > SAME else None


def _scales_of_another(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    for name, _, other in islice(case.others(), MOST_OTHERS):
        if other is None or type(other) is not type(case.layout):
            continue
        if same_scales(case.layout, other, case.read):
            if _likeness(case, decoded, references) > SAME:
                return f"its scales are those of {printable(name)}"
            continue
        reading = with_scales_of(case.layout, other, case.read)
        if reading and _fits(case, case.difference(*reading[1:]), case.layout, FITS_EXACTLY):
            return f"its scales are those that {printable(name)} should have"
    return None


def _factors(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For everything that shares a scale and is not all zeros in the source: the number that mends it, what is left of the
    squared error then, and the squared weight.
    """
    run = _scale_run(case.layout)
    parts = []
    for values, reference in zip(decoded, references, strict=True):
        length = run if run and values.size % run == 0 else values.size
        d, w = (part.reshape(-1, length) for part in (values, reference))
        dd, ww, dw = (np.einsum("ij,ij->i", a, b, dtype=np.float64) for a, b in ((d, d), (w, w), (d, w)))
        factor = np.divide(dw, dd, out=np.zeros_like(dw), where=dd > 0)
        parts.append(np.stack([factor, np.maximum(ww - factor * dw, 0), ww])[:, ww > 0])
    return tuple(np.concatenate(parts, axis=1))


def _likeness(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> float:
    """Cosine with the source after a factor for everything that shares a scale."""
    _, error, weight = _factors(case, decoded, references)
    return float(max(1 - error.sum() / weight.sum(), 0.0)) ** 0.5 if weight.size else 0.0


def _wrong_scale(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    """Fit one factor to everything that shares a scale: if that mends the layer, its scales were wrong."""
    every, error, weight = _factors(case, decoded, references)
    limit = _scale_limit(case)
    if not every.size:
        return None
    together = _scale_run(case.layout) or min(values.size for values in decoded)
    wrong = np.abs(every - 1) > max(FACTOR_TOLERANCE if every.size > len(decoded) else 0.0, 3 * limit / np.sqrt(together))
    of_these = wrong if wrong.any() else slice(None)
    if (error[of_these].sum() / weight[of_these].sum()) ** 0.5 > limit:
        return None
    middle = float(np.median(every))
    if not wrong.any() and abs(middle - 1) <= max(3 * limit / sum(values.size for values in decoded) ** 0.5, 1e-4):
        return None
    if np.all(np.abs(every - middle) <= 0.2 * abs(middle)):
        words = "too small" if middle > 1 else "too large"
        size = middle if middle > 1 else 1 / middle if middle else np.inf
        if middle <= 0:
            return "its signs are inverted"
        return f"its scale is wrong: all of it decodes {size:.{3 if size > 1.02 else 5}g} times {words}"
    if text := _wrong_offset(case, every):
        return text
    if not wrong.any():
        return None
    worst = every[wrong][np.abs(np.log(np.maximum(np.abs(every[wrong]), 1e-30))).argmax()]
    return (
        f"its scales are wrong: {np.count_nonzero(wrong):,} of the {every.size:,} looked at, the worst by a factor of "
        f"{1 / worst if worst else np.inf:.3g}"
    )


def _wrong_offset(case: Case, factors: np.ndarray) -> str | None:
    """Whether all scales of a nested layer are off by the same number: then that is its offset."""
    layout = case.layout
    if not isinstance(layout, Blocks4bit) or layout.nested is None:
        return None
    size = layout.block_size
    scales = np.concatenate([layout.block_scales(case.read, begin // size, -(-end // size)) for begin, end in case.ranges])
    if scales.size != factors.size:
        return None
    missing = scales.astype(np.float64) * (factors - 1)
    middle = float(np.median(missing))
    if np.median(np.abs(missing - middle)) > 0.2 * abs(middle):
        return None
    offset = layout.nested.offset
    return f"its nested_offset is wrong: it says {offset:.4g} where about {offset + middle:.4g} would be right"


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


def _scale_limit(case: Case) -> float:
    return max(FITS * max(case.nearest_errors(case.layout), default=0.05), FITS_AT_LEAST)


def _other_layer(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    """Look for a source weight of the same shape that these bytes come from, whatever their scales."""
    begin, end = case.ranges[0]
    for name, layout, _ in islice(case.others(), MOST_OTHERS):
        reference = layout.decode(case.truth.read, begin, end).values
        if _likeness(case, decoded[:1], [reference]) > SAME:
            whole = measure(decoded[0], reference).cosine > SAME
            return f"it holds the {'weights' if whole else 'codes, but not the scales,'} of {printable(name)}"
    return None


def _reordered(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    return reordered(case.layout, case.truth.layout, case.read, case.truth.read)


def _clipped(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    """Whether a scale was too small when the codes were made: they pile up at the ends of their grid."""
    if not isinstance(case.layout, ScaledCodes):
        return None
    tiles = [case.layout.decode(case.read, begin, end) for begin, end in case.ranges]
    share = sum(tile.saturated for tile in tiles) / max(sum(tile.values.size for tile in tiles), 1)
    return f"{share:.1%} of its codes are at an end of their grid: its weights were clipped" if share > CLIPPED else None


def _partly(case: Case, decoded: list[np.ndarray], references: list[np.ndarray]) -> str | None:
    """Whether most rows are as they should be: then the others are damaged, and where is known."""
    columns = case.layout.columns
    limit = _scale_limit(case)
    bad, good, zeros = [], 0, True
    for (begin, _), values, reference in zip(case.ranges, decoded, references, strict=True):
        width = columns if values.size % columns == 0 else values.size
        d, w = values.reshape(-1, width), reference.reshape(-1, width)
        error, weight = ((part * part).sum(axis=1, dtype=np.float64) for part in (d - w, w))
        wrong = error > np.square(2 * limit) * weight
        good += int(np.count_nonzero(~wrong & (weight > 0)))
        bad += [begin // columns + int(row) for row in np.flatnonzero(wrong)]
        zeros &= not d[wrong].any()
    if not bad or good < len(bad):
        return None
    total = good + len(bad)
    if len(bad) == 1:
        what = "holds nothing but zeros" if zeros else "does not resemble its source"
        return f"part of it is damaged: row {bad[0]:,} {what}, the other rows looked at are right"
    what = "hold nothing but zeros" if zeros else "do not resemble their source"
    return f"part of it is damaged: {len(bad):,} of the {total:,} rows looked at, {bad[0]:,} to {bad[-1]:,}, {what}"
