"""Method A of ROUNDING.md: scales of least squared error, never by clipping where clipping hurts outputs.

    FP8 with row scales or 64 x 64 blocks   17 candidates s = absmax / 448 · 2^(i/17), i = 0 … 16, the least error
    NF4                                     13 ratios of absmax, 0.70 … 1.15, then two least-squares refits
    INT8, FP4, FP8 tensor-wise or blocks of 128 and above   absmax: searching made real outputs worse

The error may be weighted by the diagonal of H, E[x²] of each input column. A weight is seen as runs of contiguous
elements that certainly share a scale (`ScaleGeometry.group`); the runs of a 2-D block are joined by adding their
errors.
"""

from __future__ import annotations

import numpy as np

from streamquant.kernels import why_no_jit
from streamquant.kernels.codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS, E4M3_MAX

FP8_STEPS = 17
FP8_STRETCH = (2.0 ** (np.arange(FP8_STEPS) / FP8_STEPS)).astype(np.float32)
NF4_RATIOS = np.linspace(0.70, 1.15, 13, dtype=np.float32)
NF4_REFITS = 2
SEARCHED_BLOCK = 64  # the largest block edge at which the FP8 search was shown to help
SMALLEST_ABSMAX = np.float32(1e-12)  # as the FP8 encoder's, so that candidate 0 is its scale bit for bit
RUN_MULTIPLE = 32  # the compiled search takes whole lanes
NUMPY_CHUNK = 1 << 18


def searches(grid: str, mode: str, block_size: int = 0) -> bool:
    """Whether method A searches the scale of a grid ("int8", "e4m3", "nf4", "fp4") in a scaling mode, or takes
    absmax."""
    if grid == "e4m3":
        return mode == "row" or (mode in ("block", "block3d") and block_size <= SEARCHED_BLOCK)
    return grid == "nf4"


def run_weights(diagonal: np.ndarray | None, columns: int, group: int) -> np.ndarray:
    """The weights of the runs of a weight with `columns` columns: float32 [cycle, group], run i taking row i mod cycle.

    diagonal [columns]: E[x²], None for equal weights. They are scaled to a mean of 1, which changes no choice.
    """
    if diagonal is None:
        return np.ones((1, group), dtype=np.float32)
    mean = float(np.mean(diagonal, dtype=np.float64))
    scaled = (diagonal / mean if mean > 0 else np.ones(columns)).astype(np.float32)
    cycle = columns // np.gcd(columns, group)  # runs until one begins where a row does again
    return np.resize(scaled, (int(cycle), group))


def fp8_candidates(absmax: np.ndarray) -> np.ndarray:
    """The multipliers tried for each absmax: float32 [n, 17], 448 / absmax · 2^(-i/17). The stored scale is 1 /
    them."""
    return (np.float32(E4M3_MAX) / np.maximum(absmax, SMALLEST_ABSMAX))[:, None] / FP8_STRETCH


def fp8_errors(runs: np.ndarray, absmax: np.ndarray, weights: np.ndarray, first: int = 0) -> np.ndarray:
    """Σ weight·(Q - W)² of each run under each candidate scale: float64 [n, 17], in the square of the weight's unit.

    runs [n, group] float32, finite. absmax [n] float32: of all that shares the run's scale. weights: of `run_weights`;
    first: the number of the first run within the tensor.
    """
    multipliers = fp8_candidates(absmax)
    if why_no_jit() is None:
        from streamquant.kernels.jit.scale_search import e4m3_errors

        errors = np.empty(multipliers.shape)
        e4m3_errors(np.ascontiguousarray(runs), multipliers, weights, first, errors)
    else:
        errors = _fp8_errors_torch(runs, multipliers, _spread(weights, first, len(runs)))
    return errors / np.square(multipliers, dtype=np.float64)


