"""What is known of one layer's inputs, and how two such knowledges become one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamquant.errors import CalibrationError

from .sketch import OVERSAMPLING, low_rank, probe, remainder

EXACT_COLUMNS = 1024  # up to here the eigenvectors of a whole H are found; above, from a sketch of it


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments of the n inputs x [N] that a layer saw; H = XᵀX / n.

    count: n. mean [N]: of x. diagonal [N]: of H, E[x²]. Exactly one of sketch [N, r], H Ω (`sketch.probe`), and
    hessian [N, N], H itself. seed: of Ω. All float32, in the inputs' unit or its square.
    """

    count: int
    mean: np.ndarray
    diagonal: np.ndarray
    sketch: np.ndarray | None = None
    hessian: np.ndarray | None = None
    seed: int = 0

    @property
    def columns(self) -> int:
        """N, the layer's in_features."""
        return self.diagonal.shape[0]

    def low_rank(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """D [N] and V [N, k], float64, with H ≈ diag(D) + V Vᵀ and D > 0. k = rank, or less when less was kept."""
        if self.hessian is None:
            vectors = low_rank(self.sketch, self.seed, rank)
        elif self.columns <= EXACT_COLUMNS:
            values, axes = np.linalg.eigh(self.hessian.astype(np.float64))
            vectors = axes[:, ::-1][:, :rank] * np.sqrt(np.maximum(values[::-1][:rank], 0.0))
        else:
            width = min(rank + OVERSAMPLING, self.columns)
            sketch = self.hessian @ probe(self.columns, width, self.seed)
            vectors = low_rank(sketch, self.seed, rank)
        return remainder(self.diagonal, vectors), vectors

    def check(self, name: str) -> None:
        """Raise CalibrationError, naming the layer, unless shapes agree and the numbers are moments of something."""
        if (self.sketch is None) == (self.hessian is None):
            raise CalibrationError(f"{name}: needs either a sketch or a hessian, and not both.")
        moment = self.sketch if self.sketch is not None else self.hessian
        expected = (self.columns, moment.shape[-1] if self.sketch is not None else self.columns)
        if self.mean.shape != (self.columns,) or moment.shape != expected or 0 in expected:
            raise CalibrationError(
                f"{name}: shapes disagree: diagonal {self.diagonal.shape}, mean {self.mean.shape}, "
                f"moments {moment.shape}."
            )
        if self.count < 1:
            raise CalibrationError(
                f"{name}: counts {self.count} inputs; a layer that saw none has no place in the file."
            )
        for what, values in (("mean", self.mean), ("diagonal", self.diagonal), ("moments", moment)):
            if not np.isfinite(values).all():
                raise CalibrationError(f"{name}: the {what} hold NaN or infinity; collect this calibration again.")
        if (self.diagonal < 0).any():
            raise CalibrationError(f"{name}: a mean square below zero; the file is damaged.")

    def merged(self, other: LayerStatistics, name: str) -> LayerStatistics:
        """The statistics of both sets of inputs: means weighted by count, in float64. Raises CalibrationError."""
        mine, theirs = ("hessian" if layer.sketch is None else "sketch" for layer in (self, other))
        if mine != theirs or self.columns != other.columns:
            raise CalibrationError(
                f"{name}: {mine} of {self.columns} columns cannot be merged with {theirs} of {other.columns}."
            )
        if mine == "sketch" and (self.seed != other.seed or self.sketch.shape != other.sketch.shape):
            raise CalibrationError(
                f"{name}: the sketches were made with different ranks or seeds; collect one of them again."
            )
        count = self.count + other.count

        def join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            total = first.astype(np.float64) * (self.count / count)
            total += second.astype(np.float64) * (other.count / count)
            return total.astype(np.float32)

        moments = {mine: join(getattr(self, mine), getattr(other, mine))}
        return LayerStatistics(
            count, join(self.mean, other.mean), join(self.diagonal, other.diagonal), seed=self.seed, **moments
        )
