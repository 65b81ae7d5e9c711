"""The backend of Triton kernels: the bytes of the CPU's backend, operation by operation and format by format."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from encode_whole import encode_whole
from hypothesis import given
from hypothesis import strategies as st
from layers import layer
from same import FEW, assert_same, matrices
from tiles import JIT, TORCH, dtypes, kinds, loads, raw_bytes, seeds, weights

from streamquant import kernels
from streamquant.formats.bnb4 import BnbFP4, BnbNF4
from streamquant.formats.fp8 import Float8Block3d, Float8BlockWise, Float8E5M2, Float8RowWise, Float8TensorWise
from streamquant.formats.int8 import Int8BlockWise, Int8TensorWise
from streamquant.kernels import ErrorSums, TorchBackend
from streamquant.kernels import gpu as package
from streamquant.kernels.absmax import group_absmax as reference_absmax
from streamquant.kernels.gpu import absmax
from streamquant.kernels.gpu.backend import GpuBackend
from streamquant.kernels.refined import GRIDS

LAYOUTS = [
    Float8TensorWise(),
    Float8E5M2(),
    Float8RowWise(),
    Float8BlockWise(16),
    Float8Block3d(16),
    Int8TensorWise(),
    Int8TensorWise(per_row=False),
    Int8BlockWise(block_size=16),
    BnbNF4(64),
    BnbNF4(64, double_quant=True),
    BnbFP4(4096),
]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@pytest.fixture(scope="module")
def gpu(device) -> GpuBackend:
    return GpuBackend(device)


def host(gpu: GpuBackend, tile: torch.Tensor) -> torch.Tensor:
    """A tile of the backend's on the CPU, when the backend's own stream is done with it."""
    with gpu._context():
        return tile.cpu()


@FEW
@given(matrices())
def test_absmax(device, tile):
    assert_same(absmax.group_absmax(tile.to(device)), reference_absmax(tile))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_absmax_of_long_groups(device, special):
    tile = weights("gauss", 3 * 5000, "F32", 1).view(3, 5000)
    tile[1, 4500] = special
    assert_same(absmax.group_absmax(tile.to(device)), reference_absmax(tile))


@FEW
@given(st.sampled_from(LAYOUTS), kinds, dtypes, st.integers(1, 3), st.integers(1, 5), seeds)
def test_formats(gpu, layout, kind, dtype, rows, columns, seed):
    weight = weights(kind, rows * columns * 256, dtype, seed).view(rows * 16, columns * 16)
    ours, cpu = encode_whole(layout, weight, gpu), encode_whole(layout, weight, JIT)
    assert ours.raw() == cpu.raw() and ours.finite == cpu.finite
    # 1e-60: sums of squares of subnormals underflow, and matter to nobody.
    assert ours.sums.error == pytest.approx(cpu.sums.error, rel=1e-3, abs=1e-12 * cpu.sums.weight + 1e-60)
    assert ours.sums.weight == pytest.approx(cpu.sums.weight, rel=1e-3, abs=1e-60)


@each_layout
@pytest.mark.parametrize("special", [float("nan"), -float("inf")])
def test_what_is_not_finite(gpu, layout, special):
    weight = weights("gauss", 64 * 64, "BF16", 1).view(64, 64)
    weight[30, 7] = special
    ours, cpu = encode_whole(layout, weight, gpu), encode_whole(layout, weight, JIT)
    assert not ours.finite and not cpu.finite
    for suffix, tensor in cpu.tensors.items():
        assert_same(ours.tensors[suffix], tensor, suffix)


@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("elements", [640, 640 + 17])
def test_given_scales(gpu, book, elements):
    """Some too small, so that weights saturate, some too large, one zero."""
    flat = weights("gauss", elements, "F32", 1)
    flat[:64] = 0.0
    given = np.random.default_rng(2).uniform(0.01, 0.08, -(-elements // 64)).astype(np.float32)
    given[0] = 0.0
    jit_tile, torch_tile = loads(flat)
    sums, expected_sums = ErrorSums(), ErrorSums()
    packed, found = gpu.bnb4(torch_tile.to(gpu.device), 64, book, sums, given)
    expected, expected_found = JIT.bnb4(jit_tile, 64, book, expected_sums, given.copy())
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(found, expected_found)
    assert sums.error == pytest.approx(expected_sums.error, rel=1e-4)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_rotation_and_matrix(gpu, dtype):
    tile = gpu.load(raw_bytes(weights("gauss", 6 * 512, dtype, 3)), dtype)
    expected = TORCH.rotate(host(gpu, tile), 256)
    rotated = gpu.rotate(tile, 256)
    assert rotated.shape == (6 * 512,)
    assert_same(host(gpu, rotated), expected)
    matrix = gpu.matrix(rotated, 512)
    assert matrix.shape == (6, 512) and matrix.dtype == torch.float32


@pytest.mark.parametrize("grid", GRIDS)
def test_refinement(gpu, grid):
    """Numpy arrays in and out; a scale that one element of memory spreads over all rows."""
    case = layer(5, 12, 4, grid, seed=1, group=12)
    feedback = case.feedback()
    scale = np.broadcast_to(case.scale.max(), (5, 1))
    tile = gpu.load(raw_bytes(torch.from_numpy(case.weight)), "F32")
    for multiplier in (None, np.broadcast_to(1 / case.scale.max(), (5, 1))):
        arguments = scale, case.column_group, feedback, grid, multiplier, 1, True
        ours, expected = gpu.refine(gpu.matrix(tile, 12), *arguments), JIT.refine(case.weight, *arguments)
        np.testing.assert_array_equal(ours.codes, expected.codes)
        np.testing.assert_allclose(ours.before, expected.before, rtol=1e-12)
        np.testing.assert_allclose(ours.after, expected.after, rtol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_refinement_without_knowledge_is_nearest(gpu, grid):
    case = layer(5, 40, 0, grid, seed=2, group=16)
    feedback = case.feedback()
    matrix = gpu.matrix(gpu.load(raw_bytes(torch.from_numpy(case.weight)), "F32"), 40)
    for guard in (False, True):
        arguments = case.scale, case.column_group, feedback, grid, None, 0, guard
        ours, expected = gpu.refine(matrix, *arguments), JIT.refine(case.weight, *arguments)
        np.testing.assert_array_equal(ours.codes, expected.codes)
        np.testing.assert_allclose(ours.before, expected.before, rtol=1e-12)
        np.testing.assert_allclose(ours.after, expected.after, rtol=1e-6)


def test_the_error_of_codes(gpu):
    case = layer(9, 64, 2, "e4m3", seed=3)
    codes, sums, expected = case.nearest(), ErrorSums(), ErrorSums()
    matrix = gpu.matrix(gpu.load(raw_bytes(torch.from_numpy(case.weight)), "F32"), 64)
    gpu.measure_codes(matrix, codes, case.scale, case.column_group, "e4m3", sums)
    JIT.measure_codes(case.weight, codes, case.scale, case.column_group, "e4m3", expected)
    assert sums.error == pytest.approx(expected.error, rel=1e-4)


def test_workers_with_a_backend_each_do_not_disturb_one_another(device):
    tensors = [weights("gauss", 4096, "BF16", seed) for seed in range(8)]

    def encode(backend, tensor):
        return backend.bnb4(backend.load(raw_bytes(tensor), "BF16"), 64, "nf4", ErrorSums())[0]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tensor: encode(GpuBackend(device), tensor), tensors))
    for tensor, packed in zip(tensors, found, strict=True):
        assert np.array_equal(packed, encode(JIT, tensor))


def test_what_is_available_says_who_runs_what_and_why_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(package, "why_not", lambda device="cuda": None)
    report = kernels.available()
    assert report["Triton (CUDA)"] == "yes" and report["refinement (CUDA)"] == "Triton"
    monkeypatch.setattr(package, "why_not", lambda device="cuda": "triton is not installed")
    report = kernels.available()
    assert report["Triton (CUDA)"] == "triton is not installed"
    assert report["refinement (CUDA)"] == "plain torch: triton is not installed"


def test_triton_is_chosen_where_it_runs(monkeypatch, device):
    monkeypatch.setattr(TorchBackend, "__init__", lambda self, device: None)
    monkeypatch.setattr(package, "why_not", lambda device="cuda": None)
    assert type(kernels.select("cuda")) is GpuBackend
    monkeypatch.setattr(package, "why_not", lambda device="cuda": "no")
    assert type(kernels.select("cuda")) is TorchBackend