def fp8_multiplier(absmax: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The multiplier of least error for each scale: float32 [n]. errors [n, 17]; a tie goes to the smaller scale."""
    return np.take_along_axis(fp8_candidates(absmax), errors.argmin(axis=1)[:, None], axis=1)[:, 0]


def nf4_absmax(flat: np.ndarray, block_size: int, weights: np.ndarray | None = None, first: int = 0) -> np.ndarray:
    """The absmax to store for each block of NF4: float32 [ceil(elements / block_size)].

    flat [elements] float32, finite: consecutive blocks, the first being number `first` of the tensor. weights: of
    `run_weights`, None for equal ones.
    """
    blocks = -(-flat.size // block_size)
    width = -(-block_size // RUN_MULTIPLE) * RUN_MULTIPLE
    runs = flat
    if flat.size != blocks * block_size:
        runs = np.pad(flat, (0, blocks * block_size - flat.size))  # a zero is a code of its own and adds no error
    runs = np.ascontiguousarray(runs.reshape(blocks, block_size))
    weights = np.ones((1, block_size), dtype=np.float32) if weights is None else weights
    absmax = np.abs(runs).max(axis=1, initial=0.0).astype(np.float32)
    if why_no_jit() is None:
        from streamquant.kernels.jit.scale_search import book_absmax

        if width != block_size:
            runs, weights = (np.pad(part, ((0, 0), (0, width - block_size))) for part in (runs, weights))
        values = CODE_BOOKS["nf4"][ASCENDING_CODES["nf4"]]
        book_absmax(runs, NF4_RATIOS, NF4_REFITS, weights, first, tuple(BOUNDARIES["nf4"]), tuple(values), absmax)
        return absmax
    return _nf4_absmax_numpy(runs, absmax, _spread(weights, first, blocks))


def _spread(weights: np.ndarray, first: int, runs: int) -> np.ndarray:
    return weights[(first + np.arange(runs)) % len(weights)]


def _fp8_errors_torch(runs: np.ndarray, multipliers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`e4m3_errors` without a compiler."""
    import torch

    errors = np.empty(multipliers.shape)
    for candidate in range(multipliers.shape[1]):
        scaled = torch.from_numpy(np.clip(runs * multipliers[:, candidate, None], -E4M3_MAX, E4M3_MAX))
        miss = (scaled.to(torch.float8_e4m3fn).float() - scaled).numpy().astype(np.float64)
        errors[:, candidate] = (weights * miss * miss).sum(axis=1)
    return errors


def _nf4_absmax_numpy(runs: np.ndarray, absmax: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`book_absmax` without a compiler."""
    step = max(NUMPY_CHUNK // runs.shape[1], 1)
    for begin in range(0, len(runs), step):
        part = slice(begin, begin + step)
        absmax[part] = _nf4_part(runs[part], absmax[part], weights[part])
    return absmax


def _nf4_part(runs: np.ndarray, largest: np.ndarray, weights: np.ndarray) -> np.ndarray:
    book, boundaries = CODE_BOOKS["nf4"], BOUNDARIES["nf4"]
    live = largest > 1e-30

    def sums(tried: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The error of each run, and the least-squares scale for the codes that `tried` gives."""
        scaled = runs * (np.float32(1) / np.where(live, tried, 1))[:, None]
        chosen = book[np.searchsorted(boundaries, scaled, side="left")].astype(np.float64)
        square = (weights * chosen * chosen).sum(axis=1)
        fitted = tried * (weights * chosen * scaled).sum(axis=1) / np.where(square > 0, square, 1)
        error = (weights * (chosen - scaled) ** 2).sum(axis=1) * np.square(tried, dtype=np.float64)
        return error, np.where(square > 0, fitted, 0).astype(np.float32)

    best, least = largest.copy(), np.full(largest.shape, np.inf)
    fitted = largest.copy()
    for tried in [*(largest * ratio for ratio in NF4_RATIOS)] + [None] * NF4_REFITS:
        tried = fitted if tried is None else tried
        error, next_fit = sums(tried)
        better = live & (error < least) & (tried > 1e-30)
        best, least, fitted = (
            np.where(better, tried, best),
            np.where(better, error, least),
            np.where(better, next_fit, fitted),
        )
    return best
