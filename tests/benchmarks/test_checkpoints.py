"""The generator: the real model's names and counts, any size, the same bytes for the same seed, constant memory."""

from __future__ import annotations

import hashlib
import tracemalloc
from math import prod
from pathlib import Path

import numpy as np
import pytest

from benchmarks.checkpoints import write_checkpoint
from benchmarks.shapes import FluxShape, TensorShape, flux_of_size, one_tensor
from benchmarks.weights import Weights, encode
from streamquant.checkpoint.header import read_header

PREFIX = "model.diffusion_model."


def test_full_shape_is_the_released_model(tmp_path: Path) -> None:
    path = tmp_path / "full.safetensors"
    write_checkpoint(path, FluxShape().tensors(prefix=PREFIX), sparse=True)
    tensors = read_header(path).tensors
    assert len(tensors) == 299
    assert sum(tensor.elements for tensor in tensors.values()) == 32_223_281_152
    assert tensors[f"{PREFIX}single_blocks.47.linear1.weight"].shape == (55296, 6144)
    assert tensors[f"{PREFIX}double_blocks.7.txt_attn.norm.key_norm.scale"].shape == (128,)
    assert path.stat().st_blocks * 512 < 2**20


@pytest.mark.parametrize("size", [10**7, 2 * 10**7, 10**8, 10**9, 4 * 10**9, 64 * 10**9])
def test_any_size_has_every_kind_of_layer(size: int) -> None:
    shape = flux_of_size(size)
    assert 2 * shape.parameters() == pytest.approx(size, rel=0.03)
    assert shape.hidden % 128 == 0
    assert shape.double_blocks >= 1 and shape.single_blocks >= 1


def test_a_size_no_model_has_is_refused() -> None:
    with pytest.raises(ValueError, match="the smallest takes"):
        flux_of_size(1000)


def test_one_tensor_is_about_as_large_as_asked() -> None:
    ((_, dtype, shape),) = one_tensor(4 * 10**9)
    assert dtype == "BF16"
    assert 2 * prod(shape) == pytest.approx(4e9, rel=0.001)


def test_seed_decides_every_byte(tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> str:
        write_checkpoint(tmp_path / name, flux_of_size(10**7).tensors(), seed)
        return hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()

    assert digest("a", 1) == digest("b", 1) != digest("c", 2)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_file_reads_back_as_finite_weights(tmp_path: Path, dtype: str) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs safetensors to compare with")
    path = tmp_path / "small.safetensors"
    size = write_checkpoint(path, flux_of_size(10**7, dtype).tensors(dtype), advance=lambda count: None)
    assert path.stat().st_size == size
    weights = safetensors_torch.load_file(path)
    assert all(weight.isfinite().all() and weight.float().std() > 0 for weight in weights.values())


def test_weights_have_heavy_tails_and_hot_channels() -> None:
    bits = np.concatenate([tile.copy() for tile in Weights(0).tiles("layer", (1024, 1024), "BF16")])
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    kurtosis = np.mean((values / values.std()) ** 4)
    channels = values.std(axis=0)
    assert kurtosis > 6
    assert channels.max() > 4 * np.median(channels)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.14159], np.float32)
    assert encode(values, "BF16").tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xC049]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        tracemalloc.start()
        write_checkpoint(tmp_path / "large.safetensors", [TensorShape("layer.weight", "BF16", (rows, 1024))])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    assert peak(32_000) < peak(2_000) + 2**20
