"""LoRA on layers of ours: the codes stay packed, the patch is added each time the layer is used.

ComfyUI adds a patch to the weight and quantizes the sum again when a model is loaded whole. On a 4-bit grid that noise is
several times the patch itself. With too little memory ComfyUI instead adds the patch at every use, which is exact; here
that is done always. ComfyUI's own LoRA nodes, several of them and their removal need nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP

from .layouts import is_ours, moved

CALLBACK_KEY = "streamquant"


class PatchAtUse(comfy.model_patcher.LowVramPatch):
    """Adds a weight's patches to it; a class of its own so that it can be told from the one ComfyUI installs."""


def without_duplicates(functions: list[Callable]) -> list[Callable]:
    """A layer's weight functions without ours where ComfyUI has meanwhile added its own (when it unloads a part)."""
    theirs = any(getattr(f, "is_lowvram_patch", False) and not isinstance(f, PatchAtUse) for f in functions)
    return [f for f in functions if not isinstance(f, PatchAtUse)] if theirs else functions


def keep_packed(
    patcher: Any, device_to: torch.device, lowvram_model_memory: int, force_patch_weights: bool, full_load: bool
) -> None:
    """The callback after a model was loaded: undo ComfyUI's merges into layers of ours, patch them at use instead."""
    if force_patch_weights:  # somebody wants the merged weight itself
        return
    for name, module in patcher.model.named_modules():
        if not is_ours(getattr(module, "weight", None)):
            continue
        key = f"{name}.weight"
        # What an earlier load left, perhaps with another LoRA: ComfyUI does not always clear it.
        functions = [function for function in module.weight_function if not isinstance(function, PatchAtUse)]
        if key in patcher.patches:
            if key in patcher.backup:
                packed = patcher.backup.pop(key).weight
                comfy.utils.set_attr_param(patcher.model, key, moved(packed, device_to, None))
            elif getattr(module, "weight_lowvram_function", None) is not None:
                module.weight_lowvram_function = None  # dynamic loading would quantize the sum again
            if not any(getattr(function, "is_lowvram_patch", False) for function in functions):
                functions.insert(0, PatchAtUse(key, patcher.patches))
        module.weight_function = functions


def drop_patches(patcher: Any, unpatch_all: bool) -> None:
    """The callback after a model was unloaded: nothing of ours stays on its layers."""
    for module in patcher.model.modules():
        functions = getattr(module, "weight_function", ())
        if any(isinstance(function, PatchAtUse) for function in functions):
            module.weight_function = [function for function in functions if not isinstance(function, PatchAtUse)]


def attach(patcher: Any) -> None:
    """Let a `ModelPatcher`, and every clone of it, treat patches on layers of ours as this module does."""
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, CALLBACK_KEY, keep_packed)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, CALLBACK_KEY, drop_patches)
