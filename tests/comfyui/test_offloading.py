"""ComfyUI's own memory management on layers of ours: partly loaded, unloaded, loaded again."""

from __future__ import annotations

import comfy.model_management
import loras
import pytest
import running
import tiny_flux
import torch

from comfyui_quantops.loader import load_diffusion_model

pytestmark = pytest.mark.comfyui
CPU = torch.device("cpu")


@pytest.fixture(params=[0.02, 0.3, 0.7])
def partly(request, loaded):
    """The model with this share of its bytes loaded, the rest cast at every use, as with too little memory."""
    loaded.load(CPU, lowvram_model_memory=int(loaded.model_size() * request.param))
    return loaded


def run(model):
    return model.model.diffusion_model(**tiny_flux.inputs()).clone()


def test_a_partly_loaded_model_is_the_same_model(partly, headline):
    assert running.difference(run(partly), running.reference(headline)) <= tiny_flux.EXACT
    assert running.differing(partly, headline) == []


def test_a_lora_on_a_partly_loaded_model(headline):
    factors = loras.lora(4)
    whole = load_diffusion_model(str(headline))
    model = loras.apply(whole, factors, 1.0)
    model.load(CPU, lowvram_model_memory=1)
    small = run(model)
    model.detach()
    model.load(CPU, lowvram_model_memory=int(model.model_size() * 0.5))
    # FP8 layers that are loaded have the patch merged, and lose some of it: the rest is exact.
    assert running.difference(run(model), small) < 0.2


def test_unloading_and_loading_again(loaded, headline):
    first = running.output(loaded)
    comfy.model_management.unload_all_models()
    assert running.differing(loaded, headline) == []
    assert torch.equal(running.output(loaded), first)


def test_unloading_a_part(loaded, headline):
    first = running.output(loaded)
    loaded.partially_unload(CPU, loaded.model_size() // 2)
    assert torch.equal(run(loaded), first)
    assert running.differing(loaded, headline) == []


def test_a_clone_that_comfyui_loads_anew(loaded, headline):
    """What several GPUs and the switch from dynamic loading do: `cached_patcher_init`, with `disable_dynamic`."""
    load, arguments = loaded.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert torch.equal(running.output(again), running.output(loaded))


def test_a_whole_picture_through_comfyuis_sampler(loaded, headline):
    import comfy.sample
    import comfy.sd

    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 8, tiny_flux.SHAPE.hidden * 5 // 2, generator=generator)
    noise = torch.randn(1, tiny_flux.CHANNELS, 4, 4, generator=generator)
    conditions = [[context, {"guidance": 4.0}]]
    pictures = [
        comfy.sample.sample(
            model, noise, 4, 2.0, "euler", "simple", conditions, conditions, torch.zeros_like(noise), disable_pbar=True, seed=0
        )
        for model in (loaded, comfy.sd.load_diffusion_model_state_dict(tiny_flux.decoded(headline)))
    ]
    assert running.difference(*pictures) <= tiny_flux.EXACT
