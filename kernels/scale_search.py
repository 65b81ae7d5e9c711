"""Scales of least squared error, in plain torch: the definition (docs/rounding.md, A).

    FP8    17 candidates, multipliers 448 / absmax · 2^(-i/17), i = 0 … 16: never clips
    books  13 ratios of absmax from 0.70 to 1.15, then two least-squares refits of the scale to the chosen codes

Errors may be weighted, a weight per column of the layer: E[x²] of its inputs. Of equal errors the first candidate wins.
Sums are in float64 here and in lanes of float32 in the compiled path: where two candidates are as good as equal, the
choice may differ between them.
"""

from __future__ import annotations

import numpy as np
import torch

from .codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS, E4M3_MAX
from .search_grid import BOOK_RATIOS, BOOK_REFITS, SMALLEST_LIVE, spread_weights

CHUNK = 1 << 18  # elements worked on at a time on the CPU


def e4m3_errors(runs: torch.Tensor, multipliers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ weight · (e4m3(run · m) - run · m)², in the grid's units.

    runs [n, group]: floating, finite. multipliers [n, candidates] float32. weights [cycle, group] float32, run i taking
    row i mod cycle. Returns float64 [n, candidates].
    """
    errors = torch.empty(multipliers.shape, dtype=torch.float64, device=runs.device)
    for part in _parts(runs):
        weight = spread_weights(weights, part.start, runs[part].shape[0]).double()
        for candidate in range(multipliers.shape[1]):
            scaled = (runs[part].float() * multipliers[part, candidate, None]).clamp(-E4M3_MAX, E4M3_MAX)
            miss = (scaled.to(torch.float8_e4m3fn).float() - scaled).double()
            errors[part, candidate] = (weight * miss * miss).sum(dim=1)
    return errors


def book_absmax(runs: torch.Tensor, weights: torch.Tensor, book: str, floor: float = 0.0) -> torch.Tensor:
    """The scale of least weighted error for each run: float32 [n].

    runs [n, group]: floating, finite; zeros may fill a short one up. weights [cycle, group]: as in `e4m3_errors`. floor:
    the least share of absmax that a scale may be.
    """
    chosen = torch.empty(runs.shape[0], dtype=torch.float32, device=runs.device)
    for part in _parts(runs):
        weight = spread_weights(weights, part.start, runs[part].shape[0]).double()
        chosen[part] = _search(runs[part].float(), weight, book, floor)
    return chosen


def _parts(runs: torch.Tensor) -> list[slice]:
    count, group = runs.shape
    step = count if runs.device.type != "cpu" else max(CHUNK // max(group, 1), 1)
    return [slice(begin, begin + step) for begin in range(0, count, max(step, 1))]


def _search(runs: torch.Tensor, weights: torch.Tensor, book: str, floor: float) -> torch.Tensor:
    ascending = ASCENDING_CODES[book]
    values = torch.from_numpy(CODE_BOOKS[book][ascending]).to(runs.device)
    boundaries = torch.from_numpy(BOUNDARIES[book]).to(runs.device)
    largest = runs.abs().amax(dim=1)
    live = largest > SMALLEST_LIVE

    def sums(tried: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The error of each run, and the least-squares scale for the codes that `tried` gives: Σ w c / Σ c²."""
        scaled = runs * (1.0 / torch.where(live, tried, 1.0))[:, None]
        near = values[torch.bucketize(scaled, boundaries)].double()
        square = (weights * near * near).sum(dim=1)
        product = (weights * near * scaled.double()).sum(dim=1)
        fitted = tried.double() * product / torch.where(square > 0, square, 1.0)
        error = (weights * (near - scaled.double()).square()).sum(dim=1) * tried.double().square()
        return error, torch.where(square > 0, fitted, 0.0).float()

    best, fitted = largest.clone(), largest.clone()
    least = torch.full_like(largest, torch.inf, dtype=torch.float64)
    lowest = largest * np.float32(floor)
    for ratio in [*BOOK_RATIOS[np.float32(floor) <= BOOK_RATIOS].tolist(), *[None] * BOOK_REFITS]:
        tried = torch.maximum(fitted, lowest) if ratio is None else largest * np.float32(ratio)
        error, next_fit = sums(tried)
        better = live & (error < least) & (tried > SMALLEST_LIVE)
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
        fitted = torch.where(better, next_fit, fitted)
    return best
