"""State dicts in and out of files, and small things."""

import json
import zlib

import torch
from safetensors import safe_open


class ProgressBar:
    def __init__(self, total, node_id=None):
        self.total, self.current = total, 0

    def update_absolute(self, value, total=None, preview=None):
        self.current = min(value, self.total)

    def update(self, value):
        self.update_absolute(self.current + value)


def load_torch_file(ckpt, safe_load=False, device=None, return_metadata=False):
    with safe_open(ckpt, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return (tensors, file.metadata()) if return_metadata else tensors


def convert_old_quants(state_dict, model_prefix="", metadata=None):
    """Every layer that the header describes gets a marker tensor; the older `scaled_fp8` layout becomes the newer one."""
    metadata = {} if metadata is None else metadata
    legacy = f"{model_prefix}scaled_fp8"
    layers = {}
    if "_quantization_metadata" in metadata:
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
    elif legacy in state_dict:
        full_precision = state_dict.pop(legacy).numel() == 2
        renamed = {}
        for key, tensor in state_dict.items():
            layer, _, part = key.rpartition(".")
            if part == "scale_weight":
                layers[layer] = {"format": "float8_e4m3fn"}
                if full_precision:
                    layers[layer]["full_precision_matrix_mult"] = True
            elif part == "scale_input" and tensor.item() == 1.0:
                continue
            renamed[layer + "." + {"scale_weight": "weight_scale", "scale_input": "input_scale"}.get(part, part)] = tensor
        state_dict = renamed
    for layer, marker in layers.items():
        state_dict[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
    return state_dict, metadata


def state_dict_prefix_replace(state_dict, replace_prefix, filter_keys=False):
    result = {} if filter_keys else state_dict
    for old, new in replace_prefix.items():
        for key in [key for key in state_dict if key.startswith(old)]:
            result[new + key[len(old) :]] = state_dict.pop(key)
    return result


def set_attr_param(obj, attr, value):
    *path, name = attr.split(".")
    for part in path:
        obj = getattr(obj, part)
    setattr(obj, name, torch.nn.Parameter(value, requires_grad=False))


def string_to_seed(data):
    return zlib.crc32(data.encode())
