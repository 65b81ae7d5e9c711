"""The sketch of a layer's inputs: a product with a fixed random matrix, and the low-rank form that comes back from it.

For inputs X [n, N] and H = XᵀX / n, one pass keeps Y = H Ω with Ω [N, r] of random signs. H ≈ Y (Ωᵀ Y)⁻¹ Yᵀ is its
Nyström form; cut to rank k it is V Vᵀ (Tropp, Yurtsever, Udell, Cevher, "Fixed-rank approximation of a
positive-semidefinite matrix from streaming data", 2017, algorithm 3). Ω follows from a seed and N alone, so that files
made at different times, and under different names for a layer, can be added.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

OVERSAMPLING = 8  # columns of Ω beyond the rank that is wanted
DEFAULT_RANK = 64


@functools.lru_cache(maxsize=16)
def probe(columns: int, width: int, seed: int) -> np.ndarray:
    """Ω: float32 [columns, width] of ±1, read-only. Bits of SHAKE-256: the same with every version of every library."""
    key = f"streamquant sketch {seed} {columns} {width}".encode()
    raw = np.frombuffer(hashlib.shake_256(key).digest(-(-columns * width // 8)), dtype=np.uint8)
    bits = np.unpackbits(raw)[: columns * width].reshape(columns, width)
    signs = np.where(bits == 1, np.float32(1), np.float32(-1))
    signs.flags.writeable = False
    return signs


def low_rank(sketch: np.ndarray, seed: int, rank: int) -> np.ndarray:
    """V with V Vᵀ ≈ H: float64 [N, min(rank, r)], columns orthogonal, longest first.

    sketch [N, r]: Y = H Ω, Ω = probe(N, r, seed).
    """
    columns, width = sketch.shape
    signs = probe(columns, width, seed).astype(np.float64)
    sketch = sketch.astype(np.float64)
    # The sketch was stored in float32: a shift of its rounding error keeps the core positive, and is taken off again.
    shift = float(np.finfo(np.float32).eps) * float(np.linalg.norm(sketch)) / np.sqrt(width)
    if shift == 0.0:
        return np.zeros((columns, min(rank, width)))
    shifted = sketch + shift * signs
    core = signs.T @ shifted
    values, axes = np.linalg.eigh((core + core.T) / 2)
    kept = values > values[-1] * 1e-7
    half = shifted @ (axes[:, kept] / np.sqrt(values[kept]))
    squares, turn = np.linalg.eigh(half.T @ half)
    squares, turn = squares[::-1][:rank], turn[:, ::-1][:, :rank]
    # A column of half @ turn has the length √square; without the shift it would be √(square - shift).
    shrunk = np.sqrt(np.maximum(squares - shift, 0.0) / np.maximum(squares, np.finfo(np.float64).tiny))
    vectors = half @ (turn * shrunk)
    return np.pad(vectors, ((0, 0), (0, min(rank, width) - vectors.shape[1])))


def remainder(diagonal: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """D: the diagonal of H less that of V Vᵀ, float64 [N], clamped to a millionth of its mean so that it is positive.

    A layer whose inputs were all zero gets ones.
    """
    diagonal = diagonal.astype(np.float64)
    mean = float(diagonal.mean()) if diagonal.size else 0.0
    if mean <= 0.0:
        return np.ones(diagonal.shape)
    return np.maximum(diagonal - np.einsum("jk,jk->j", vectors, vectors), 1e-6 * mean)
