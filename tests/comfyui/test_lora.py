"""LoRA on quantized layers: exactly its effect, gone without a trace when it is removed."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import comfy_environment
import loras
import pytest
import running
import tiny_flux
import torch
from comfy.model_patcher import LowVramPatch

from comfyui_quantops.layouts import is_ours
from comfyui_quantops.loader import load_diffusion_model
from comfyui_quantops.lora import PatchAtUse, keep_packed
from streamquant import FormatChoice, Recipe

# The patch is added in float32 in another order than in the reference.
ADDED = 1e-5
OURS = {
    "nf4": Recipe(FormatChoice("nf4"), preset=("none",)),
    "nf4-double": Recipe(FormatChoice("nf4", double_quant=True), preset=("none",)),
    "fp4": Recipe(FormatChoice("fp4"), preset=("none",)),
    "fp8-row": Recipe(FormatChoice("fp8", "row"), preset=("none",)),
    "fp8-block": Recipe(FormatChoice("fp8", "block", 64), preset=("none",)),
    "int8-block": Recipe(FormatChoice("int8", "block", 64), preset=("none",)),
}


# The stand-in treats all of them alike.
CHOSEN = list(OURS) if comfy_environment.IS_REAL else ["nf4-double", "fp8-block"]


@pytest.fixture(params=CHOSEN)
def path(request, source):
    return tiny_flux.convert(source, OURS[request.param], f"lora-{request.param}")


@pytest.fixture(autouse=True)
def clean(request, source):
    yield
    for left in source.parent.glob("*-lora-*.safetensors"):
        left.unlink()


def expected(path, *applied):
    return running.output(comfy.sd.load_diffusion_model_state_dict(loras.patched(path, *applied)))


def test_a_lora_has_exactly_its_effect(path):
    factors = loras.lora(1)
    model = load_diffusion_model(str(path))
    result = running.output(loras.apply(model, factors, 0.8))
    assert running.difference(result, expected(path, (factors, 0.8))) <= ADDED
    assert running.difference(running.reference(path), result) > 0.05


def test_the_weights_stay_packed_and_unchanged(path):
    model = load_diffusion_model(str(path))
    patched = loras.apply(model, loras.lora(1), 1.0)
    running.output(patched)
    assert running.differing(patched, path) == []


def test_two_loras_add_up(path):
    first, second = loras.lora(1), loras.lora(2)
    model = loras.apply(loras.apply(load_diffusion_model(str(path)), first, 0.5), second, -0.7)
    assert running.difference(running.output(model), expected(path, (first, 0.5), (second, -0.7))) <= ADDED


def test_it_is_removed_cleanly(path):
    model = load_diffusion_model(str(path))
    before = running.output(model)
    for strength in (1.0, -0.4):
        running.output(loras.apply(model, loras.lora(3), strength))
        assert torch.equal(running.output(model), before)
    running.output(loras.apply(model, loras.lora(3), 1.0)).sum()
    comfy.model_management.unload_all_models()
    assert running.differing(model, path) == []
    assert not any(getattr(module, "weight_function", []) for module in model.model.modules())


def test_switching_between_loras(path):
    model = load_diffusion_model(str(path))
    first, second = loras.lora(1), loras.lora(2)
    one, other = loras.apply(model, first, 1.0), loras.apply(model, second, 1.0)
    for _ in range(2):
        assert running.difference(running.output(one), expected(path, (first, 1.0))) <= ADDED
        assert running.difference(running.output(other), expected(path, (second, 1.0))) <= ADDED


def test_loading_again_keeps_it(path):
    """ComfyUI loads a loaded model again when memory becomes free; that clears what was added at use."""
    factors = loras.lora(1)
    model = loras.apply(load_diffusion_model(str(path)), factors, 1.0)
    once = running.output(model)
    model.load(torch.device("cpu"), full_load=True)
    assert torch.equal(model.model.diffusion_model(**tiny_flux.inputs()), once)


@pytest.mark.comfyui
def test_dynamic_loading_gets_the_patch_at_use(path):
    """ComfyUI's dynamic loading keeps a patch beside the weight and quantizes their sum; here it is stood in for."""
    factors = loras.lora(1)
    model = loras.apply(load_diffusion_model(str(path)), factors, 1.0)
    expected_output = running.output(model)
    for name, module in model.model.named_modules():
        if is_ours(getattr(module, "weight", None)):
            module.weight_function = []
            module.weight_lowvram_function = LowVramPatch(f"{name}.weight", model.patches)
    keep_packed(model, torch.device("cpu"), 0, False, False)
    assert torch.equal(model.model.diffusion_model(**tiny_flux.inputs()), expected_output)
    assert not any(getattr(module, "weight_lowvram_function", None) for module in model.model.modules())


def test_what_an_earlier_lora_left_is_taken_off(path):
    model = load_diffusion_model(str(path))
    before = running.output(model)
    stale = loras.apply(model, loras.lora(1), 1.0)
    for name, module in model.model.named_modules():
        if is_ours(getattr(module, "weight", None)):
            module.weight_function = [PatchAtUse(f"{name}.weight", stale.patches)]
    keep_packed(model, torch.device("cpu"), 0, False, True)
    assert torch.equal(model.model.diffusion_model(**tiny_flux.inputs()), before)


def test_a_lora_that_comfyui_moves_to_use_is_not_added_twice(path):
    """When ComfyUI unloads a part of a model it adds its own patch at use to ours."""
    factors = loras.lora(1)
    model = loras.apply(load_diffusion_model(str(path)), factors, 1.0)
    once = running.output(model)
    model.partially_unload(torch.device("cpu"), 1e9)
    twice = [module for module in model.model.modules() if len(getattr(module, "weight_function", [])) > 1]
    assert twice
    assert running.difference(model.model.diffusion_model(**tiny_flux.inputs()), once) <= ADDED
    assert not any(len(getattr(module, "weight_function", [])) > 1 for module in model.model.modules())


def test_layers_of_comfyuis_own_formats_are_left_to_it(headline):
    model = loras.apply(load_diffusion_model(str(headline)), loras.lora(1), 1.0)
    running.output(model)
    for _, module in model.model.named_modules():
        functions = getattr(module, "weight_function", [])
        assert any(isinstance(function, PatchAtUse) for function in functions) == is_ours(getattr(module, "weight", None))
