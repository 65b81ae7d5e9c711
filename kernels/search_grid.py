"""The candidates that a scale search tries: plain numpy, shared by every implementation of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .codebooks import E4M3_MAX

FP8_STEPS = 17
FP8_STRETCH = (2.0 ** (np.arange(FP8_STEPS) / FP8_STEPS)).astype(np.float32)
BOOK_RATIOS = np.linspace(0.70, 1.15, 13, dtype=np.float32)
BOOK_REFITS = 2
# Where nothing is known of the inputs, a scale far below absmax may clip just the weights that matter. Not let below this
# share of it, the search gains as much on average, and no layer's outputs lose (docs/rounding.md).
SAFE_FLOOR = 0.95
SMALLEST_ABSMAX = np.float32(1e-12)  # as the FP8 encoder's, so that candidate 0 is its scale bit for bit
SMALLEST_LIVE = 1e-30  # of a block's absmax: below it there is nothing to search


def fp8_candidates(absmax: np.ndarray) -> np.ndarray:
    """The multipliers tried for each absmax: float32 [n, 17], 448 / absmax · 2^(-i/17). The stored scale is 1 / them."""
    return (np.float32(E4M3_MAX) / np.maximum(absmax, SMALLEST_ABSMAX))[:, None] / FP8_STRETCH


def fp8_multiplier(absmax: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The multiplier of least error for each scale: float32 [n]. errors [n, 17]; a tie goes to the smaller scale."""
    return np.take_along_axis(fp8_candidates(absmax), errors.argmin(axis=1)[:, None], axis=1)[:, 0]


def spread_weights(weights: Any, first: int, runs: int) -> Any:
    """The weights [cycle, group] of runs first … first + runs - 1, run i taking row i mod cycle (numpy or torch)."""
    if len(weights) == 1:
        return weights
    return weights[(first + np.arange(runs)) % len(weights)]
