"""Watching the linear layers of a loaded model while ComfyUI samples with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamquant.calibration import Calibration, CalibrationError, collect, load, self_calibrate

WRAPPER_KEY = "streamquant"
GUIDANCE = 4.0  # the distilled guidance that people use most


def watched_steps(steps: int, recorded: int) -> set[int]:
    """Which of `steps` steps are watched: `recorded` of them, spread from early to late."""
    shares = (0.5,) if recorded == 1 else np.linspace(0.1, 0.9, recorded)
    return {round(share * (steps - 1)) for share in shares}


def step_of(sigma: float, sigmas: torch.Tensor) -> int:
    """The step in hand at noise level `sigma` of a schedule [steps + 1] that falls; calls between two count as the first."""
    reached = (sigmas[:-1] >= sigma * (1 - 1e-6)).sum().item()
    return max(int(reached) - 1, 0)


class Recorder:
    """Two wrappers for a `ModelPatcher`: one around a whole sampling, one around each call of the model in it."""

    def __init__(self, path: Path, recorded: int, rank: int):
        self.path, self.recorded, self.rank = path, recorded, rank
        self.collector: Any = None

    def attach(self, model: Any) -> Any:
        """A clone of `model` that records whenever it is sampled with."""
        from comfy.patcher_extension import WrappersMP

        watched = model.clone()
        watched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, self.around_sampling)
        watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, self.around_call)
        return watched

    def around_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        network = executor.class_obj.model_patcher.model.diffusion_model
        with collect(network, self.rank) as self.collector:
            self.collector.paused = True
            result = executor(*args, **kwargs)
            found = self.collector.calibration()
        self.collector = None
        add_to_file(self.path, found)
        return result

    def around_call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("transformer_options") or next((a for a in args if isinstance(a, dict)), {})
        sigmas = options.get("sample_sigmas")
        if self.collector is None or sigmas is None:
            return executor(*args, **kwargs)
        step = step_of(float(args[1].max()), sigmas)
        self.collector.paused = step not in watched_steps(len(sigmas) - 1, self.recorded)
        try:
            return executor(*args, **kwargs)
        finally:
            self.collector.paused = True


def add_to_file(path: Path, found: Calibration) -> None:
    """Save `found`, together with what the file holds already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (load(path).merged(found) if path.exists() else found).save(path)


def calibrate_itself(model: Any, trajectories: int, steps: int, size: int, tokens: int, seed: int, rank: int) -> Calibration:
    """The statistics of a flow-matching model run on its own trajectories, from noise, with random context.

    model: a `ModelPatcher`. size: edge of the picture in pixels. tokens: of context. Raises CalibrationError when the
    model is no flow-matching model, or takes a context whose width cannot be told.
    """
    import comfy.model_management
    import comfy.model_sampling
    import comfy.utils

    inner = model.model
    if not isinstance(inner.model_sampling, comfy.model_sampling.CONST):
        raise CalibrationError(
            f"{type(inner).__name__} is no flow-matching model: collect its calibration while you sample, without "
            "self-calibrate."
        )
    latent_format = inner.latent_format
    edge = max(size // getattr(latent_format, "spacial_downscale_ratio", 8), 2)
    frames = (1,) if getattr(latent_format, "latent_dimensions", 2) == 3 else ()
    shapes = {
        "latent": (1, latent_format.latent_channels, *frames, edge, edge),
        "context": (1, tokens, context_width(inner.diffusion_model)),
    }
    bar = comfy.utils.ProgressBar(trajectories * steps)
    extra = extra_conditions(inner.diffusion_model)
    comfy.model_management.load_models_gpu([model], memory_required=model.memory_required(shapes["latent"]))
    device = model.load_device

    def velocity(latent: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        conditions = {name: tensor.to(device) for name, tensor in extra.items()}
        denoised = inner.apply_model(latent, time, c_crossattn=context, transformer_options={}, **conditions)
        bar.update(1)
        return (latent - denoised) / time.view(-1, *[1] * (latent.dim() - 1))

    return self_calibrate(
        inner.diffusion_model, velocity, shapes, trajectories=trajectories, steps=steps, seed=seed, device=device, rank=rank
    )


def context_width(network: torch.nn.Module) -> int:
    """Columns of the context a model takes, from what its implementation in ComfyUI calls them."""
    parameters = getattr(network, "params", None)
    width = getattr(parameters, "context_in_dim", None) or getattr(network, "text_dim", None)
    width = width or getattr(getattr(network, "txt_in", None), "in_features", None)
    if not isinstance(width, int):
        raise CalibrationError(
            f"What context {type(network).__name__} takes is not known here: collect its calibration while you sample, "
            "without self-calibrate."
        )
    return width


def extra_conditions(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Guidance and the pooled text vector, for the models that take them."""
    conditions = {}
    if hasattr(network, "guidance_in"):
        conditions["guidance"] = torch.tensor([GUIDANCE])
    vector_width = getattr(getattr(network, "params", None), "vec_in_dim", None)
    if vector_width:
        conditions["y"] = torch.zeros(1, vector_width)
    return conditions
