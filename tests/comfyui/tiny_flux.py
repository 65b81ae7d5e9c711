"""A Flux.2 with random weights, small enough to run on the CPU in a second, and its conversions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import streamquant
from benchmarks.shapes import CHANNELS, FluxShape
from streamquant import FormatChoice, Recipe

# Relative: of what a model puts out. Layers that ComfyUI's own kernels multiply in 8 bits are allowed their rounding.
EXACT, EIGHT_BIT = 1e-6, 2e-2
SHAPE = FluxShape(hidden=128, double_blocks=1, single_blocks=1)
PREFIX = "model.diffusion_model."
HEADLINE = Recipe(
    FormatChoice("nf4"), custom_layers="img_in|txt_in|final_layer", custom=FormatChoice("fp8"), comfy_quant=True,
    preset=("none",),
)  # fmt: skip


def weights(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that keep activations near 1: normal, divided by the root of the columns; norms of 1."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, _, shape in SHAPE.tensors():
        if name.endswith(".scale"):
            made[name] = torch.ones(shape, dtype=dtype)
        else:
            made[name] = (torch.randn(shape, generator=generator) / math.sqrt(shape[1])).to(dtype)
    return made


def write(path: Path, tensors: dict[str, torch.Tensor], prefix: str = "", metadata: dict[str, str] | None = None) -> Path:
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path, metadata)
    return path


def convert(source: Path, recipe: Recipe, name: str) -> Path:
    """The source, converted by the library, beside it."""
    target = source.with_name(f"{source.stem}-{name}.safetensors")
    streamquant.convert(source, target, recipe)
    return target


def decoded(path: Path) -> dict[str, torch.Tensor]:
    """float32 weights of a file, decoded here by the formulas of the formats."""
    return decode(load_file(path))


def decoded_inner(path: Path) -> dict[str, torch.Tensor]:
    """The same of a whole checkpoint's diffusion model."""
    tensors = load_file(path).items()
    return decode({key.removeprefix(PREFIX): tensor for key, tensor in tensors if key.startswith(PREFIX)})


def decode(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    plain = {}
    for key in list(tensors):
        for book in ("nf4", "fp4"):
            if key.endswith(f".weight.quant_state.bitsandbytes__{book}"):
                weight = key.split(".quant_state")[0]
                state = json.loads(tensors[key].numpy().tobytes())
                plain[weight] = _four_bit(tensors, weight, state)
    for key, tensor in tensors.items():
        layer = key.removesuffix(".weight")
        scale = tensors.get(f"{layer}.weight_scale")
        if key in plain or not key.endswith((".weight", ".scale")):
            continue
        if scale is None:
            plain[key] = tensor.float()
            continue
        marker = tensors.get(f"{layer}.comfy_quant")
        marker = json.loads(marker.numpy().tobytes()) if marker is not None else {}
        value = tensor.float() * _spread(scale.float(), tuple(tensor.shape))
        if marker.get("convrot"):
            value = _rotate(value, marker.get("convrot_groupsize", 256))
        plain[key] = value
    return plain


def _four_bit(tensors: dict[str, torch.Tensor], key: str, state: dict) -> torch.Tensor:
    absmax = tensors[key + ".absmax"]
    if "nested_offset" in state:
        nested = tensors[key + ".nested_absmax"].repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
        absmax = tensors[key + ".nested_quant_map"][absmax.int()] * nested + state["nested_offset"]
    packed = tensors[key].contiguous().view(torch.uint8).flatten().numpy()
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: math.prod(state["shape"])]
    values = tensors[key + ".quant_map"].numpy()[codes]
    spread = np.repeat(absmax.numpy(), state["blocksize"])[: values.size]
    return torch.from_numpy(values * spread).view(state["shape"])


def _spread(scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """One scale per weight, from scales of any shape that a format has."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.dim() == 1:
        return scale[:, None]
    scale = scale.reshape(scale.shape[:2])
    return scale.repeat_interleave(shape[0] // scale.shape[0], 0).repeat_interleave(shape[1] // scale.shape[1], 1)


def _rotate(weight: torch.Tensor, group: int) -> torch.Tensor:
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < group:
        matrix = torch.kron(matrix, h4)
    groups = weight.double().view(weight.shape[0], -1, group)
    return (groups @ (matrix / math.sqrt(group))).view(weight.shape).float()


def inputs(seed: int = 1) -> dict[str, torch.Tensor]:
    """What the diffusion model of a tiny Flux.2 is called with: one latent of 4 x 4, 8 tokens of context."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(1, CHANNELS, 4, 4, generator=generator),
        "timestep": torch.tensor([0.5]),
        "context": torch.randn(1, 8, SHAPE.hidden * 5 // 2, generator=generator),
        "guidance": torch.tensor([4.0]),
    }
