"""The error-feedback pass and the sweeps: against LDLQ written with matrices, against each other, and what must
hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from layers import QUICK, column_counts, forms, grids, layer, ranks, row_counts, seeds

from streamquant.kernels import bnb4, fp8, int8
from streamquant.kernels import refine as reference
from streamquant.kernels.feedback import dense_feedback, low_rank_feedback, prepare
from streamquant.kernels.jit import refine as compiled
from streamquant.kernels.refined import GRIDS


def ldlq(case, order: np.ndarray) -> np.ndarray:
    """Codes of dense LDLQ in float64, as GPTQ states it: the inverse Hessian's Cholesky factor, errors spread ahead."""
    hessian = case.hessian[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    work = case.weight.astype(np.float64)[:, order]
    scale = torch.from_numpy(case.scale.astype(np.float64)[:, case.column_group[order]])
    codes = np.zeros(work.shape, dtype=np.int8 if case.grid == "int8" else np.uint8)
    for column in range(order.size):
        wanted = torch.from_numpy(work[:, column].copy())
        rounded, code = reference.round_to_grid(wanted, scale[:, column], 1 / scale[:, column], case.grid)
        codes[:, order[column]] = code.numpy()
        error = (work[:, column] - rounded.numpy()) / upper[column, column]
        work[:, column:] -= np.outer(error, upper[column, column:])
    return codes


@pytest.mark.parametrize("dense", [False, True], ids=["low rank", "dense"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_definition_is_ldlq(grid, dense):
    case = layer(96, 200, 12, grid, seed=1)
    feedback = case.feedback(dense, dtype=np.float64)
    codes = case.defined(feedback, np.float64, guard=False).codes
    assert (codes != ldlq(case, feedback.order)).sum() == 0


@pytest.mark.parametrize("dense", [False, True], ids=["low rank", "dense"])
@pytest.mark.parametrize("grid", GRIDS)
def test_float32_is_as_good_as_float64(grid, dense):
    # A weight that lies on a boundary within float32's rounding may go the other way, and its row on another path from
    # there on: no worse, but not the same to the last digit.
    case = layer(256, 512, 16, grid, seed=2)
    exact = case.defined(case.feedback(dense, dtype=np.float64), np.float64, guard=False)
    fast = case.refined(case.feedback(dense), guard=False)
    assert (exact.codes != fast.codes).mean() < 1e-3
    assert case.output_error(fast.codes).sum() == pytest.approx(case.output_error(exact.codes).sum(), rel=1e-4)
    same = (exact.codes == fast.codes).all(axis=1)
    assert same.mean() > 0.95
    assert fast.after[same].sum() == pytest.approx(exact.after[same].sum(), rel=1e-5)


@QUICK
@given(row_counts, column_counts, ranks, grids, forms, seeds)
def test_compiled_codes_are_the_definitions(rows, columns, rank, grid, dense, seed):
    case = layer(rows, columns, rank, grid, seed)
    feedback = case.feedback(dense)
    for options in ({"guard": False}, {"sweeps": 2}):
        fast, slow = case.refined(feedback, **options), case.defined(feedback, **options)
        np.testing.assert_array_equal(fast.codes, slow.codes)
        np.testing.assert_allclose(fast.after, slow.after, rtol=1e-12)
        np.testing.assert_allclose(fast.before, slow.before, rtol=1e-12)


@QUICK
@given(row_counts, column_counts, ranks, grids, forms, seeds)
def test_no_row_is_worse_than_nearest(rows, columns, rank, grid, dense, seed):
    case = layer(rows, columns, rank, grid, seed)
    nearest = case.output_error(case.nearest())
    feedback = case.feedback(dense)
    floor = 1e-9 * np.square(case.weight).sum()  # float32 holds no smaller difference of two nearly equal weights
    for sweeps in (0, 1):
        refined = case.refined(feedback, sweeps=sweeps)
        reached = case.output_error(refined.codes)
        assert (reached <= nearest * (1 + 1e-5) + floor).all()
        np.testing.assert_allclose(refined.before, nearest, rtol=1e-3, atol=floor)
        np.testing.assert_allclose(refined.after, reached, rtol=1e-3, atol=floor)


@QUICK
@given(row_counts, column_counts, ranks, grids, forms, seeds)
def test_no_sweep_raises_the_objective(rows, columns, rank, grid, dense, seed):
    case = layer(rows, columns, rank, grid, seed)
    feedback = case.feedback(dense)
    floor = 1e-9 * np.square(case.weight).sum()
    errors = [case.output_error(case.refined(feedback, sweeps=sweeps, guard=False).codes) for sweeps in range(4)]
    for earlier, later in zip(errors, errors[1:], strict=False):
        assert (later <= earlier * (1 + 1e-5) + floor).all()


@pytest.mark.parametrize("dense", [False, True], ids=["low rank", "dense"])
@pytest.mark.parametrize("grid", GRIDS)
def test_refinement_pays_and_sweeps_pay_more(grid, dense):
    case = layer(128, 384, 16, grid, seed=3)
    feedback = case.feedback(dense)
    nearest = case.output_error(case.nearest()).sum()
    plain, swept = (case.output_error(case.refined(feedback, sweeps=sweeps).codes).sum() for sweeps in (0, 2))
    assert swept < plain < 0.5 * nearest


@pytest.mark.parametrize("dense", [False, True], ids=["low rank", "dense"])
@pytest.mark.parametrize("grid", GRIDS)
def test_how_rows_are_tiled_changes_nothing(grid, dense):
    case = layer(101, 130, 7, grid, seed=4)
    feedback = case.feedback(dense)
    groups = torch.from_numpy(case.column_group)
    for options in ({}, {"sweeps": 2}):
        whole = case.refined(feedback, **options)
        for cuts in ([1, 2, 40], [33, 64], [100]):
            spans = list(zip([0, *cuts], [*cuts, 101], strict=True))
            fast = [
                compiled.refine(case.weight[a:b], case.scale[a:b], case.column_group, feedback, grid, **options)
                for a, b in spans
            ]
            slow = [
                reference.refine(
                    torch.from_numpy(case.weight[a:b]),
                    torch.from_numpy(case.scale[a:b]),
                    groups,
                    feedback,
                    grid,
                    **options,
                )
                for a, b in spans
            ]
            for parts in (fast, slow):
                np.testing.assert_array_equal(np.concatenate([part.codes for part in parts]), whole.codes)
            np.testing.assert_array_equal(np.concatenate([part.after for part in fast]), whole.after)


@pytest.mark.parametrize("dense", [False, True], ids=["low rank", "dense"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_order_of_the_visit_is_undone(grid, dense):
    case = layer(40, 90, 6, grid, seed=5)
    order = np.random.default_rng(6).permutation(90)
    if dense:
        permuted = dense_feedback(case.hessian, order)
        straight = dense_feedback(case.hessian[np.ix_(order, order)])
    else:
        permuted = low_rank_feedback(case.remainder, case.vectors, order)
        straight = low_rank_feedback(case.remainder[order], case.vectors[order])
    codes = case.refined(permuted, sweeps=1).codes
    moved = compiled.refine(case.weight[:, order], case.scale, case.column_group[order], straight, grid, sweeps=1).codes
    np.testing.assert_array_equal(codes[:, order], moved)


def nearest_by_the_formats(weight: torch.Tensor, grid: str):
    """(codes, scale, multiplier) [rows, N], [rows, 1] as the encoders of `streamquant.formats` make them."""
    absmax = weight.abs().amax(1)
    if grid == "int8":
        scale = absmax / 127
        return int8.encode(weight, scale), scale, None
    if grid == "e4m3":
        multiplier = 448 / absmax
        return fp8.encode(weight, multiplier, "e4m3").view(torch.uint8), 1 / multiplier, multiplier
    packed, absmax = bnb4.encode(weight.flatten(), weight.shape[1], grid)
    return torch.stack([packed >> 4, packed & 15], dim=1).view(weight.shape), absmax, None


@pytest.mark.parametrize("strength", [1.0, 7.3])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_identity_gives_nearest_bit_for_bit(grid, strength):
    weight = torch.from_numpy(layer(64, 128, 0, grid, seed=7).weight)
    codes, scale, multiplier = nearest_by_the_formats(weight, grid)
    multiplier = None if multiplier is None else multiplier[:, None].numpy()
    whole = np.zeros(128, dtype=np.int64)
    for feedback in (
        low_rank_feedback(np.full(128, strength), np.zeros((128, 0))),
        dense_feedback(np.eye(128) * strength),
    ):
        for sweeps in (0, 2):
            refined = compiled.refine(weight.numpy(), scale[:, None].numpy(), whole, feedback, grid, multiplier, sweeps)
            np.testing.assert_array_equal(refined.codes, codes.numpy())


def test_every_e4m3_value_and_boundary_rounds_as_torch_does():
    bits = np.arange(0, 0x7F800000, 99_991, dtype=np.uint32)
    points = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    middles = (points[1:] + points[:-1]) / 2
    ties = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9))])
    values = np.concatenate([bits.view(np.float32), points, ties, [448.0, 464.0, 1e30]]).astype(np.float32)
    values = np.concatenate([values, -values])[None]
    feedback = low_rank_feedback(np.ones(values.shape[1]), np.zeros((values.shape[1], 0)))
    codes = compiled.refine(
        values, np.ones((1, 1), np.float32), np.zeros(values.shape[1], np.int64), feedback, "e4m3"
    ).codes
    expected = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes, expected)


