"""Rounding with error feedback, and coordinate-descent sweeps after it, in plain torch: the definition.

For H prepared by `streamquant.kernels.feedback` (its notation), every row on its own, columns in its order:

    forward   t_j = w_j - Σ_{i<j} e_i L_ij;  q_j = round(t_j);  e_j = q_j - w_j        (docs/rounding.md)
    sweep     x = e_j - (H e)_j / H_jj;  q_j = round(w_j + x) where that lies nearer to w_j + x than q_j does

The forward pass leaves e H eᵀ = Σ_j Δ_j (q_j - t_j)². x is where a column's parabola has its minimum, so a step of a
sweep takes H_jj ((e_j - x)² - (e_j' - x)²) ≥ 0 off the objective: no sweep raises it. `round` is the format's own, with
scales fixed before. The guard rounds to nearest also, and keeps that for rows that came out no better.

Order of arithmetic. The feedback of earlier blocks of 32 columns is a sum over the k states Σ e_i v_i (dense H: over
all earlier columns), to which the block's own columns add theirs, one by one. Every product is rounded, then added, in
ascending order, whatever rows a tile holds. The compiled path does exactly this: its codes are the same, bit for bit.
In float64 (tile, scale and feedback) the codes are those of a dense LDLQ written with matrices, up to ties.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS, E4M3_MAX, INT8_MAX
from .feedback import BLOCK, Feedback
from .refined import Refined


class _Columns(NamedTuple):
    """A tile in the order of the visit: weights, scale and factor of each weight, all [rows, N]."""

    weights: torch.Tensor
    scale: torch.Tensor
    factor: torch.Tensor


def round_to_grid(
    values: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor, grid: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid's nearest value to each of `values`, and its code.

    values, scale, factor [n]: float32 or float64, all the same. INT8 divides by the scale, rounds to nearest even and
    clamps to ±127; E4M3 multiplies by the factor, rounds to nearest even and saturates; a code book multiplies by the
    factor and takes the nearest entry, ties to the lower. Returns values (code · scale) and codes int8 or uint8 [n].
    """
    if grid == "int8":
        steps = (values / scale).clamp(-INT8_MAX, INT8_MAX).round()
        return steps * scale, steps.to(torch.int8)
    if grid == "e4m3":
        codes = (values * factor).clamp(-E4M3_MAX, E4M3_MAX).float().to(torch.float8_e4m3fn)
        return codes.to(values.dtype) * scale, codes.view(torch.uint8)
    ascending = torch.from_numpy(ASCENDING_CODES[grid]).to(values.device)
    boundaries = torch.from_numpy(BOUNDARIES[grid]).to(values)
    codes = ascending[torch.bucketize(values * factor, boundaries, out_int32=True)]
    book = torch.from_numpy(CODE_BOOKS[grid]).to(values)
    return book[codes.int()] * scale, codes


def refine(
    tile: torch.Tensor, scale: torch.Tensor, column_group: torch.Tensor, feedback: Feedback, grid: str,
    multiplier: torch.Tensor | None = None, sweeps: int = 0, guard: bool = True,
) -> Refined:  # fmt: skip
    """Codes of a tile of whole rows under a prepared H.

    tile [rows, N]: float32 or float64, finite. scale [rows, groups]: the same. column_group [N] int64: the scale of
    each column as it stands in the tile. multiplier [rows, groups]: what E4M3 and the code books multiply by before
    rounding, None for 1 / scale. grid: one of GRIDS. sweeps: how many follow. guard: keep nearest where it is better,
    and say in `before` what it costs. Returns codes [rows, N] and objectives [rows] float64, in the square of the
    inputs' unit.
    """
    multiplier = 1 / scale if multiplier is None else multiplier
    order = torch.from_numpy(feedback.order).to(tile.device)
    groups = column_group.to(tile.device)[order]
    columns = _Columns(tile[:, order], scale[:, groups], multiplier[:, groups])
    prepared = {
        name: torch.from_numpy(getattr(feedback, name)).to(tile)
        for name in ("gains", "vectors", "coupling", "slopes", "pivots", "diagonal", "curvature")
    }
    errors, state, codes, after = _forward(columns, feedback.dense, prepared, grid)
    for _ in range(sweeps):
        _sweep(columns, feedback.dense, prepared, grid, errors, state, codes, after)
    before = torch.full_like(after, torch.nan)
    if guard:
        rounded, nearest_codes = round_to_grid(columns.weights, columns.scale, columns.factor, grid)
        before = _objective(rounded - columns.weights, feedback.dense, prepared)
        worse = after > before
        codes[worse] = nearest_codes[worse]
        after = torch.minimum(after, before)
    unordered = torch.empty_like(codes)
    unordered[:, order] = codes
    return Refined(unordered, before, after)


