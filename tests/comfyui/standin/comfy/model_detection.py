"""Recognises the one architecture of the tests, by the shapes that the real one looks at."""

import torch


class Configuration:
    """What ComfyUI knows of a model before it builds it."""

    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]

    def __init__(self, shapes, quant_config):
        self.shapes, self.quant_config = shapes, quant_config


def unet_prefix_from_state_dict(state_dict):
    prefix = "model.diffusion_model."
    return prefix if any(key.startswith(prefix) for key in state_dict) else "model."


def model_config_from_unet(state_dict, unet_key_prefix, use_base_if_no_match=False, metadata=None):
    first, modulation = "img_in.weight", "double_stream_modulation_img.lin.weight"
    if first not in state_dict or modulation not in state_dict:
        return None
    hidden = state_dict[first].shape[0]
    assert state_dict["txt_in.weight"].shape == (hidden, hidden * 5 // 2)  # the width is read from packed codes otherwise
    shapes = {
        key.removesuffix(".weight"): tuple(tensor.shape)
        for key, tensor in state_dict.items()
        if key.endswith(".weight") and tensor.dim() == 2
    }
    marked = any(key.endswith(".comfy_quant") for key in state_dict)
    return Configuration(shapes, {"mixed_ops": True} if marked else None)
