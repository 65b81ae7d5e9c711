"""What encoding a tile cost, as two sums."""

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
