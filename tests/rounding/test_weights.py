"""Rows of a checkpoint's weights as float32, and what they do to inputs, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_weights import SmallWeights

from streamquant.checkpoint.reader import TileReader, open_checkpoint
from streamquant.rounding import weights as module
from streamquant.rounding.weights import ACTIVATIONS, CheckpointWeights, linear, matrix_shape

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(37, 12, generator=generator) * torch.logspace(-30, 3, 12)
    return {
        "bf16.weight": values.to(torch.bfloat16), "f16.weight": values.to(torch.float16), "f32.weight": values, "f64.weight": values.double(),
        "f32.bias": values[:, 0].contiguous(), "fp8.weight": values.to(torch.float8_e4m3fn), "int8.weight": torch.ones(4, 4, dtype=torch.int8),
        "conv.weight": torch.randn(5, 3, 2, 2, generator=generator),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_file(tensors, folder / "bare.safetensors")
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, folder / "prefixed.safetensors")
    return folder


@pytest.fixture(params=[("bare", "", "mmap"), ("prefixed", PREFIX, "pread")], ids=["bare", "prefixed"])
def weights(request, folder):
    file, prefix, io = request.param
    with TileReader(open_checkpoint(folder / f"{file}.safetensors"), io) as reader:
        yield CheckpointWeights(reader, prefix)


def test_rows_are_the_tensors_own(weights, tensors):
    for name in ("bf16.weight", "f16.weight", "f32.weight", "f64.weight", "f32.bias", "conv.weight"):
        assert weights.shape(name) == tuple(tensors[name].shape) and name in weights
        for begin, end in ((0, 5), (2, 3), (3, 5), (0, len(tensors[name]))):
            rows = weights.rows(name, begin, end)
            assert rows.dtype == np.float32 and rows.flags.writeable
            np.testing.assert_array_equal(rows, tensors[name][begin:end].float().numpy())


def test_codes_without_scales_are_no_weights(weights):
    for name in ("fp8.weight", "int8.weight"):
        assert weights.shape(name) is None and name in weights
    assert weights.shape("absent.weight") is None and "absent.weight" not in weights
    assert matrix_shape(weights, "conv") is None and matrix_shape(weights, "fp8") is None
    assert matrix_shape(weights, "bf16") == (37, 12)


@settings(max_examples=40)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 6), st.booleans(), st.sampled_from(["float32", "float64"]))
def test_a_layer_in_chunks_is_the_layer(rows, columns, count, bias, dtype):
    rng, small = np.random.default_rng(rows), SmallWeights()
    small.linear("layer", rows, columns, rng, bias)
    x = rng.standard_normal((count, columns)).astype(dtype)
    whole = x.astype(np.float64) @ small["layer.weight"].astype(np.float64).T + small.get("layer.bias", 0.0)
    usual, module.CHUNK_ELEMENTS = module.CHUNK_ELEMENTS, 3 * columns
    try:
        found = linear(small, "layer", x)
    finally:
        module.CHUNK_ELEMENTS = usual
    assert found.dtype == x.dtype
    np.testing.assert_allclose(found, whole, rtol=1e-4 if dtype == "float32" else 1e-12, atol=1e-5 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize(("name", "expected"), [("silu", torch.nn.functional.silu), ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh"))])
def test_activations(name, expected):
    values = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, -100.0, 100.0, 1e4]])
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-6)):
        found = ACTIVATIONS[name](values.astype(dtype))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected(torch.from_numpy(values)).numpy(), rtol=tolerance, atol=tolerance)