def test_groups_of_nothing_but_zeros_are_rounded_to_zero():
    for grid in GRIDS:
        case = layer(5, 96, 4, grid, seed=8)
        case.weight[:, :48] = 0.0
        scale = case.scale.copy()
        scale[:, 0] = 0.0 if grid in ("nf4", "fp4") else 1e-12
        multiplier = 1 / np.maximum(scale, np.float32(1e-38))
        feedback = low_rank_feedback(np.ones(96), np.zeros((96, 1)))
        codes = compiled.refine(case.weight, scale, case.column_group, feedback, grid, multiplier).codes
        decoded = type(case)(case.weight, scale, case.column_group, grid, case.remainder, case.vectors).decoded(codes)
        assert (decoded[:, :48] == 0).all()


def test_gains_solve_the_problem_they_are_for():
    case = layer(1, 60, 5, "int8", seed=9)
    gains, pivots = prepare(case.remainder, case.vectors)
    upper = np.eye(60) + np.triu(case.vectors @ gains.T, 1)
    np.testing.assert_allclose(upper @ np.diag(pivots) @ upper.T, case.hessian, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_remainder_that_is_not_positive_is_refused(bad):
    with pytest.raises(ValueError, match="positive"):
        prepare(np.array([1.0, bad]), np.zeros((2, 1)))


def test_a_matrix_that_is_not_positive_definite_is_refused():
    with pytest.raises(ValueError, match="positive definite"):
        dense_feedback(np.array([[1.0, 2.0], [2.0, 1.0]]))
