"""The formats that ComfyUI reads itself, as far as the tests write them."""

import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout, TensorWiseINT8Layout, register_layout_class

register_layout_class("TensorCoreFP8Layout", TensorCoreFP8Layout)
register_layout_class("TensorWiseINT8Layout", TensorWiseINT8Layout)

QUANT_ALGOS = {
    "float8_e4m3fn": {"storage_t": torch.float8_e4m3fn, "comfy_tensor_layout": "TensorCoreFP8Layout"},
    "float8_e5m2": {"storage_t": torch.float8_e5m2, "comfy_tensor_layout": "TensorCoreFP8Layout"},
    "int8_tensorwise": {
        "storage_t": torch.int8,
        "comfy_tensor_layout": "TensorWiseINT8Layout",
        "quantize_input": False,
    },
}

__all__ = ["QUANT_ALGOS", "QuantizedTensor"]
