"""The singular vectors of a weight, for the peer's objective (`--objective svd`; `streamquant.kernels.svd_descent`).

For comparison only: rounding that minimises ‖U_kᵀ (Q - W) V_k‖ moves error out of directions in which W is large, which
are not those in which inputs are; outputs get no better by it.

U_k and V_k come from randomized subspace iteration (Halko, Martinsson, Tropp, "Finding structure with randomness", 2011,
algorithms 4.4 and 5.1), which reads W in runs of rows of a fixed size, PASSES times and once more, and holds no more of
it: memory is a run and a few times (M + N)·(k + 8) float64. Products are in float32, sums over runs in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamquant.calibration.sketch import DEFAULT_RANK, OVERSAMPLING, probe

from .weights import Weights, matrix_shape, row_chunks

PASSES = 2


@dataclass(frozen=True)
class SvdObjective:
    """left [M, k]: U_k. right [N, k]: V_k. float32, columns of unit length, the largest singular value first."""

    left: np.ndarray
    right: np.ndarray


def prepare(weights: Weights, layer: str, rank: int = DEFAULT_RANK, seed: int = 0) -> SvdObjective | None:
    """The leading singular vectors of a linear layer's weight (bare name); k = rank, or the smaller side of W.

    None where the weight is missing, quantized or not finite. Raises SourceReadError.
    """
    shape = matrix_shape(weights, layer)
    if shape is None:
        return None
    rows, columns = shape
    width = min(rank + OVERSAMPLING, rows, columns)
    basis = probe(columns, width, seed).astype(np.float64)
    for _ in range(PASSES):
        total = np.zeros((columns, width))
        short = basis.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for begin, end in row_chunks(0, rows, columns):
                part = weights.rows(f"{layer}.weight", begin, end)
                total += part.T @ (part @ short)
        if not np.isfinite(total).all():
            return None
        basis = np.linalg.qr(total)[0]
    image = np.empty((rows, width))
    short = basis.astype(np.float32)
    for begin, end in row_chunks(0, rows, columns):
        image[begin:end] = weights.rows(f"{layer}.weight", begin, end) @ short
    left, triangle = np.linalg.qr(image)
    turn, _, back = np.linalg.svd(triangle)
    count = min(rank, width)
    return SvdObjective((left @ turn[:, :count]).astype(np.float32), (basis @ back.T[:, :count]).astype(np.float32))
