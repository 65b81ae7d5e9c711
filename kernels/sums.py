"""What is added up beside the work: errors of encoding, differences of what was decoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ErrorSums:
    """Squared error and squared weight of what was encoded, in float64: their ratio's root is the relative error."""

    error: float = 0.0
    weight: float = 0.0

    def add(self, error: float, weight: float) -> None:
        self.error += error
        self.weight += weight


# How an element's error is told from rounding, in steps: a step is the distance between the neighbours of its code, half of
# which is the most that rounding to nearest makes. FAR leaves room for weights that were cast before they were rounded.
# LOOSE is just beyond it: nearest has none, learned rounding many.
FAR, FARTHER, FARTHEST, LOOSE = 0.8, 4.0, 16.0, 0.55
SPAN = 1024  # elements that are judged together
WILD = 25.0 / 12.0  # mean squared error of a span, in squared steps, that no rounding makes: 25 times that of nearest


@dataclass
class Steps:
    """Errors in steps of their codes' grid. A weight beyond the last code, which is clipped, has none.

    far, farther, farthest, loose: elements off by more than FAR, FARTHER, FARTHEST, LOOSE steps, the first far one at far_at.
    spans: of SPAN elements; far_spans: with a far element; wild_spans: whose mean squared error is more than WILD squared
    steps, the first from wild_at on. -1 stands for none.
    """

    far: int = 0
    farther: int = 0
    farthest: int = 0
    spans: int = 0
    far_spans: int = 0
    wild_spans: int = 0
    far_at: int = -1
    wild_at: int = -1
    loose: int = 0

    def add(self, other: Steps, begin: int = 0) -> None:
        """Take in another range, which starts at element `begin`."""
        for name in ("far", "farther", "farthest", "spans", "far_spans", "wild_spans", "loose"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("far_at", "wild_at"):
            found, mine = getattr(other, name), getattr(self, name)
            if found >= 0 and (mine < 0 or begin + found < mine):
                setattr(self, name, begin + found)


@dataclass(frozen=True)
class DifferenceSums:
    """Over elements w of a tile and d decoded, e = d - w.

    weight: Σ w². error: Σ e². product: Σ e·w. largest: max |e|, first at index largest_at. absmax: max |w|. finite: whether
    all d and w are numbers, and all sums: of others these fields tell nothing. saturated: codes with the largest magnitude
    of their grid. steps: None where nothing is known of a grid.
    """

    weight: float
    error: float
    product: float
    largest: float
    largest_at: int
    absmax: float
    finite: bool
    saturated: int = 0
    steps: Steps | None = None
