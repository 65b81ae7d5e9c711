"""How far one weight is from another, summed over ranges: what every measure of quality follows from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RUN = 4096  # elements summed in float32 before the sum goes to float64
TINY = 1e-30  # a sum of squares below which float32 loses digits of its terms


@dataclass
class Difference:
    """Sums over elements w of a reference and d of a decoded weight, e = d - w.

    weight: sum of w². error: sum of e². product: sum of e·w. largest: max |e|, at element `largest_at`. saturated: codes
    at an end of their grid. nonfinite: elements that are NaN or infinite though the reference is finite there. skipped:
    elements whose reference is not finite; no sum counts them, nor the `nonfinite` ones.
    """

    elements: int = 0
    weight: float = 0.0
    error: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    largest_at: int = 0
    saturated: int = 0
    nonfinite: int = 0
    skipped: int = 0

    def add(self, other: Difference) -> None:
        """Take another range in."""
        if other.largest > self.largest or (other.largest == self.largest and other.largest_at < self.largest_at):
            self.largest, self.largest_at = other.largest, other.largest_at
        for name in ("elements", "weight", "error", "product", "saturated", "nonfinite", "skipped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def relative_error(self) -> float:
        """||d - w|| / ||w||: Frobenius. 0 when both are all zeros."""
        if not self.weight:
            return math.inf if self.error else 0.0
        return math.sqrt(self.error / self.weight)

    @property
    def signal_to_noise(self) -> float:
        """In dB: 20 log10(||w|| / ||e||)."""
        relative = self.relative_error
        if not relative:
            return math.inf
        return -20 * math.log10(relative) if math.isfinite(relative) else -math.inf

    @property
    def decoded_energy(self) -> float:
        """Sum of d²."""
        return max(self.weight + 2 * self.product + self.error, 0.0)

    @property
    def cosine(self) -> float:
        """<d, w> / (||d|| ||w||); 1 when both are all zeros, 0 when one is."""
        energy = self.decoded_energy * self.weight
        if not energy:
            return 0.0 if self.decoded_energy or self.weight else 1.0
        return max(min((self.weight + self.product) / math.sqrt(energy), 1.0), -1.0)

    @property
    def factor(self) -> float | None:
        """The number that d has to be multiplied by to come nearest to w; None when d is all zeros."""
        return (self.weight + self.product) / self.decoded_energy if self.decoded_energy else None

    @property
    def saturated_share(self) -> float:
        """Share of codes at an end of their grid."""
        return self.saturated / self.elements if self.elements else 0.0


def measure(decoded: np.ndarray, reference: np.ndarray, begin: int = 0) -> Difference:
    """The difference of two float32 arrays [n], which are elements from `begin` on of a weight."""
    if not decoded.size:
        return Difference()
    with np.errstate(over="ignore", invalid="ignore"):
        error = decoded - reference
        highest, lowest = int(error.argmax()), int(error.argmin())
        top, bottom = float(error[highest]), -float(error[lowest])
        sums = [_dot(reference, reference), _dot(error, error), _dot(error, reference)]
    if not all(map(math.isfinite, (*sums, top, bottom))) or sums[0] < TINY:
        return _measure_carefully(decoded, reference, begin)
    if top == bottom:
        highest = min(highest, lowest)
    return Difference(decoded.size, *sums, max(top, bottom), begin + (highest if top >= bottom else lowest))


def _dot(left: np.ndarray, right: np.ndarray) -> float:
    """Scalar product: float32 within a run, float64 across runs."""
    whole = left.size // RUN * RUN
    runs = np.einsum("ij,ij->i", left[:whole].reshape(-1, RUN), right[:whole].reshape(-1, RUN))
    return float(runs.sum(dtype=np.float64)) + float(np.einsum("i,i->", left[whole:], right[whole:]))


def _measure_carefully(decoded: np.ndarray, reference: np.ndarray, begin: int) -> Difference:
    """In float64, without the elements that are no numbers: for weights beyond what float32 can square."""
    there, counted = np.isfinite(reference), np.isfinite(decoded)
    both = there & counted
    w, d = reference[both].astype(np.float64), decoded[both].astype(np.float64)
    error = d - w
    magnitude = np.abs(error)
    found = Difference(
        int(decoded.size),
        float(w @ w),
        float(error @ error),
        float(error @ w),
        nonfinite=int(np.count_nonzero(there & ~counted)),
        skipped=int(np.count_nonzero(~there)),
    )
    found.largest_at = begin
    if magnitude.size:
        position = int(magnitude.argmax())
        found.largest, found.largest_at = float(magnitude[position]), begin + int(np.flatnonzero(both)[position])
    return found
