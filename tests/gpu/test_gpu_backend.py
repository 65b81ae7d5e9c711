"""On a CUDA device the same bytes as on the CPU: of every operation, and of every format."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from encode_whole import encode_whole
from hypothesis import given
from hypothesis import strategies as st
from tiles import JIT, KINDS, QUICK, all_bf16, dtypes, kinds, raw_bytes, seeds, weights

from streamquant.formats.bnb4 import BnbFP4, BnbNF4
from streamquant.formats.fp8 import Float8Block3d, Float8BlockWise, Float8E5M2, Float8RowWise, Float8TensorWise
from streamquant.formats.int8 import Int8BlockWise, Int8TensorWise
from streamquant.kernels import ErrorSums, TorchBackend, gpu, select

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here")

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


@pytest.fixture(scope="module", params=["torch", "selected"])
def backend(request) -> TorchBackend:
    """Plain torch on the device, and what is chosen for it: Triton kernels where they run."""
    return TorchBackend("cuda") if request.param == "torch" else select("cuda")


def check(layout, weight: torch.Tensor, backend: TorchBackend, tile_elements: int | None = None) -> None:
    ours, cpu = encode_whole(layout, weight, backend, tile_elements), encode_whole(layout, weight, JIT, tile_elements)
    for suffix, data in cpu.raw().items():
        assert ours.raw()[suffix] == data, suffix
    assert ours.finite == cpu.finite
    # 1e-60: the compiled path's sums of squares of subnormals underflow, and matter to nobody.
    assert ours.sums.error == pytest.approx(cpu.sums.error, rel=1e-3, abs=1e-12 * cpu.sums.weight + 1e-60)
    assert ours.sums.weight == pytest.approx(cpu.sums.weight, rel=1e-3, abs=1e-60)


def test_select_gives_triton_on_the_device_where_it_runs():
    chosen = select("cuda")
    assert chosen.name == ("triton" if gpu.why_not() is None else "torch")
    assert chosen.device.type == "cuda"


@each_layout
@QUICK
@given(kind=kinds, dtype=dtypes, rows=st.integers(1, 6), columns=st.integers(1, 60), seed=seeds)
def test_every_format_writes_the_bytes_of_the_cpu(backend, layout, kind, dtype, rows, columns, seed):
    rows, columns = rows * 16, columns * 16
    check(layout, weights(kind, rows * columns, dtype, seed).view(rows, columns), backend)


@each_layout
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_large_tiles_one_after_another(backend, layout, kind):
    """Several tiles through one staging buffer, none waiting for a person to synchronize."""
    weight = weights(kind, 1024 * 2048, "BF16", seed=1).view(1024, 2048)
    grain = layout.granularity((1024, 2048), "BF16")
    check(layout, weight, backend, tile_elements=math.ceil((1 << 19) / grain) * grain)


@each_layout
def test_every_bf16_pattern_but_nan(backend, layout):
    patterns = all_bf16()
    finite = patterns[patterns.isfinite()]
    finite = torch.cat([finite, finite[: (1 << 16) - finite.numel()]])
    check(layout, finite.view(256, 256), backend)


@each_layout
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_special_values(backend, layout, dtype, special):
    """The rare path that mends NaN runs on the backend's stream like any other."""
    weight = weights("gauss", 512 * 512, dtype, seed=1).view(512, 512)
    weight[300, 7] = special
    ours, cpu = encode_whole(layout, weight, backend), encode_whole(layout, weight, JIT)
    assert not ours.finite and not cpu.finite
    for suffix, tensor in cpu.tensors.items():
        other = ours.tensors[suffix]
        if tensor.dtype == torch.float32:  # an absmax may be a NaN, of whatever payload
            assert torch.equal(other.nan_to_num(nan=-1.0), tensor.nan_to_num(nan=-1.0)), suffix
        else:
            assert raw_bytes(other) == raw_bytes(tensor), suffix


@pytest.mark.parametrize("dtype", ["BF16", "F64"])
def test_a_tile_survives_the_loading_of_the_next(backend, dtype):
    """The staging buffer is used again while nothing has been computed yet."""
    tensors = [weights("gauss", 1 << 22, dtype, seed=seed) for seed in range(4)]
    tiles = [backend.load(raw_bytes(tensor), dtype) for tensor in tensors]
    for tensor, tile in zip(tensors, tiles, strict=True):
        expected = JIT.absmax(JIT.load(raw_bytes(tensor), dtype), 1024)
        assert np.array_equal(backend.absmax(tile, 1024), expected)


def test_workers_with_a_backend_each_do_not_disturb_one_another():
    tensors = [weights("gauss", 1 << 20, "BF16", seed=seed) for seed in range(16)]

    def encode(backend, tensor):
        sums = ErrorSums()
        return [backend.bnb4(backend.load(raw_bytes(tensor), "BF16"), 64, "nf4", sums)[0] for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tensor: encode(select("cuda"), tensor), tensors))
    for tensor, results in zip(tensors, found, strict=True):
        expected = encode(JIT, tensor)[0]
        assert all(np.array_equal(result, expected) for result in results)
