"""Method A: the scale of least error among the candidates, weighted or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamquant.formats.fp8 import Float8RowWise
from streamquant.kernels import JitBackend, TorchBackend, why_no_jit
from streamquant.kernels.codebooks import NF4
from streamquant.kernels.search_grid import FP8_STEPS, fp8_candidates, fp8_multiplier
from streamquant.rounding import scales

QUICK = settings(max_examples=30)
BACKENDS = [TorchBackend()] + ([JitBackend()] if why_no_jit() is None else [])
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
shapes = st.tuples(st.integers(1, 9), st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 1000])))


def weights(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, shape) * 0.02).astype(np.float32)


def fp8_errors(backend, runs: np.ndarray, absmax: np.ndarray, importance: np.ndarray) -> np.ndarray:
    return backend.e4m3_errors(backend.load(runs.tobytes(), "F32"), runs.shape[1], absmax, importance)


def nf4_absmax(backend, flat: np.ndarray, size: int, importance: np.ndarray | None = None) -> np.ndarray:
    importance = np.ones((1, size), np.float32) if importance is None else importance
    return backend.book_absmax(backend.load(np.ascontiguousarray(flat).tobytes(), "F32"), size, importance, "nf4")


def e4m3_error(runs: np.ndarray, multiplier: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Weighted squared error of each run in float64, by torch's own float8. multiplier [runs]."""
    codes = torch.from_numpy(runs * multiplier[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).double().numpy()
    return (importance * np.square(codes / multiplier[:, None].astype(np.float64) - runs)).sum(1)


def nf4_error(blocks: np.ndarray, absmax: np.ndarray, importance: np.ndarray) -> np.ndarray:
    book = NF4.astype(np.float64)
    scaled = blocks / absmax[:, None].astype(np.float64)
    nearest = book[np.abs(scaled[..., None] - book).argmin(-1)]
    return (importance * np.square(nearest * absmax[:, None] - blocks)).sum(1)


@each_backend
@QUICK
@given(shape=shapes, weighted=st.booleans(), seed=st.integers(0, 99))
def test_fp8_errors_are_those_of_the_float8_cast(backend, shape, weighted, seed):
    runs = weights(shape, seed)
    diagonal = np.exp(np.random.default_rng(seed).standard_normal(shape[1])) if weighted else None
    importance = scales.run_weights(diagonal, shape[1], shape[1])
    absmax = np.abs(runs).max(1)
    errors = fp8_errors(backend, runs, absmax, importance)
    candidates = fp8_candidates(absmax)
    for candidate in range(FP8_STEPS):
        expected = e4m3_error(runs, candidates[:, candidate], importance)
        np.testing.assert_allclose(errors[:, candidate], expected, rtol=1e-3, atol=1e-12)
    best = e4m3_error(runs, fp8_multiplier(absmax, errors), importance)
    assert (best <= e4m3_error(runs, candidates[:, 0], importance) * (1 + 1e-5) + 1e-12).all()


def test_the_first_candidate_is_the_encoders_own_scale():
    absmax = np.array([0.0, 1e-20, 0.3, 7.0], dtype=np.float32)
    multiplier, _ = Float8RowWise().encoder((4, 8), "F32").scales(absmax)
    np.testing.assert_array_equal(fp8_candidates(absmax)[:, 0], multiplier)


def test_no_candidate_clips():
    runs = weights((50, 128))
    absmax = np.abs(runs).max(1)
    assert (fp8_candidates(absmax) * absmax[:, None] <= 448 * (1 + 1e-6)).all()


@each_backend
@QUICK
@given(
    blocks=st.integers(1, 40),
    size=st.sampled_from([2, 32, 64, 100, 256]),
    short=st.integers(0, 63),
    seed=st.integers(0, 99),
)
def test_nf4_is_never_worse_than_absmax(backend, blocks, size, short, seed):
    flat = weights((1, blocks * size + short), seed)[0]
    found = nf4_absmax(backend, flat, size)
    padded = np.pad(flat, (0, -flat.size % size)).reshape(-1, size)
    absmax = np.abs(padded).max(1)
    assert found.shape == absmax.shape and (found > 0).all()
    assert (nf4_error(padded, found, 1.0) <= nf4_error(padded, absmax, 1.0) * (1 + 1e-5) + 1e-15).all()


@each_backend
def test_nf4_gains_what_it_should(backend):
    blocks = np.random.default_rng(3).standard_normal((2000, 64)).astype(np.float32)
    found = nf4_absmax(backend, blocks.reshape(-1), 64)
    ratio = np.sqrt(nf4_error(blocks, found, 1.0).sum() / nf4_error(blocks, np.abs(blocks).max(1), 1.0).sum())
    assert 0.90 < ratio < 0.95


@each_backend
def test_weights_decide_and_follow_the_columns(backend):
    weight, columns = weights((40, 192), 5), 192
    diagonal = np.exp(2 * np.random.default_rng(6).standard_normal(columns))
    importance = scales.run_weights(diagonal, columns, 64)
    assert importance.shape == (3, 64)
    spread = np.tile(importance, (40, 1))
    blocks = weight.reshape(-1, 64)
    plain, weighted = nf4_absmax(backend, weight, 64), nf4_absmax(backend, weight, 64, importance)
    assert nf4_error(blocks, weighted, spread).sum() < nf4_error(blocks, plain, spread).sum()
    # A tile that begins in the middle of the tensor begins with a row.
    np.testing.assert_array_equal(nf4_absmax(backend, weight[4:], 64, importance), weighted[12:])
    absmax = np.abs(blocks).max(1)
    errors = fp8_errors(backend, blocks, absmax, importance)
    np.testing.assert_array_equal(fp8_errors(backend, blocks[12:], absmax[12:], importance), errors[12:])


def test_blocks_that_do_not_divide_a_row_find_their_columns():
    importance = scales.run_weights(np.arange(1.0, 7.0), 6, 4)
    np.testing.assert_allclose(importance * 3.5, [[1, 2, 3, 4], [5, 6, 1, 2], [3, 4, 5, 6]], rtol=1e-6)


@pytest.mark.skipif(why_no_jit() is not None, reason="numba is not installed: there is nothing to compare with")
def test_the_uncompiled_search_finds_the_same():
    runs = weights((64, 128), 7)
    diagonal = np.exp(np.random.default_rng(8).standard_normal(128))
    importance, absmax = scales.run_weights(diagonal, 128, 128), np.abs(runs).max(1)
    plain, compiled = ((fp8_errors(b, runs, absmax, importance), nf4_absmax(b, runs, 128, importance)) for b in BACKENDS)
    np.testing.assert_allclose(compiled[0], plain[0], rtol=1e-4)
    spread = np.tile(importance, (64, 1))
    np.testing.assert_allclose(nf4_error(runs, compiled[1], spread), nf4_error(runs, plain[1], spread), rtol=1e-4)


@each_backend
def test_zeros_keep_their_absmax(backend):
    np.testing.assert_array_equal(nf4_absmax(backend, np.zeros(128, np.float32), 64), [0, 0])
    assert np.isfinite(
        fp8_errors(backend, np.zeros((2, 64), np.float32), np.zeros(2, np.float32), np.ones((1, 64), np.float32))
    ).all()


@pytest.mark.parametrize(
    ("grid", "mode", "block", "expected"),
    [
        ("e4m3", "row", 0, True), ("e4m3", "block", 64, True), ("e4m3", "block", 128, False), ("e4m3", "tensor", 0,
        False), ("int8", "row", 0, False), ("nf4", "block", 64, True), ("fp4", "block", 64, False),
    ],
)  # fmt: skip
def test_only_what_helps_is_searched(grid, mode, block, expected):
    assert scales.searches(grid, mode, block) is expected


@each_backend
@pytest.mark.parametrize("floor", [0.0, 0.95, 1.0])
def test_no_scale_lies_below_the_floor_and_none_is_worse_than_absmax(backend, floor):
    blocks = weights((500, 64), 11)
    tile = backend.load(blocks.tobytes(), "F32")
    absmax = np.abs(blocks).max(1)
    found = backend.book_absmax(tile, 64, np.ones((1, 64), np.float32), "nf4", floor)
    assert (found >= absmax * np.float32(floor) * np.float32(1 - 1e-6)).all()
    assert (nf4_error(blocks, found, 1.0) <= nf4_error(blocks, absmax, 1.0) * (1 + 1e-5)).all()
    if floor:
        free = backend.book_absmax(tile, 64, np.ones((1, 64), np.float32), "nf4")
        assert (free < absmax * np.float32(floor)).any(), "the floor is what keeps them up"


def test_who_knows_nothing_and_is_careful_searches_nf4_alone():
    assert scales.searches("nf4", "block", 64, careful=True)
    assert not scales.searches("e4m3", "row", careful=True) and not scales.searches("e4m3", "block", 64, careful=True)
