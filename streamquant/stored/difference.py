"""How far one weight is from another, summed over ranges: what every measure of quality follows from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from streamquant.kernels import DifferenceSums, Steps, select

from .layouts import Layout, Read

TINY = 1e-30  # a sum of squares below which float32 loses digits of its terms


@dataclass
class Difference:
    """Sums over elements w of a reference and d of a decoded weight, e = d - w.

    weight: sum of w². error: sum of e². product: sum of e·w. largest: max |e|, at element `largest_at`. saturated: codes
    at an end of their grid. nonfinite: elements that are NaN or infinite though the reference is finite there. skipped:
    elements whose reference is not finite; no sum counts them, nor the `nonfinite` ones. absmax: max |w|. steps:
    errors in steps of the codes' grid, None where no code was looked at in this way.
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
    absmax: float = 0.0
    steps: Steps | None = None

    def add(self, other: Difference) -> None:
        """Take another range in."""
        if other.largest > self.largest or (other.largest == self.largest and other.largest_at < self.largest_at):
            self.largest, self.largest_at = other.largest, other.largest_at
        self.absmax = max(self.absmax, other.absmax)
        if other.steps is not None:
            self.steps = self.steps or Steps()
            self.steps.add(other.steps)
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


def compare(layout: Layout, read: Read, reference: Layout, read_reference: Read, begin: int, end: int) -> Difference:
    """The difference of elements [begin, end) of two layouts: whole rows, or a part of one row."""
    if begin == end:
        return Difference()
    with np.errstate(over="ignore", invalid="ignore"):  # damaged scales make such numbers; they are counted
        tile = reference.tile(read_reference, begin, end)
        found = _taken(layout.difference(read, begin, end, tile), begin, end)
        if found is None:
            decoded = layout.decode(read, begin, end)
            found = _measure_carefully(decoded.values, reference.decode(read_reference, begin, end).values, begin)
            found.saturated = decoded.saturated
    return found


def measure(decoded: np.ndarray, reference: np.ndarray, begin: int = 0) -> Difference:
    """The difference of two float32 arrays [n], which are elements from `begin` on of a weight."""
    if not decoded.size:
        return Difference()
    backend = select("cpu")
    tile = backend.load(memoryview(np.ascontiguousarray(reference)).cast("B"), "F32")
    found = _taken(backend.difference(decoded, tile), begin, begin + decoded.size)
    return found or _measure_carefully(decoded, reference, begin)


def _taken(sums: DifferenceSums, begin: int, end: int) -> Difference | None:
    """What the kernels summed over a tile; None when float32 does not hold it."""
    if not sums.finite or sums.weight < TINY:
        return None
    steps = None
    if sums.steps is not None:
        steps = Steps()
        steps.add(sums.steps, begin)
    return Difference(
        end - begin, sums.weight, sums.error, sums.product, sums.largest, begin + sums.largest_at, sums.saturated,
        absmax=sums.absmax, steps=steps,
    )  # fmt: skip


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
        absmax=float(np.abs(reference[there]).max(initial=0.0)),
    )
    found.largest_at = begin
    if magnitude.size:
        position = int(magnitude.argmax())
        found.largest, found.largest_at = float(magnitude[position]), begin + int(np.flatnonzero(both)[position])
    return found
