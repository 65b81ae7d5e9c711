"""H, the second moment of a layer's inputs, made fit for rounding: shrunk, rotated, ordered, prepared.

H is measured on few inputs and used on others, so it is drawn toward the identity: (1 - s) H + s · mean(diag H) · I,
with s = 0.1 for the sketch and max(0.03, min(0.5, N / 2n)) for the dense form of n inputs (docs/rounding.md: less than 0.1
costs the sketch and helps the whole H where it was measured on many inputs).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from streamquant.calibration.sketch import DEFAULT_RANK
from streamquant.calibration.statistics import LayerStatistics
from streamquant.kernels.feedback import Feedback, dense_feedback, low_rank_feedback

SKETCH_SHRINKAGE = 0.1
DENSE_SHRINKAGE = (0.03, 0.5)


@dataclass(frozen=True)
class LayerHessian:
    """H = diag(remainder) + vectors · vectorsᵀ, or, where matrix is given, H = matrix. In the square of the inputs'
    unit.

    remainder [N], vectors [N, k], matrix [N, N]: float64. count: how many inputs it was measured on.
    """

    remainder: np.ndarray
    vectors: np.ndarray
    matrix: np.ndarray | None = None
    count: int = 0

    @classmethod
    def of(cls, statistics: LayerStatistics, rank: int = DEFAULT_RANK, dense: bool = False) -> LayerHessian:
        """H as measured. dense: whole where the calibration kept it so, else its low-rank form."""
        if dense and statistics.hessian is not None:
            columns = statistics.columns
            matrix = statistics.hessian.astype(np.float64)
            return cls(np.zeros(columns), np.zeros((columns, 0)), (matrix + matrix.T) / 2, statistics.count)
        remainder, vectors = statistics.low_rank(rank)
        return cls(remainder, vectors, count=statistics.count)

    @property
    def diagonal(self) -> np.ndarray:
        """The diagonal of H: float64 [N]."""
        if self.matrix is not None:
            return np.diagonal(self.matrix)
        return self.remainder + np.einsum("jk,jk->j", self.vectors, self.vectors)

    @property
    def shrinkage(self) -> float:
        """How far toward the identity an H of this form and this many inputs is drawn."""
        if self.matrix is None:
            return SKETCH_SHRINKAGE
        least, most = DENSE_SHRINKAGE
        return max(least, min(most, self.diagonal.size / (2 * max(self.count, 1))))

    def shrunk(self, strength: float | None = None) -> LayerHessian:
        """(1 - s) H + s · mean(diag H) · I; None takes `shrinkage`. The trace stays."""
        s = self.shrinkage if strength is None else strength
        floor = s * (float(self.diagonal.mean()) or 1.0)
        if self.matrix is not None:
            return replace(self, matrix=(1 - s) * self.matrix + floor * np.eye(self.diagonal.size))
        return replace(self, remainder=(1 - s) * self.remainder + floor, vectors=np.sqrt(1 - s) * self.vectors)

    def rotated(self, transform: np.ndarray) -> LayerHessian:
        """H of inputs multiplied by an orthogonal matrix R, as weights are: X R (W R)ᵀ = X Wᵀ. H becomes Rᵀ H R.

        transform [g, g]: one block of R, which repeats it along its diagonal; g divides N, and may be N. V rotates
        exactly. Rᵀ diag(D) R is full, and of it only the diagonal is kept, (R ∘ R)ᵀ D, for a Hadamard matrix the mean
        of each group; the trace stays. Raises ValueError when the sizes do not divide or the block is not orthogonal.
        """
        size, columns = transform.shape[0], self.diagonal.size
        if columns % size:
            raise ValueError(f"{columns} columns are not divisible into groups of {size}")
        if not np.allclose(transform.T @ transform, np.eye(size), atol=1e-5):
            raise ValueError("the transform is not orthogonal")
        transform = transform.astype(np.float64)

        def turned(rows: np.ndarray, block: np.ndarray) -> np.ndarray:
            return (block.T @ rows.reshape(columns // size, size, -1)).reshape(rows.shape)

        if self.matrix is not None:
            half = turned(self.matrix, transform)
            return replace(self, matrix=turned(half.T, transform))
        remainder = turned(self.remainder, np.square(transform))
        return replace(self, remainder=remainder, vectors=turned(self.vectors, transform))

    def act_order(self) -> np.ndarray:
        """The columns by falling H_jj, int64 [N]; equal ones as they stand. Columns that matter are rounded first, and
        the others make up for them (GPTQ's act-order)."""
        return np.argsort(-self.diagonal, kind="stable")

    def feedback(self, act_order: bool = True, dtype: type = np.float32) -> Feedback:
        """Prepared for `streamquant.kernels` `refine`. Raises ValueError when a dense H is not positive definite."""
        order = self.act_order() if act_order else None
        if self.matrix is not None:
            return dense_feedback(self.matrix, order, dtype)
        return low_rank_feedback(self.remainder, self.vectors, order, dtype)

    def output_error(self, error: np.ndarray) -> np.ndarray:
        """e H eᵀ of each row, float64 [rows]: the mean square output error. error [rows, N]: Q - W."""
        error = error.astype(np.float64)
        if self.matrix is not None:
            return np.einsum("ij,ij->i", error @ self.matrix, error)
        return np.square(error) @ self.remainder + np.square(error @ self.vectors).sum(axis=1)
