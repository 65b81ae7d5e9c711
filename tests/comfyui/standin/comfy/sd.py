"""From a state dict to a model and back to a file."""

from enum import Enum

import torch
from safetensors.torch import save_file

from . import model_detection, model_management, model_patcher, ops, utils


class CLIPType(Enum):
    STABLE_DIFFUSION = 1
    FLUX2 = 2


class Network(torch.nn.Module):
    """Linear layers by their names; its output is what all of them make of a fixed input."""

    def __init__(self, shapes, norms, operations):
        super().__init__()
        self.linear = sorted(shapes)
        for name, (rows, columns) in shapes.items():
            self._add(name, operations.Linear(columns, rows, bias=False, device="cpu", dtype=torch.float32))
        for name, size in norms.items():
            self._add(name, torch.nn.RMSNorm(size))

    def _add(self, name, module):
        parent, *path = self, *name.split(".")
        *path, last = path
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, module)

    def forward(self, x, timestep, context=None, guidance=None, **kwargs):
        generator = torch.Generator().manual_seed(0)
        outputs = []
        for name in self.linear:
            layer = self.get_submodule(name)
            outputs.append(layer(torch.randn(4, layer.in_features, generator=generator)).flatten())
        return torch.cat(outputs)


class BaseModel(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.diffusion_model = network
        self.current_weight_patches_uuid = None

    def state_dict_for_saving(self, unet_state_dict, clip_state_dict=None, vae_state_dict=None, clip_vision_state_dict=None):
        return {f"model.diffusion_model.{key}": tensor for key, tensor in unet_state_dict.items()}


def load_diffusion_model_state_dict(sd, model_options=None, metadata=None, disable_dynamic=False):
    operations = (model_options or {}).get("custom_operations")
    if operations is None:
        sd, metadata = utils.convert_old_quants(sd, "", metadata=metadata)
    inner = utils.state_dict_prefix_replace(sd, {model_detection.unet_prefix_from_state_dict(sd): ""}, filter_keys=True)
    sd = inner or sd
    config = model_detection.model_config_from_unet(sd, "", metadata=metadata)
    if config is None:
        return None
    sd = {key.replace("_norm.scale", "_norm.weight"): tensor for key, tensor in sd.items()}
    norms = {
        key.removesuffix(".weight"): tensor.shape[0] for key, tensor in sd.items() if key.endswith("_norm.weight")
    }
    operations = operations or ops.pick_operations(None, torch.float32, model_config=config)
    network = Network(config.shapes, norms, operations)
    problems = network.load_state_dict(sd, strict=False)
    assert not problems.missing_keys, problems
    device = model_management.get_torch_device()
    return model_patcher.ModelPatcher(BaseModel(network), device, device)


def load_lora_for_models(model, clip, lora, strength_model, strength_clip, lora_metadata=None):
    patches = {}
    for key, up in lora.items():
        if key.endswith(".lora_up.weight"):
            layer = key.removesuffix(".lora_up.weight")
            patches[f"{layer}.weight"] = (up, lora[f"{layer}.lora_down.weight"])
    patched = model.clone()
    patched.add_patches(patches, strength_model)
    return patched, clip


def save_checkpoint(output_path, model, clip=None, vae=None, clip_vision=None, metadata=None, extra_keys=None):
    model_management.load_models_gpu([model])
    tensors = model.state_dict_for_saving()
    save_file({key: tensor if tensor.is_contiguous() else tensor.contiguous() for key, tensor in tensors.items()}, output_path)
