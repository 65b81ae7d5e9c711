"""A network, the patches on it, and what loading makes of them."""

import uuid
from collections import namedtuple

import torch

from . import utils
from .patcher_extension import CallbacksMP

Backup = namedtuple("Backup", ["weight", "inplace_update"])


class LowVramPatch:
    """Adds a weight's patches each time the weight is used. A patch here is (strength, (up, down))."""

    is_lowvram_patch = True

    def __init__(self, key, patches, convert_func=None, set_func=None):
        self.key, self.patches = key, patches

    def __call__(self, weight):
        return patched(weight, self.patches[self.key])


class LazyCastingParamPiece:
    """ComfyUI's own way to merge at the last moment, by which a new enough ComfyUI is known."""


def patched(weight, patches):
    for strength, (up, down) in patches:
        weight = weight + (strength * (up @ down)).to(weight.dtype)
    return weight


class ModelPatcher:
    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.patches, self.backup, self.callbacks = {}, {}, {}
        self.patches_uuid = uuid.uuid4()
        self.cached_patcher_init = None

    def clone(self, disable_dynamic=False, model_override=None, force_deepcopy=False):
        other = ModelPatcher(self.model, self.load_device, self.offload_device)
        other.patches = {key: patches[:] for key, patches in self.patches.items()}
        other.patches_uuid, other.backup = self.patches_uuid, self.backup
        other.callbacks = {kind: {key: each[:] for key, each in keys.items()} for kind, keys in self.callbacks.items()}
        other.cached_patcher_init = self.cached_patcher_init
        return other

    def is_dynamic(self):
        return False

    def model_size(self):
        from . import model_management

        return model_management.module_size(self.model)

    def add_callback_with_key(self, call_type, key, callback):
        self.callbacks.setdefault(call_type, {}).setdefault(key, []).append(callback)

    def get_all_callbacks(self, call_type):
        return [callback for callbacks in self.callbacks.get(call_type, {}).values() for callback in callbacks]

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        for key, value in patches.items():
            self.patches.setdefault(key, []).append((strength_patch, value))
        self.patches_uuid = uuid.uuid4()
        return list(patches)

    def layers(self):
        return [(name, module) for name, module in self.model.named_modules() if hasattr(module, "comfy_cast_weights")]

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        for name, module in self.layers():
            module.weight_function = []
            key = f"{name}.weight"
            if getattr(module, "comfy_patched_weights", False):
                continue
            if key in self.patches:
                self.patch_weight_to_device(key, module)
            module.comfy_patched_weights = True
        self.model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    def patch_weight_to_device(self, key, module):
        self.backup.setdefault(key, Backup(module.weight, False))
        weight = module.weight
        if hasattr(module, "convert_weight"):
            weight = module.convert_weight(weight, inplace=True)
        weight = patched(weight, self.patches[key])
        if hasattr(module, "set_weight"):
            module.set_weight(weight, inplace_update=False, seed=utils.string_to_seed(key), return_weight=False)
        else:
            module.weight = torch.nn.Parameter(weight, requires_grad=False)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        """A layer that is unloaded gets its weight back, and its patches at every use."""
        for name, module in self.layers():
            key = f"{name}.weight"
            if key in self.backup:
                module.weight = torch.nn.Parameter(self.backup.pop(key).weight, requires_grad=False)
            if key in self.patches:
                module.weight_function.append(LowVramPatch(key, self.patches))
            module.comfy_patched_weights = False
        return memory_to_free

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for key in list(self.backup):
            utils.set_attr_param(self.model, key, self.backup.pop(key).weight)
        for _, module in self.layers():
            module.comfy_patched_weights = False
        self.model.current_weight_patches_uuid = None

    def detach(self, unpatch_all=True):
        self.unpatch_model(self.offload_device)
        for callback in self.get_all_callbacks(CallbacksMP.ON_DETACH):
            callback(self, unpatch_all)
        return self.model

    def state_dict_for_saving(self, clip_state_dict=None, vae_state_dict=None, clip_vision_state_dict=None):
        """Every layer as it stands: here all of them are loaded."""
        return self.model.state_dict_for_saving(self.model.diffusion_model.state_dict())
