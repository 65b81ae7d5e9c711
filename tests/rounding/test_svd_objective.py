"""The peer's objective: singular vectors against LAPACK's, coordinate descent against one written with matrices."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import layer
from small_weights import SmallWeights

from streamquant.kernels import svd_descent as reference
from streamquant.kernels.jit import svd_descent as compiled
from streamquant.kernels.refined import GRIDS
from streamquant.kernels.svd_descent import GROUP_ROWS, grid_steps
from streamquant.rounding import svd


@functools.cache
def decomposition(raw: bytes, rows: int) -> tuple[np.ndarray, np.ndarray]:
    left, _, right = np.linalg.svd(np.frombuffer(raw, dtype=np.float32).reshape(rows, -1), full_matrices=False)
    return left, right


def vectors(case, rank: int) -> tuple[np.ndarray, np.ndarray]:
    left, right = decomposition(case.weight.tobytes(), len(case.weight))
    return left[:, :rank].copy(), right[:rank].T.copy()


def descend(module, case, rank: int, rows: slice = slice(None), **options):
    left, right = vectors(case, rank)
    return module.svd_descent(case.weight[rows], case.scale[rows], case.column_group, left[rows], right, case.grid, **options)


def objective(case, codes: np.ndarray, rank: int, rows: slice) -> float:
    """‖U_gᵀ E_g V‖² of one group of rows, from the definition."""
    left, right = vectors(case, rank)
    error = (case.decoded(codes) - case.weight)[rows]
    return float(np.square(left[rows].T.astype(np.float64) @ error @ right).sum())


def neighbours(case) -> np.ndarray:
    """The values of the grid, ascending, float64."""
    if case.grid == "int8":
        return np.arange(-127.0, 128.0)
    if case.grid == "e4m3":
        codes = torch.arange(256, dtype=torch.uint8)
        values = codes[(codes & 127) != 127].view(torch.float8_e4m3fn).double().numpy()
        return np.unique(values)
    from streamquant.kernels.codebooks import CODE_BOOKS

    return np.unique(CODE_BOOKS[case.grid].astype(np.float64))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_ladder_is_the_grid(grid):
    case = layer(1, 4, 0, grid, seed=0)
    steps = grid_steps(grid)
    np.testing.assert_array_equal(steps.values, neighbours(case).astype(np.float32))
    codes = steps.codes.view(np.int8) if grid == "int8" else steps.codes
    ones = type(case)(np.zeros((1, codes.size), np.float32), np.ones((1, 1), np.float32), np.zeros(codes.size, np.int64), grid, None, None)
    np.testing.assert_array_equal(ones.decoded(codes[None])[0], steps.values)
    every = np.flatnonzero(steps.ranks >= 0).astype(np.uint8)
    assert every.size == {"int8": 255, "e4m3": 254, "nf4": 16, "fp4": 16}[grid]
    ones = type(case)(np.zeros((1, every.size), np.float32), np.ones((1, 1), np.float32), np.zeros(every.size, np.int64), grid, None, None)
    np.testing.assert_array_equal(ones.decoded((every.view(np.int8) if grid == "int8" else every)[None])[0], steps.values[steps.ranks[every]])


@settings(max_examples=25)
@given(
    st.one_of(st.integers(1, 6), st.sampled_from([127, 128, 129, 200])), st.integers(1, 24), st.sampled_from([1, 3, 8, 11]),
    st.sampled_from(GRIDS), st.integers(0, 3), st.integers(0, 1 << 20),
)  # fmt: skip
def test_compiled_codes_are_the_definitions(rows, columns, rank, grid, sweeps, seed):
    case = layer(rows, columns, 0, grid, seed, group=7)
    fast, slow = (descend(module, case, rank, sweeps=sweeps) for module in (compiled, reference))
    assert fast.codes.dtype == slow.codes.dtype
    np.testing.assert_array_equal(fast.codes, slow.codes)
    np.testing.assert_allclose(fast.before, slow.before, rtol=1e-9)
    np.testing.assert_allclose(fast.after, slow.after, rtol=1e-9)


@pytest.mark.parametrize("grid", GRIDS)
def test_it_begins_at_nearest_and_goes_down(grid):
    case = layer(300, 90, 0, grid, seed=1)
    groups = [slice(0, 128), slice(128, 256), slice(256, 300)]
    nearest = descend(compiled, case, 20, sweeps=0)
    np.testing.assert_array_equal(nearest.codes, case.nearest())
    reached = [objective(case, nearest.codes, 20, rows) for rows in groups]
    np.testing.assert_allclose(nearest.after, reached, rtol=1e-4)
    for sweeps in (1, 2, 3):
        found = descend(compiled, case, 20, sweeps=sweeps)
        now = [objective(case, found.codes, 20, rows) for rows in groups]
        np.testing.assert_allclose(found.after, now, rtol=1e-3, atol=1e-4 * max(reached))
        np.testing.assert_array_equal(found.before, nearest.after)
        assert (found.after <= reached).all()
        reached = found.after
    assert (reached < 0.1 * nearest.after).all()
    # The upper bound of the whole objective, which is therefore lower too.
    assert np.sqrt(objective(case, found.codes, 20, slice(None))) <= np.sqrt(found.after).sum() * (1 + 1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_in_the_end_no_single_step_helps(grid):
    # By brute force, over every code and both of its neighbours.
    case, rank = layer(4, 6, 0, grid, seed=2), 2
    found = descend(compiled, case, rank, sweeps=200)
    values, scale = neighbours(case), case.scale.astype(np.float64)[:, case.column_group]
    best = objective(case, found.codes, rank, slice(None))
    left, right = (part.astype(np.float64) for part in vectors(case, rank))
    decoded = case.decoded(found.codes)
    for row in range(4):
        for column in range(6):
            place = np.abs(values - decoded[row, column] / scale[row, column]).argmin()
            for other in (place - 1, place + 1):
                if 0 <= other < values.size:
                    tried = decoded.copy()
                    tried[row, column] = values[other] * scale[row, column]
                    moved = float(np.square(left.T @ (tried - case.weight) @ right).sum())
                    assert moved >= best * (1 - 1e-6) - 1e-15


@pytest.mark.parametrize("grid", ["int8", "nf4"])
def test_one_sweep_is_that_of_matrices(grid):
    # Every step forms UᵀEV anew from whole matrices.
    case, rank = layer(5, 12, 0, grid, seed=3), 3
    values, scale = neighbours(case), case.scale.astype(np.float64)[:, case.column_group]
    left, right = (part.astype(np.float64) for part in vectors(case, rank))
    decoded = case.decoded(case.nearest())
    for row in range(5):
        for column in range(12):
            place = np.abs(values - decoded[row, column] / scale[row, column]).argmin()
            tries = []
            for other in (place, place - 1, place + 1):
                if 0 <= other < values.size:
                    tried = decoded.copy()
                    tried[row, column] = values[other] * scale[row, column]
                    tries.append((float(np.square(left.T @ (tried - case.weight) @ right).sum()), tried))
            decoded = min(tries, key=lambda pair: pair[0])[1]
    np.testing.assert_allclose(case.decoded(descend(compiled, case, rank, sweeps=1).codes), decoded, rtol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_how_groups_are_tiled_changes_nothing(grid):
    case = layer(3 * GROUP_ROWS + 5, 40, 0, grid, seed=4)
    whole = descend(compiled, case, 9)
    for cuts in ([GROUP_ROWS], [GROUP_ROWS, 3 * GROUP_ROWS], [2 * GROUP_ROWS]):
        spans = zip([0, *cuts], [*cuts, len(case.weight)], strict=True)
        parts = [descend(compiled, case, 9, slice(begin, end)) for begin, end in spans]
        np.testing.assert_array_equal(np.concatenate([part.codes for part in parts]), whole.codes)
        np.testing.assert_array_equal(np.concatenate([part.after for part in parts]), whole.after)


def test_a_multiplier_and_a_negative_scale_are_minded():
    case = layer(20, 30, 0, "nf4", seed=5)
    left, right = vectors(case, 4)
    plain = compiled.svd_descent(case.weight, case.scale, case.column_group, left, right, "nf4", sweeps=0)
    shrunk = compiled.svd_descent(case.weight, case.scale, case.column_group, left, right, "nf4", 0.5 / case.scale, sweeps=0)
    assert (plain.codes != shrunk.codes).any()
    for module in (compiled, reference):
        found = module.svd_descent(case.weight, -case.scale, case.column_group, left, right, "nf4", sweeps=2)
        assert found.after[0] < 0.1 * found.before[0]
        mirrored = type(case)(case.weight, -case.scale, case.column_group, "nf4", None, None)
        assert objective(mirrored, found.codes, 4, slice(None)) == pytest.approx(found.after[0], rel=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(90, 60), (60, 90)])
def test_singular_vectors_are_lapacks(rows, columns, monkeypatch):
    rng, weights = np.random.default_rng(6), SmallWeights()
    left, right = (np.linalg.qr(rng.standard_normal((size, 40)))[0] for size in (rows, columns))
    weights["layer.weight"] = ((left * 0.7 ** np.arange(40)) @ right.T).astype(np.float32)
    monkeypatch.setattr("streamquant.rounding.weights.CHUNK_ELEMENTS", 7 * columns)
    found = svd.prepare(weights, "layer", rank=6)
    assert found.left.shape == (rows, 6) and found.right.shape == (columns, 6)
    for ours, exact in ((found.left, left), (found.right, right)):
        np.testing.assert_allclose(np.abs(ours.T @ exact[:, :6]), np.eye(6), atol=2e-3)
    values = np.einsum("mk,mn,nk->k", found.left, weights["layer.weight"], found.right)
    np.testing.assert_allclose(values, 0.7 ** np.arange(6), rtol=1e-4)


def test_a_rank_beyond_the_weights_own():
    weights = SmallWeights()
    weights.linear("layer", 9, 5, np.random.default_rng(7))
    found = svd.prepare(weights, "layer", rank=64)
    assert found.left.shape == (9, 5) and found.right.shape == (5, 5)
    np.testing.assert_allclose(found.left @ (found.left.T @ weights["layer.weight"]), weights["layer.weight"], atol=1e-5)


def test_no_weight_no_objective():
    weights = SmallWeights()
    weights.linear("layer", 9, 5, np.random.default_rng(8))
    assert svd.prepare(weights, "other") is None
    weights.quantized = {"layer.weight"}
    assert svd.prepare(weights, "layer") is None
    weights.quantized = set()
    weights["layer.weight"][2, 3] = np.inf
    assert svd.prepare(weights, "layer") is None
