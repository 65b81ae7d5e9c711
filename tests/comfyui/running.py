"""Running a loaded model, and looking at what it gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import tiny_flux
import torch
from safetensors.torch import load_file


def output(patcher: Any, seed: int = 1) -> torch.Tensor:
    """What the diffusion model says, after ComfyUI's own memory management has loaded it."""
    comfy.model_management.load_models_gpu([patcher])
    return patcher.model.diffusion_model(**tiny_flux.inputs(seed)).clone()


def reference(path: Path) -> torch.Tensor:
    """What ComfyUI's own loader makes of the file's weights, decoded here to float32."""
    return output(comfy.sd.load_diffusion_model_state_dict(tiny_flux.decoded(path)))


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest difference, as a share of the largest magnitude."""
    return ((first - second).abs().max() / second.abs().max()).item()


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(raw(first), raw(second))


def in_comfyui_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Released files call the norms `.scale`, ComfyUI's module calls them `.weight`."""
    return {key.replace("_norm.scale", "_norm.weight"): tensor for key, tensor in tensors.items()}


def file_tensors(path: Path) -> dict[str, torch.Tensor]:
    return in_comfyui_names(load_file(path))


def differing(patcher: Any, path: Path) -> list[str]:
    """Names of tensors that the model's state dict and the file do not have in common, to the byte."""
    mine, theirs = dict(patcher.model.diffusion_model.state_dict()), file_tensors(path)
    either = mine.keys() | theirs.keys()
    return sorted(key for key in either if not (key in mine and key in theirs and same_bytes(mine[key], theirs[key])))
