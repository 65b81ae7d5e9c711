"""H made fit for rounding: shrinkage, rotation, order."""

from __future__ import annotations

import numpy as np
import pytest

from streamquant.calibration import LayerStatistics
from streamquant.calibration.sketch import probe
from streamquant.rounding import LayerHessian

N = 48


def inputs(count: int = 4000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, 6)) @ rng.standard_normal((6, N))
    return mixed + 0.1 * rng.standard_normal((count, N)) * np.exp(rng.standard_normal(N)) + 0.5


def statistics(x: np.ndarray, dense: bool = False) -> LayerStatistics:
    exact = x.T @ x / len(x)
    moments = {"hessian": exact} if dense else {"sketch": (exact @ probe(N, 24, 0)).astype(np.float32)}
    return LayerStatistics(len(x), x.mean(0), np.diagonal(exact).astype(np.float32), **moments)


def full(hessian: LayerHessian) -> np.ndarray:
    return (
        hessian.matrix
        if hessian.matrix is not None
        else np.diag(hessian.remainder) + hessian.vectors @ hessian.vectors.T
    )


def hadamard(size: int) -> np.ndarray:
    block = np.ones((1, 1))
    while len(block) < size:
        block = np.block([[block, block], [block, -block]])
    return block / np.sqrt(size)


@pytest.fixture(params=[False, True], ids=["sketch", "dense"])
def hessian(request) -> LayerHessian:
    return LayerHessian.of(statistics(inputs(), request.param), rank=16, dense=request.param)


def test_the_low_rank_form_is_near_the_exact_one(hessian):
    exact = inputs().T @ inputs() / 4000
    np.testing.assert_allclose(np.diagonal(full(hessian)), np.diagonal(exact), rtol=1e-4)
    # What is left is the noise between columns that no column of V holds.
    assert np.linalg.norm(full(hessian) - exact) < 3e-3 * np.linalg.norm(exact)


def test_shrinkage_is_the_stated_blend(hessian):
    mean = np.trace(full(hessian)) / N
    for strength in (0.0, 0.1, 0.4, 1.0):
        expected = (1 - strength) * full(hessian) + strength * mean * np.eye(N)
        np.testing.assert_allclose(full(hessian.shrunk(strength)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("count", "expected"), [(10, 0.5), (60, 0.4), (100, 0.24), (10_000, 0.03)])
def test_a_dense_h_of_few_inputs_is_shrunk_more(count, expected):
    assert LayerHessian.of(statistics(inputs(count), dense=True), dense=True).shrinkage == pytest.approx(expected)
    assert LayerHessian.of(statistics(inputs(count))).shrinkage == 0.1


def test_a_whole_h_gives_a_low_rank_form_too():
    hessian = LayerHessian.of(statistics(inputs(), dense=True), rank=8)
    assert hessian.matrix is None and hessian.vectors.shape == (N, 8)
    np.testing.assert_allclose(hessian.diagonal, np.diagonal(inputs().T @ inputs() / 4000), rtol=1e-5)


@pytest.mark.parametrize("size", [8, 16])
def test_rotation_follows_the_inputs(hessian, size):
    block = hadamard(size)
    whole = np.kron(np.eye(N // size), block)
    turned = hessian.rotated(block)
    assert np.trace(full(turned)) == pytest.approx(np.trace(full(hessian)))
    if hessian.matrix is not None:
        np.testing.assert_allclose(full(turned), whole.T @ full(hessian) @ whole, atol=1e-9)
    else:
        np.testing.assert_allclose(turned.vectors, whole.T @ hessian.vectors, atol=1e-12)
        np.testing.assert_allclose(
            turned.remainder, np.diagonal(whole.T @ np.diag(hessian.remainder) @ whole), atol=1e-12
        )


def test_rotation_by_anything_else_is_refused(hessian):
    with pytest.raises(ValueError, match="orthogonal"):
        hessian.rotated(2 * np.eye(8))
    with pytest.raises(ValueError, match="divisible"):
        hessian.rotated(np.eye(7))


def test_columns_are_visited_by_falling_energy(hessian):
    order = hessian.act_order()
    assert sorted(order) == list(range(N))
    assert (np.diff(hessian.diagonal[order]) <= 0).all()
    np.testing.assert_array_equal(hessian.feedback().order, order)
    np.testing.assert_array_equal(hessian.feedback(act_order=False).order, np.arange(N))


def test_output_error_is_what_the_inputs_say():
    x, error = inputs(), np.random.default_rng(1).standard_normal((5, N))
    expected = np.square(x @ error.T).mean(0)
    exact = LayerHessian.of(statistics(x, dense=True), dense=True)
    np.testing.assert_allclose(exact.output_error(error), expected, rtol=1e-6)
    np.testing.assert_allclose(LayerHessian.of(statistics(x), rank=16).output_error(error), expected, rtol=1e-2)


def test_a_layer_that_saw_only_zeros_is_rounded_to_nearest():
    silent = LayerStatistics(9, np.zeros(N), np.zeros(N), np.zeros((N, 24), np.float32))
    hessian = LayerHessian.of(silent).shrunk()
    assert (hessian.remainder == hessian.remainder[0]).all() and hessian.remainder[0] > 0 and not hessian.vectors.any()