def _forward(columns: _Columns, dense: bool, prepared: dict[str, torch.Tensor], grid: str):
    """Errors [rows, P], state Σ e_j v_j [rows, K], codes [rows, N], objective [rows] float64 of the forward pass."""
    weights = columns.weights
    rows, count = weights.shape
    gains, vectors, coupling = prepared["gains"], prepared["vectors"], prepared["coupling"]
    errors = weights.new_zeros(rows, gains.shape[0])
    state = weights.new_zeros(rows, vectors.shape[1])
    codes = torch.empty(rows, count, dtype=torch.int8 if grid == "int8" else torch.uint8, device=weights.device)
    objective = torch.zeros(rows, dtype=torch.float64, device=weights.device)
    for block, begin in enumerate(range(0, count, BLOCK)):
        cross = weights.new_zeros(rows, BLOCK)
        earlier = errors[:, :begin] if dense else state
        _add_product(cross, earlier, gains[begin : begin + BLOCK, : earlier.shape[1]])
        for column in range(begin, min(begin + BLOCK, count)):
            wanted = weights[:, column] - cross[:, column - begin]
            rounded, codes[:, column] = round_to_grid(wanted, columns.scale[:, column], columns.factor[:, column], grid)
            errors[:, column] = rounded - weights[:, column]
            miss = (rounded - wanted).double()
            objective += prepared["pivots"][column].double() * miss * miss
            cross += errors[:, column, None] * coupling[block, :, column - begin]
        if not dense:
            _add_product(state, errors[:, begin : begin + BLOCK], vectors[begin : begin + BLOCK].T)
    return errors, state, codes, objective


def _sweep(columns: _Columns, dense: bool, prepared: dict[str, torch.Tensor], grid: str, errors, state, codes, objective):
    """One sweep, in place on errors, state, codes and objective [rows] float64."""
    weights = columns.weights
    rows, count = weights.shape
    vectors, slopes = prepared["vectors"], prepared["slopes"]
    for block, begin in enumerate(range(0, count, BLOCK)):
        cross = weights.new_zeros(rows, BLOCK)
        _add_product(cross, errors if dense else state, vectors[begin : begin + BLOCK])
        changes = weights.new_zeros(rows, BLOCK)
        for column in range(begin, min(begin + BLOCK, count)):
            local = column - begin
            old, bend = errors[:, column].clone(), prepared["curvature"][column]
            wish = old - (prepared["diagonal"][column] * old + cross[:, local]) / bend
            wanted = weights[:, column] + wish
            rounded, code = round_to_grid(wanted, columns.scale[:, column], columns.factor[:, column], grid)
            new = rounded - weights[:, column]
            old_miss, new_miss = (old - wish).double(), (new - wish).double()
            better = new_miss.abs() < old_miss.abs()
            changes[:, local] = torch.where(better, new - old, 0)
            errors[:, column] = torch.where(better, new, old)
            codes[:, column] = torch.where(better, code, codes[:, column])
            objective -= torch.where(better, bend.double() * (old_miss.square() - new_miss.square()), 0.0)
            cross += changes[:, local, None] * slopes[block, :, local]
        if not dense:
            _add_product(state, changes, vectors[begin : begin + BLOCK].T)


def _objective(errors: torch.Tensor, dense: bool, prepared: dict[str, torch.Tensor]) -> torch.Tensor:
    """e H eᵀ of each row, float64, with the compiled path's order of arithmetic. errors [rows, N]."""
    rows, count = errors.shape
    gains, vectors = prepared["gains"], prepared["vectors"]
    errors = torch.nn.functional.pad(errors, (0, gains.shape[0] - count))
    shares = prepared["pivots" if dense else "diagonal"].double()
    state = errors.new_zeros(rows, vectors.shape[1])
    objective = torch.zeros(rows, dtype=torch.float64, device=errors.device)
    for begin in range(0, count, BLOCK):
        end = begin + BLOCK
        cross = errors[:, begin:end].clone()
        if dense:
            _add_product(cross, errors[:, :end], gains[begin:end, :end])
        else:
            _add_product(state, errors[:, begin:end], vectors[begin:end].T)
        for column in range(begin, min(end, count)):
            miss = cross[:, column - begin].double()
            objective += shares[column] * miss * miss
    if not dense:
        for term in state.double().unbind(1):
            objective += term * term
    return objective


def _add_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """target [rows, n] += left [rows, m] @ right [n, m]ᵀ, term after term: a library's product would choose its own
    order."""
    for term in range(left.shape[1]):
        target += left[:, term, None] * right[:, term]
