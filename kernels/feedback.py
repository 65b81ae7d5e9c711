"""What the error-feedback pass needs to know of a layer's inputs, prepared once per layer in float64 by numpy.

Notation: a weight [M, N] becomes Q; a row's error is e = q - w; H [N, N] is the second moment of the inputs; the
output error of a row is e H eᵀ. Columns are visited in `order`; everything else here is in that order.

H = L Δ Lᵀ with L unit upper triangular and Δ diagonal gives e H eᵀ = Σ_j Δ_j (e_j + Σ_{i<j} e_i L_ij)², so that the
best a column can do, given the ones before it, is q_j = round(w_j - Σ_{i<j} e_i L_ij): LDLQ (Chee et al., "QuIP",
2023, section 3), the same codes as GPTQ (Frantar et al. 2022). Two forms of H are prepared:

    low rank  H = diag(D) + V Vᵀ: L_ij = v_i·g_j, Δ_j = d_j by a backward recursion over k x k matrices, never forming H
    dense     H as it is: L and Δ from the Cholesky factor of H with its rows and columns reversed
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 32  # columns between two matrix products
RANK_MULTIPLE = 8  # the compiled product takes eight rows at a time; zeros fill up


@dataclass(frozen=True)
class Feedback:
    """A prepared H. P = N rounded up to a multiple of BLOCK, K = k rounded up to one of RANK_MULTIPLE; zeros fill up.

    dense: which of the two forms. order [N] int64: the column visited j-th.
    gains: low rank [P, K], rows g_j; dense [P, P], row j holds L_ij at i < j and zeros elsewhere.
    vectors: low rank [P, K], rows v_j; dense [P, P], H itself.
    coupling [P / BLOCK, BLOCK, BLOCK]: L_ij inside each block, at [block, j, i], zero unless i < j.
    slopes [P / BLOCK, BLOCK, BLOCK]: H_ij inside each block, at [block, j, i], zero unless i < j.
    pivots [P]: Δ. diagonal [P]: D (dense: zeros). curvature [P]: H_jj.
    All but `order` in the dtype asked for; H is in the square of the inputs' unit.
    """

    dense: bool
    order: np.ndarray
    gains: np.ndarray
    vectors: np.ndarray
    coupling: np.ndarray
    slopes: np.ndarray
    pivots: np.ndarray
    diagonal: np.ndarray
    curvature: np.ndarray

    @property
    def columns(self) -> int:
        """N: the columns of the weight."""
        return self.order.size


def prepare(diagonal: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gains g [N, k] and pivots d [N] of H = diag(D) + V Vᵀ, float64.

    diagonal [N]: D > 0. vectors [N, k]: V. Both in the order of the visit. With S = I at first, backward over j
    (docs/rounding.md; S is (I + Σ_{i>j} v_i v_iᵀ / D_i)⁻¹ by Sherman and Morrison):
        u = S v_j;  d_j = D_j + v_jᵀ u;  g_j = u / d_j;  S ← S - u uᵀ / d_j
    Raises ValueError when an entry of D is not a positive number.
    """
    diagonal = np.asarray(diagonal, dtype=np.float64)
    vectors = np.asarray(vectors, dtype=np.float64)
    _require_positive(diagonal)
    columns, rank = vectors.shape
    inverse = np.eye(rank)
    gains = np.empty((columns, rank))
    pivots = np.empty(columns)
    for column in range(columns - 1, -1, -1):
        vector = vectors[column]
        step = inverse @ vector
        pivot = diagonal[column] + vector @ step
        gain = step / pivot
        inverse -= step[:, None] * gain
        gains[column] = gain
        pivots[column] = pivot
    return gains, pivots


def low_rank_feedback(
    diagonal: np.ndarray, vectors: np.ndarray, order: np.ndarray | None = None, dtype: type = np.float32
) -> Feedback:
    """Feedback for H = diag(D) + V Vᵀ.

    diagonal [N]: D > 0. vectors [N, k]: V. order [N]: a permutation, None for as they stand.
    Raises ValueError for a D that is not positive.
    """
    order = _order(order, diagonal.shape[0])
    diagonal = np.asarray(diagonal, dtype=np.float64)[order]
    vectors = np.asarray(vectors, dtype=np.float64)[order]
    gains, pivots = prepare(diagonal, vectors)
    rank = _padded(max(vectors.shape[1], 1), RANK_MULTIPLE)
    gains, vectors = _pad(gains, rank), _pad(vectors, rank)
    blocks = vectors.reshape(-1, BLOCK, rank)
    across = blocks.transpose(0, 2, 1)
    coupling = np.tril(gains.reshape(-1, BLOCK, rank) @ across, -1)
    slopes = np.tril(blocks @ across, -1)
    diagonal, pivots = _pad_ones(diagonal), _pad_ones(pivots)
    curvature = diagonal + np.einsum("jk,jk->j", vectors, vectors)
    parts = (gains, vectors, coupling, slopes, pivots, diagonal, curvature)
    return Feedback(False, order, *(np.ascontiguousarray(part, dtype=dtype) for part in parts))


def dense_feedback(hessian: np.ndarray, order: np.ndarray | None = None, dtype: type = np.float32) -> Feedback:
    """Feedback for a full H [N, N], symmetric and positive definite: 8·N² bytes times about three while it is prepared.

    order [N]: a permutation, None for as they stand. Raises ValueError when H is not positive definite.
    """
    order = _order(order, hessian.shape[0])
    hessian = np.asarray(hessian, dtype=np.float64)[np.ix_(order, order)]
    try:
        # Reversing rows and columns turns the lower factor into an upper one: H = (flip C) (flip C)ᵀ.
        factor = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError:
        raise ValueError("the matrix is not positive definite; shrink it toward the identity") from None
    root = np.diagonal(factor).copy()
    padded = _padded(order.size, BLOCK)
    gains = _pad((factor / root).T, padded)
    np.fill_diagonal(gains, 0.0)
    full = _pad(hessian, padded)
    coupling = np.stack([gains[begin : begin + BLOCK, begin : begin + BLOCK] for begin in range(0, padded, BLOCK)])
    slopes = np.stack(
        [np.tril(full[begin : begin + BLOCK, begin : begin + BLOCK], -1) for begin in range(0, padded, BLOCK)]
    )
    curvature = _pad_ones(np.diagonal(hessian).copy())
    parts = (gains, full, coupling, slopes, _pad_ones(root * root), np.zeros(padded), curvature)
    return Feedback(True, order, *(np.ascontiguousarray(part, dtype=dtype) for part in parts))


def _require_positive(diagonal: np.ndarray) -> None:
    if not (np.isfinite(diagonal).all() and (diagonal > 0).all()):
        raise ValueError("every entry of D must be a positive number")


def _order(order: np.ndarray | None, columns: int) -> np.ndarray:
    return np.arange(columns) if order is None else np.asarray(order, dtype=np.int64)


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _pad(matrix: np.ndarray, columns: int) -> np.ndarray:
    """`matrix` with zero rows up to a multiple of BLOCK and zero columns up to `columns`."""
    rows = _padded(matrix.shape[0], BLOCK)
    return np.pad(matrix, ((0, rows - matrix.shape[0]), (0, columns - matrix.shape[1])))


def _pad_ones(values: np.ndarray) -> np.ndarray:
    return np.pad(values, (0, _padded(values.size, BLOCK) - values.size), constant_values=1.0)
