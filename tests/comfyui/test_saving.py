"""ComfyUI's ModelSave on a quantized model, and the file loaded again."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import loras
import pytest
import running
import tiny_flux
import torch
from safetensors.torch import load_file

from comfyui_quantops.loader import load_diffusion_model
from streamquant import FormatChoice, Recipe

FORMATS = {
    "headline": tiny_flux.HEADLINE,
    "nf4-double": Recipe(FormatChoice("nf4", double_quant=True), preset=("none",)),
    "fp8-block": Recipe(FormatChoice("fp8", "block", 64), preset=("none",)),
    "int8": Recipe(FormatChoice("int8"), custom_layers="attn", custom=FormatChoice("nf4"), preset=("none",)),
    "int8-block": Recipe(FormatChoice("int8", "block", 64), preset=("none",)),
}


@pytest.fixture(params=list(FORMATS))
def path(request, source):
    made = tiny_flux.convert(source, FORMATS[request.param], f"save-{request.param}")
    yield made
    made.unlink()


def save(model, target):
    comfy.sd.save_checkpoint(str(target), model)
    return target


def inner(path):
    """The saved diffusion model's tensors, in the names of the file it came from."""
    tensors = load_file(path)
    return {key.removeprefix(tiny_flux.PREFIX): t for key, t in tensors.items() if key.startswith(tiny_flux.PREFIX)}


def test_what_is_saved_is_the_file(path, tmp_path):
    model = load_diffusion_model(str(path))
    saved, original = inner(save(model, tmp_path / "saved.safetensors")), running.file_tensors(path)
    assert saved.keys() == original.keys()
    assert [key for key in original if not running.same_bytes(saved[key], original[key])] == []


def test_it_loads_again(path, tmp_path):
    saved = save(load_diffusion_model(str(path)), tmp_path / "saved.safetensors")
    again = load_diffusion_model(str(saved))
    limit = tiny_flux.EIGHT_BIT if path.stem.endswith("-int8") else tiny_flux.EXACT
    assert running.difference(running.output(again), running.reference(path)) <= limit


def test_a_lora_is_saved_with_the_model(path, tmp_path):
    """Merged on a coarse grid a single weight is off by up to a step; on average the patch is all there."""
    factors = loras.lora(5, strength=0.3)
    model = loras.apply(load_diffusion_model(str(path)), factors, 1.0)
    saved = save(model, tmp_path / "saved.safetensors")
    merged, plain = tiny_flux.decoded_inner(saved), tiny_flux.decoded(path)
    for key, delta in loras.deltas(factors, 1.0).items():
        change = merged[key] - plain[key]
        gain = (change * delta).sum() / (delta * delta).sum()
        assert abs(gain - 1) < 0.15, key
    load_diffusion_model(str(saved))
    # The model itself is as it was.
    comfy.model_management.unload_all_models()
    assert running.differing(model, path) == []


@pytest.mark.comfyui
@pytest.mark.parametrize("with_lora", [False, True])
def test_a_partly_loaded_model_is_saved(path, tmp_path, with_lora, monkeypatch):
    """With too little memory, and with dynamic loading always, ComfyUI patches layers only as it writes them."""
    factors = loras.lora(5, strength=0.3)
    model = load_diffusion_model(str(path))
    if with_lora:
        model = loras.apply(model, factors, 1.0)
    model.load(torch.device("cpu"), lowvram_model_memory=1)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: None)
    saved = save(model, tmp_path / "saved.safetensors")
    if not with_lora:
        original, found = running.file_tensors(path), inner(saved)
        assert [key for key in original if not running.same_bytes(found[key], original[key])] == []
        return
    merged, plain = tiny_flux.decoded_inner(saved), tiny_flux.decoded(path)
    for key, delta in loras.deltas(factors, 1.0).items():
        gain = ((merged[key] - plain[key]) * delta).sum() / (delta * delta).sum()
        assert abs(gain - 1) < 0.15, key
