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


@dataclass(frozen=True)
class DifferenceSums:
    """Over elements w of a tile and d decoded, e = d - w.

    weight: Σ w². error: Σ e². product: Σ e·w. largest: max |e|, first at index largest_at. absmax: max |w|. saturated:
    codes with the largest magnitude of their grid. finite: whether
    all d and w are numbers, and all sums: of others these fields tell nothing.
    """

    weight: float
    error: float
    product: float
    largest: float
    largest_at: int
    absmax: float
    finite: bool
    saturated: int = 0
