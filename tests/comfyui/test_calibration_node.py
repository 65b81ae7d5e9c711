"""Collecting calibration while ComfyUI samples with a tiny Flux.2."""

from __future__ import annotations

import comfy.sd
import numpy as np
import pytest
import tiny_flux
import torch

import streamquant.calibration
from comfyui_quantops import NODE_CLASS_MAPPINGS
from comfyui_quantops.calibration import step_of, watched_steps
from streamquant.calibration import CalibrationError

CollectCalibration = NODE_CLASS_MAPPINGS["StreamquantCollectCalibration"]
LAYER = "double_blocks.0.img_mlp.0"
IMAGE_TOKENS = 16


@pytest.fixture
def output(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path / "calibration"


def sample(model, steps=6, seed=0):
    import comfy.sample

    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 8, tiny_flux.SHAPE.hidden * 5 // 2, generator=generator)
    conditions = [[context, {"guidance": 4.0}]]
    latent = torch.zeros(1, tiny_flux.CHANNELS, 4, 4)
    noise = torch.randn(latent.shape, generator=generator)
    return comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", conditions, conditions, latent, disable_pbar=True, seed=seed
    )


@pytest.mark.parametrize(
    ("steps", "recorded", "expected"), [(12, 3, {1, 6, 10}), (4, 3, {0, 2, 3}), (1, 3, {0}), (20, 1, {10}), (3, 9, {0, 1, 2})]
)
def test_the_steps_that_are_watched(steps, recorded, expected):
    assert watched_steps(steps, recorded) == expected


def test_which_step_a_noise_level_belongs_to():
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0])
    assert [step_of(sigma, sigmas) for sigma in (1.0, 0.9, 0.75, 0.6, 0.5, 0.2)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.comfyui
def test_three_steps_a_picture_and_runs_add_up(source, output):
    model = comfy.sd.load_diffusion_model(str(source))
    (watched,) = CollectCalibration().calibrate(model, "tiny")
    plain = sample(model)
    assert torch.equal(sample(watched), plain)
    path = output / "tiny.calibration.safetensors"
    once = streamquant.calibration.load(path)
    linear = {key.removesuffix(".weight") for key, weight in tiny_flux.weights().items() if weight.dim() == 2}
    assert once.layers.keys() == linear
    # The budget may take fewer tokens of a call than there are, but never fewer than 16.
    assert once.layers[LAYER].count == 3 * IMAGE_TOKENS
    sample(watched, seed=1)
    twice = streamquant.calibration.load(path)
    assert twice.layers[LAYER].count == 6 * IMAGE_TOKENS
    assert not any(module._forward_pre_hooks for module in model.model.modules())


@pytest.mark.comfyui
def test_what_is_recorded_is_what_the_layers_see(source, output):
    model = comfy.sd.load_diffusion_model(str(source))
    (watched,) = CollectCalibration().calibrate(model, "tiny", steps_per_picture=2)
    seen = []
    handle = model.model.diffusion_model.get_submodule(LAYER).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    sample(watched, steps=2)
    handle.remove()
    inputs = torch.cat([each.reshape(-1, each.shape[-1]) for each in seen]).double().numpy()
    layer = streamquant.calibration.load(output / "tiny.calibration.safetensors").layers[LAYER]
    assert layer.count == len(inputs) == 2 * IMAGE_TOKENS
    np.testing.assert_allclose(layer.mean, inputs.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.diagonal, np.square(inputs).mean(0), rtol=1e-4)


@pytest.mark.comfyui
def test_self_calibration_needs_no_prompt(source, output):
    model = comfy.sd.load_diffusion_model(str(source))
    (same,) = CollectCalibration().calibrate(model, "own", self_calibrate=True, trajectories=2, size=64)
    assert same is model
    layer = streamquant.calibration.load(output / "own.calibration.safetensors").layers[LAYER]
    assert layer.count == 2 * 3 * IMAGE_TOKENS
    assert layer.diagonal.min() > 0


@pytest.mark.comfyui
def test_it_works_partly_offloaded(source, output):
    model = comfy.sd.load_diffusion_model(str(source))
    (watched,) = CollectCalibration().calibrate(model, "tiny")
    watched.load(torch.device("cpu"), lowvram_model_memory=1)
    sample(watched)
    assert (output / "tiny.calibration.safetensors").is_file()


@pytest.mark.comfyui
def test_a_model_that_is_no_flow_says_so(source, output):
    model = comfy.sd.load_diffusion_model(str(source))
    model.model.model_sampling = torch.nn.Module()
    with pytest.raises(CalibrationError, match="no flow-matching model"):
        CollectCalibration().calibrate(model, "own", self_calibrate=True)
