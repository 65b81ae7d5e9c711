"""Whether one layer is what its source should have become: judged by what was summed over it and by what its format can do."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np

from streamquant.pairing import Pair, Pairing
from streamquant.stored import Contents, Layout, Plain, Read, tiles
from streamquant.stored.diagnosis import Case, codes_are_right, diagnose, diagnose_damage
from streamquant.stored.difference import Difference, compare
from streamquant.stored.expectation import nearest_error
from streamquant.stored.four_bit import Blocks4bit
from streamquant.stored.truth import Truth
from streamquant.verdict import LayerCheck

# Times the error of rounding to nearest, from which a layer is a suspect. Learned rounding raises the error of the weights
# (it lowers that of the layer's outputs): by a third where it knows the inputs, by three quarters with --objective svd.
OUT_OF_LINE = 2.5
# The number that brings a sound layer nearest to its source is 1, but for a part of its error (weights that repeat a few
# values are all rounded the same way; few weights cancel badly) and a share of the squared error.
FACTOR_TOLERANCE, FACTOR_BIAS, FACTOR_NOISE, FACTOR_SHARE = 0.002, 0.35, 3.0, 3.0
AS_NEAREST = 1.02  # times the error of rounding to nearest: no scale is wrong, though few values may all be rounded one way
SMALLEST_NORMAL = 2.0**-126  # weights below count as zeros: no scale reaches them
# A relative error that needs an explanation where there is nothing to compare it with: one scale for heavy tails costs half of
# a layer and more.
ALWAYS_SUSPECT = 0.9
DECODED_ERROR = 0.01  # of what was decoded back: one more rounding
EXAMINED = 4  # ranges whose beginning is encoded afresh for comparison, beside the worst, which is so as a whole
ENOUGH = 1 << 16  # elements of such a beginning
# Rounding to nearest puts no element far off its source, learned rounding puts some in nearly every span: few elements, or
# elements in few spans, were changed afterwards.
FEW_ELEMENTS, FEW_SPANS = 2000, 50  # one of so many
LOOSE_SHARE = 4  # times the far elements are there to be just beyond a half step, from which rounding was learned
LEARNED = 0.7  # a relative error that a layer may have which is, to the bit, what learned rounding wrote

T = TypeVar("T")


@dataclass
class PairSum:
    """What one pair has come to. shares: the relative error of each range that was looked at. unequal: bytes or values."""

    difference: Difference = field(default_factory=Difference)
    shares: array[float] = field(default_factory=lambda: array("d"))
    unequal: int = 0

    def add(self, other: PairSum) -> None:
        """Take in what comes behind."""
        self.difference.add(other.difference)
        self.shares.extend(other.shares)
        self.unequal += other.unequal


@dataclass(frozen=True)
class Judge:
    """Judges layers. sample: the share of each that was summed. intact: tensors whose hash agrees with the manifest."""

    pairing: Pairing
    output: Contents
    read_source: Read
    read_output: Read
    sample: float
    intact: set[str]

    @cached_property
    def is_learned(self) -> bool:
        """Whether the recipe on record rounds with knowledge of inputs, or for the largest singular directions."""
        said = [entry.recipe.get("learned") for entry in self.output.provenance if entry]
        return any(
            learned.get("calibration_xxh3_64") or learned.get("structure") or learned.get("objective") == "svd"
            for learned in said
            if isinstance(learned, dict)
        )

    def layer(self, pair: Pair, found: PairSum) -> LayerCheck:
        """The check of one pair of weights, with the cause of what is wrong."""
        difference, layer = found.difference, pair.layer
        faults = list(layer.faults) if layer else []
        absmax = difference.absmax if self.sample >= 1 else None
        truth = Truth(pair.reference, self.read_source, absmax, difference.weight / max(difference.elements, 1))
        expected, measured = self._examine(pair, found, truth)
        if truth.absmax is None and is_suspect(difference, expected, measured):
            truth = truth.seen_whole()
            expected, measured = self._examine(pair, found, truth)
        if not faults and difference.elements and not self._is_as_written(pair, measured, difference):
            if is_suspect(difference, expected, measured):
                faults = [diagnose(self._case(pair, truth, [place for place, _ in self._examined(pair, found)]))]
            elif is_damaged(pair.layout, difference):
                steps = difference.steps
                first = steps.wild_at if steps.wild_spans else steps.far_at
                case = self._case(pair, truth, [_rows_around(pair.layout, first)])
                # A small absmax among large ones is itself rounded, by more than its codes' steps: only codes count then.
                if not (_is_nested(pair.layout) and codes_are_right(case)):
                    faults = [diagnose_damage(case, steps)]
        return LayerCheck(
            pair.key,
            layer.format if layer else pair.output[0].info.dtype,
            layer.detail if layer else f"decoded from {pair.decoded_from}" if pair.decoded_from else "decoded",
            pair.reference.shape,
            pair.source_bytes,
            pair.output_bytes,
            difference.relative_error,
            difference.signal_to_noise,
            difference.cosine,
            difference.largest,
            difference.largest_at,
            difference.saturated_share,
            expected,
            "; ".join(faults) or None,
        )

    def _is_as_written(self, pair: Pair, measured: float, difference: Difference) -> bool:
        """Whether learned rounding made this layer and it has kept every bit: then its weights may be far from nearest."""
        if difference.nonfinite or pair.layer is None or measured > LEARNED:
            return False
        names = [tensor.name for tensor in pair.layer.tensors.values()]
        return self.is_learned and all(name in self.intact for name in names)

    def _examine(self, pair: Pair, found: PairSum, truth: Truth) -> tuple[float | None, float]:
        """(error of rounding to nearest, error as it is), over a few ranges and the worst; the pair of the worst ratio."""
        if pair.decoded_from is not None:  # the error is that of a format whose scales are gone
            return None, found.difference.relative_error
        if isinstance(pair.layout, Plain):
            return DECODED_ERROR, found.difference.relative_error
        worst: tuple[float | None, float] = (None, found.difference.relative_error)
        ratio = -1.0
        largest = max(found.shares, default=0.0)
        for (begin, end), actual in self._examined(pair, found):
            if actual < largest and (shorter := _beginning(pair.layout, begin, end)) < end:
                end = shorter
                part = compare(pair.layout, self.read_output, pair.reference, self.read_source, begin, end)
                actual = math.inf if part.nonfinite else part.relative_error
            expected = nearest_error(pair.layout, truth, begin, end)
            if expected is None:
                continue
            now = actual / expected if expected else (math.inf if actual else 0.0)
            if now > ratio:
                ratio, worst = now, (expected, actual)
        return worst

    def _examined(self, pair: Pair, found: PairSum) -> list[tuple[tuple[int, int], float]]:
        """A few of the ranges that were looked at, from all over the layer, and the worst one; each with its error."""
        looked_at = list(zip(ranges_of(pair.layout, self.sample), found.shares, strict=True))
        chosen = set(spread(range(len(looked_at)), 0.0, EXAMINED))
        if looked_at:
            chosen.add(int(np.argmax(found.shares)))
        return [looked_at[number] for number in sorted(chosen)]

    def _case(self, pair: Pair, truth: Truth, ranges: list[tuple[int, int]]) -> Case:
        def others() -> Iterator[tuple[str, Layout, Layout | None]]:
            for other in self.pairing.pairs:
                if other.key != pair.key and other.reference is not None and other.reference.shape == pair.reference.shape:
                    yield other.key, other.reference, other.layout

        return Case(pair.layout, truth, self.read_output, tuple(ranges), others)


def is_suspect(difference: Difference, expected: float | None, measured: float) -> bool:
    """Whether a layer as a whole is further from its source than its format explains."""
    if difference.nonfinite:
        return True
    if max(difference.absmax, difference.largest) < SMALLEST_NORMAL:
        return False
    if expected is None:
        return measured > ALWAYS_SUSPECT
    if measured > OUT_OF_LINE * expected:
        return True
    if measured <= AS_NEAREST * expected:
        return False
    off = abs(difference.factor - 1) if difference.factor is not None and difference.weight else 0.0
    allowed = max(FACTOR_BIAS, FACTOR_NOISE / math.sqrt(difference.elements)) * expected
    return off > FACTOR_TOLERANCE + allowed + FACTOR_SHARE * max(expected, measured) ** 2


def is_damaged(layout: Layout, difference: Difference) -> bool:
    """Whether a layer that is right as a whole holds elements that no rounding makes."""
    steps = difference.steps
    if steps is None or not steps.far:
        return False
    if steps.wild_spans and 2 * steps.wild_spans <= steps.spans:
        return True
    if _is_nested(layout):
        return False
    few = difference.elements // FEW_ELEMENTS
    if LOOSE_SHARE * steps.far < steps.loose:
        return False  # many lie just beyond a half step: they were rounded with others in mind
    if steps.far <= max(2, few) or FEW_SPANS * steps.far_spans <= steps.spans:
        return True
    return 0 < steps.farthest <= few and steps.farther == steps.farthest


def _is_nested(layout: Layout) -> bool:
    return isinstance(layout, Blocks4bit) and layout.nested is not None


def _beginning(layout: Layout, begin: int, end: int) -> int:
    """Where the first whole rows of a range end that are enough to be encoded afresh."""
    rows = max(ENOUGH // layout.columns, 1)
    return min(begin + rows * layout.columns, end)


def _rows_around(layout: Layout, index: int) -> tuple[int, int]:
    """The row of an element, or the piece of it that a tile is."""
    row = index // layout.columns * layout.columns
    begin, end = next(piece for piece in tiles((1, layout.columns)) if row + piece[1] > index)
    return row + begin, row + end


def ranges_of(layout: Layout, sample: float) -> list[tuple[int, int]]:
    """The ranges of a layer's elements that are looked at."""
    ranges = list(tiles(layout.shape))
    return ranges if sample >= 1 else spread(ranges, sample)


def spread(values: Sequence[T], share: float, at_least: int = 1) -> list[T]:
    """About that share of the values, evenly spread."""
    count = min(max(math.ceil(share * len(values)), at_least), len(values))
    if count == len(values):
        return list(values)
    return [values[index] for index in np.linspace(0, len(values) - 1, count).round().astype(int)]
