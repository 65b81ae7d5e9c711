"""The error every encoder reports, against the truth: decode the codes, subtract in float64, square, add."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from tiles import JIT, TORCH, loads, weights

from streamquant.kernels import ErrorSums
from streamquant.kernels.codebooks import CODE_BOOKS

BACKENDS = pytest.mark.parametrize("backend", [JIT, TORCH], ids=lambda backend: backend.name)
DTYPES = pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])

KINDS = ["gauss", "wide", "outlier", "sparse", "ties", "constant"]


def tile_of(backend, tensor: torch.Tensor):
    return loads(tensor)[0 if backend is JIT else 1]


def check(sums: ErrorSums, decoded: np.ndarray, tensor: torch.Tensor) -> None:
    weight = tensor.float().double().numpy()
    error = ((decoded.astype(np.float64) - weight) ** 2).sum()
    # Both sums are made of float32 quotients, so an error that is none at all may come out as some 1e-15 of the weight.
    assert sums.error == pytest.approx(error, rel=1e-4, abs=1e-13 * (weight**2).sum())
    assert sums.weight == pytest.approx((weight**2).sum(), rel=1e-4)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_fp8(backend, dtype, kind, grid):
    fp8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[grid]
    for group, groups in ((5000, 3), (33, 40)):
        tensor = weights(kind, group * groups, dtype, seed=group)
        absmax = tensor.float().abs().view(groups, group).amax(dim=1).numpy()
        multiplier = np.float32({"e4m3": 448, "e5m2": 57344}[grid]) / np.maximum(absmax, np.float32(1e-12))
        scale = np.float32(1) / multiplier
        sums = ErrorSums()
        codes = backend.fp8(tile_of(backend, tensor), group, multiplier, scale, grid, sums)
        decoded = codes.view(fp8).astype(np.float64).reshape(groups, group) * scale[:, None]
        check(sums, decoded.reshape(-1), tensor)


@BACKENDS
@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_fp8_where_every_code_is_subnormal(backend, grid):
    fp8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[grid]
    smallest_normal = float(ml_dtypes.finfo(fp8).smallest_normal)
    tensor = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, 4096) * 0.9 * smallest_normal).float()
    sums, ones = ErrorSums(), np.ones(1, np.float32)
    codes = backend.fp8(tile_of(backend, tensor), 4096, ones, ones, grid, sums)
    check(sums, codes.view(fp8).astype(np.float64), tensor)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_int8(backend, dtype, kind):
    for group, groups in ((5000, 3), (33, 40)):
        tensor = weights(kind, group * groups, dtype, seed=group)
        absmax = tensor.float().abs().view(groups, group).amax(dim=1).numpy()
        scale = np.maximum(absmax / np.float32(127), np.float32(1e-12))
        sums = ErrorSums()
        codes = backend.int8(tile_of(backend, tensor), group, scale, sums)
        check(sums, (codes.reshape(groups, group) * scale[:, None].astype(np.float64)).reshape(-1), tensor)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_bnb4(backend, dtype, kind, book):
    for block_size, elements in ((64, 6401), (4096, 9001), (64, 17)):
        tensor = weights(kind, elements, dtype, seed=elements)
        sums = ErrorSums()
        packed, absmax = backend.bnb4(tile_of(backend, tensor), block_size, book, sums)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:elements]
        check(sums, CODE_BOOKS[book][codes] * np.repeat(absmax.astype(np.float64), block_size)[:elements], tensor)


@BACKENDS
@pytest.mark.parametrize("magnitude", [1e25, 1e-25])
@pytest.mark.parametrize("operation", ["fp8", "int8", "nf4"])
def test_magnitudes_whose_squares_float32_does_not_hold(backend, magnitude, operation):
    """They are finite weights: their sums must be finite, and not zero."""
    tensor = weights("gauss", 4096, "F32", seed=1) * magnitude
    tile, sums = tile_of(backend, tensor), ErrorSums()
    absmax = tensor.abs().amax().view(1).numpy()
    if operation == "nf4":
        backend.bnb4(tile, 64, "nf4", sums)
    elif operation == "int8":
        backend.int8(tile, 4096, absmax / np.float32(127), sums)
    else:
        multiplier = np.float32(448) / absmax
        backend.fp8(tile, 4096, multiplier, np.float32(1) / multiplier, "e4m3", sums)
    assert sums.weight == pytest.approx(float((tensor.double() ** 2).sum()), rel=1e-4)
    assert 0.005 < (sums.error / sums.weight) ** 0.5 < 0.15


@BACKENDS
def test_sums_are_added_to(backend):
    """One ErrorSums may serve many tiles."""
    tensor = weights("gauss", 640, "F32", seed=1)
    tile, sums = tile_of(backend, tensor), ErrorSums()
    backend.bnb4(tile, 64, "nf4", sums)
    once = ErrorSums(sums.error, sums.weight)
    backend.bnb4(tile, 64, "nf4", sums)
    assert (sums.error, sums.weight) == pytest.approx((2 * once.error, 2 * once.weight), rel=1e-12)
