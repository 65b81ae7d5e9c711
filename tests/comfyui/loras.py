"""A LoRA on every linear layer of a tiny Flux.2, as a file has it, and what it should do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import tiny_flux
import torch


def lora(seed: int, strength: float = 0.3, rank: int = 4) -> dict[str, torch.Tensor]:
    """Low-rank factors for every matrix; the change is about `strength` of the weights."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for key, weight in tiny_flux.weights().items():
        if weight.dim() == 2:
            layer = f"diffusion_model.{key.removesuffix('.weight')}"
            rows, columns = weight.shape
            factors[f"{layer}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * (strength / rank**0.5)
            factors[f"{layer}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
    return factors


def deltas(factors: dict[str, torch.Tensor], strength: float) -> dict[str, torch.Tensor]:
    """What a LoRA adds to each weight, by the weight's name in the file."""
    return {
        key.removeprefix("diffusion_model.").replace(".lora_up", ""): strength
        * (up @ factors[key.replace("lora_up", "lora_down")])
        for key, up in factors.items()
        if ".lora_up." in key
    }


def patched(path: Path, *loras: tuple[dict[str, torch.Tensor], float]) -> dict[str, torch.Tensor]:
    """The file's decoded weights with LoRAs added."""
    weights = tiny_flux.decoded(path)
    for factors, strength in loras:
        for key, delta in deltas(factors, strength).items():
            weights[key] = weights[key] + delta
    return weights


def apply(model: Any, factors: dict[str, torch.Tensor], strength: float) -> Any:
    """As ComfyUI's LoRA node does it."""
    return comfy.sd.load_lora_for_models(model, None, factors, strength, 0)[0]
