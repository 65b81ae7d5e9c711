"""The table of a file's contents: whatever a file says of itself, it is a table or a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from comfyui_quantops.inspection import inspect
from streamquant.errors import CheckpointError

STATE = "a.weight.quant_state.bitsandbytes__nf4"


def as_tensor(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("state", [[1], {"shape": 7}, {"shape": None}, {"shape": [[1]], "blocksize": {}}, {"blocksize": "\x1b[2J"}])
def test_any_quant_state(tmp_path, state):
    save_file({"a.weight": torch.zeros(8, 1, dtype=torch.uint8), STATE: as_tensor(state)}, tmp_path / "x.safetensors")
    text = inspect(tmp_path / "x.safetensors")
    assert "a  8 x 1  " in text and "cannot be decoded here" in text and "\x1b" not in text


def test_layers_whose_long_names_begin_alike_have_a_line_each(tmp_path):
    names = ["block." * 50 + last for last in "ab"]
    marker = as_tensor({"format": "float8_e4m3fn"})
    tensors = {"c.weight": torch.zeros(4, 4)}
    for name in names:
        scale = torch.ones(())
        tensors |= {f"{name}.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn), f"{name}.weight_scale": scale,
                    f"{name}.comfy_quant": marker.clone()}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    text = inspect(tmp_path / "x.safetensors")
    assert text.count("  8 x 8  ") == 2 and "(2 layers)" in text


@pytest.mark.parametrize("listed", [[], {"layers": []}, {"layers": 7}, {"layers": {"a": []}}])
def test_a_malformed_list_of_layers(tmp_path, listed):
    metadata = {"_quantization_metadata": json.dumps(listed)}
    save_file({"a.weight": torch.zeros(8, 8)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(CheckpointError, match="_quantization_metadata"):
        inspect(tmp_path / "x.safetensors")


def test_a_format_of_control_characters(tmp_path):
    metadata = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "\x1b"}}})}
    save_file({"a.weight": torch.zeros(8, 8, dtype=torch.int8)}, tmp_path / "x.safetensors", metadata)
    assert "\\x1b, cannot be decoded here" in inspect(tmp_path / "x.safetensors")
