"""A file that cannot be loaded says why in one sentence, and nothing has been built before it does."""

from __future__ import annotations

import json

import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_quantops import loader
from comfyui_quantops.errors import ComfyUITooOldError
from comfyui_quantops.loader import load_diffusion_model
from streamquant.errors import CheckpointError, ShardMissingError, TruncatedFileError

LAYER = "double_blocks.0.img_attn.qkv"
FP8_LAYER = "img_in"


@pytest.fixture
def nothing_is_built(monkeypatch):
    def build(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", build)


def as_json(value):
    return torch.frombuffer(bytearray(value if isinstance(value, bytes) else json.dumps(value).encode()), dtype=torch.uint8)


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_diffusion_model(str(path))
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
GOOD = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [384, 128]}
DAMAGE = {
    "no absmax": ({f"{LAYER}.weight.absmax": None}, "absmax is not there"),
    "short absmax": ({f"{LAYER}.weight.absmax": torch.ones(5)}, "5 elements"),
    "absmax of another dtype": ({f"{LAYER}.weight.absmax": torch.ones(768).half()}, "float16"),
    "no quant_map": ({f"{LAYER}.weight.quant_map": None}, "quant_map is not there"),
    "codes cut": ({f"{LAYER}.weight": torch.zeros(100, 1, dtype=torch.uint8)}, "holds 100 bytes"),
    "no weight": ({f"{LAYER}.weight": None}, "is not there"),
    "quant_state is no JSON": ({STATE: as_json(b"{nonsense")}, "no JSON object"),
    "quant_state is a list": ({STATE: as_json([1])}, "no JSON object"),
    "shape of three": ({STATE: as_json(GOOD | {"shape": [3, 128, 128]})}, "does not describe a matrix"),
    "negative shape": ({STATE: as_json(GOOD | {"shape": [-384, -128]})}, "does not describe a matrix"),
    "odd block": ({STATE: as_json(GOOD | {"blocksize": 48})}, "does not describe a matrix"),
    "unknown dtype": ({STATE: as_json(GOOD | {"dtype": "int4"})}, "does not describe a matrix"),
    "dtype is a list": ({STATE: as_json(GOOD | {"dtype": []})}, "does not describe a matrix"),
    "the other book": ({STATE: as_json(GOOD | {"quant_type": "fp4"})}, "does not describe a matrix"),
    "nested without size": ({STATE: as_json(GOOD | {"nested_offset": 0.1})}, "how absmax is quantized"),
    "nested with a size beyond all arrays": (
        {STATE: as_json(GOOD | {"nested_offset": 0.1, "nested_blocksize": 2**70})}, "how absmax is quantized",
    ),
    "a book nobody knows": ({f"{LAYER}.weight.quant_state.bitsandbytes__nf5": as_json(GOOD)}, "nf4, fp4"),
    "marked 4-bit, no quant_state": ({STATE: None}, "no quant_state"),
    "unknown format": ({f"{FP8_LAYER}.comfy_quant": as_json({"format": "fp3"})}, "fp3, which neither"),
    "format is a list": ({f"{FP8_LAYER}.comfy_quant": as_json({"format": ["fp8"]})}, "which neither"),
    "no format": ({f"{FP8_LAYER}.comfy_quant": as_json({})}, "None, which neither"),
    "marker is no JSON": ({f"{FP8_LAYER}.comfy_quant": as_json(b"\xff\xfe")}, "no JSON object"),
    "no scale": ({f"{FP8_LAYER}.weight_scale": None}, "has no weight_scale"),
    "no weight behind a marker": ({"elsewhere.comfy_quant": as_json({"format": "float8_e4m3fn"})}, None),
    "block scales that do not divide": (
        {
            f"{FP8_LAYER}.comfy_quant": as_json({"format": "float8_e4m3fn_blockwise"}),
            f"{FP8_LAYER}.weight_scale": torch.ones(3, 5),
        },
        "do not divide",
    ),
    "block scales on the wrong codes": (
        {f"{FP8_LAYER}.comfy_quant": as_json({"format": "int8_blockwise"}), f"{FP8_LAYER}.weight_scale": torch.ones(1, 1)},
        "is marked int8_blockwise, but",
    ),
}


@pytest.mark.parametrize("kind", [kind for kind, (_, words) in DAMAGE.items() if words])
def test_a_damaged_layer_is_named(headline, tmp_path, kind, nothing_is_built):
    changes, words = DAMAGE[kind]
    tensors = load_file(headline)
    for key, value in changes.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path)
    message = refusal(path)
    assert words in message
    assert LAYER in message or FP8_LAYER in message


def test_a_marker_of_a_layer_that_is_elsewhere_is_no_reason_to_refuse(headline, tmp_path):
    """Headers of whole checkpoints mark layers of other models too."""
    changes, _ = DAMAGE["no weight behind a marker"]
    path = tmp_path / "more.safetensors"
    save_file(load_file(headline) | changes, path)
    load_diffusion_model(str(path))


def test_a_truncated_file(headline, tmp_path, nothing_is_built):
    path = tmp_path / "short.safetensors"
    path.write_bytes(headline.read_bytes()[:-1000])
    with pytest.raises(TruncatedFileError, match="short.safetensors"):
        load_diffusion_model(str(path))


@pytest.mark.parametrize("content", [b"", b"GGUF" + b"\0" * 40, b"\0" * 64, b"<html>" * 20])
def test_what_is_no_safetensors_file(tmp_path, content, nothing_is_built):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    assert "other.safetensors" in refusal(path)


def test_a_malformed_header_entry(headline, tmp_path, nothing_is_built):
    path = tmp_path / "header.safetensors"
    save_file(load_file(headline), path, {"_quantization_metadata": "[1, 2"})
    assert "_quantization_metadata is malformed" in refusal(path)


def test_a_shard_that_is_missing(tmp_path, source, nothing_is_built):
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(source.read_bytes())
    with pytest.raises(ShardMissingError, match="model-00002-of-00002"):
        load_diffusion_model(str(path))


def test_a_model_that_comfyui_does_not_know(tmp_path, headline):
    tensors = {f"unheard_of.{key}": tensor for key, tensor in load_file(headline).items()}
    path = tmp_path / "unknown.safetensors"
    save_file(tensors, path)
    assert "does not recognise the model" in refusal(path)


def test_diffusers_names(tmp_path, headline):
    tensors = {
        key.replace("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_q").replace("img_in", "x_embedder"): tensor
        for key, tensor in load_file(headline).items()
        if "norm" not in key and "modulation" not in key
    }
    path = tmp_path / "diffusers.safetensors"
    save_file(tensors, path)
    assert "as diffusers does" in refusal(path)


def test_a_comfyui_that_is_too_old(headline, monkeypatch):
    import comfy.quant_ops

    monkeypatch.setattr(comfy.quant_ops, "QuantizedTensor", type("QuantizedTensor", (), {}))
    with pytest.raises(ComfyUITooOldError, match=rf"need ComfyUI {loader.OLDEST_COMFYUI} or newer"):
        load_diffusion_model(str(headline))


