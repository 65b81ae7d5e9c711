"""What quantized layers give to be saved by ComfyUI's own nodes, patches included.

ComfyUI writes a layer that is not fully loaded through a parameter that patches it at the last moment, and writes a fully
loaded one as it stands. Neither fits here: torch allows no parameter of integers, and layers of ours stand unpatched. So
a layer hands out tensors that go through ComfyUI unchanged, and where there is a patch, tensors that are merged when they
are written, one layer at a time.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_kitchen.tensor import QuantizedTensor

from .layouts import moved


class Unchanged(torch.Tensor):
    """A tensor that stays what it is when ComfyUI makes a `torch.nn.Parameter` of it; any operation gives a plain one."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def detach(self) -> Unchanged:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Unchanged:
        return self


class LastMoment:
    """A device that is none: whoever writes the file asks for the CPU, and it is then that the layer is merged."""

    type, index = "streamquant-at-last-moment", 0


class Piece(Unchanged):
    """Stands for one tensor of a patched layer until somebody asks for it on a device."""

    layer: PatchedLayer
    key: str

    @property
    def device(self) -> type[LastMoment]:
        return LastMoment

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.layer.tensor(self.key)


class PatchedLayer:
    """A quantized layer with its patches merged, when a tensor of it is asked for. Rounding is stochastic."""

    def __init__(self, module: torch.nn.Module, key: str):
        self.module, self.key = module, key
        self.tensors: dict[str, torch.Tensor] = {}

    def tensor(self, key: str) -> torch.Tensor:
        """One of the layer's tensors on the CPU, by its key in the state dict; what is taken is forgotten."""
        if key not in self.tensors:
            device = comfy.model_management.get_torch_device()
            weight = moved(self.module.weight, device, torch.float32).dequantize()
            for function in patches(self.module):
                weight = function(weight)
            merged = self.module.set_weight(weight, seed=comfy.utils.string_to_seed(self.key), return_weight=True)
            self.tensors = {name: tensor.cpu() for name, tensor in merged.state_dict(self.key).items()}
        return self.tensors.pop(key)


def patches(module: torch.nn.Module) -> list[Any]:
    """The patches that ComfyUI or this pack adds to a layer's weight each time it is used."""
    functions = [*getattr(module, "weight_function", ()), getattr(module, "weight_lowvram_function", None)]
    return [function for function in functions if getattr(function, "is_lowvram_patch", False)]


def to_save(module: torch.nn.Module, key: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors of a layer's weight as its state dict gives them out. key: of the weight in that state dict."""
    layer = PatchedLayer(module, key) if patches(module) else None
    given = {}
    for part, tensor in weight.state_dict(key).items():
        if layer is not None:
            given[part] = tensor.detach().as_subclass(Piece)
            given[part].layer, given[part].key = layer, part
        else:
            given[part] = tensor if tensor.is_floating_point() else tensor.as_subclass(Unchanged)
    return given
