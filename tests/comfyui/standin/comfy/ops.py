"""Linear layers: plain ones, and those that keep quantized weights."""

import json

import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

from .quant_ops import QUANT_ALGOS


class CastWeightBiasOp:
    comfy_cast_weights = False
    weight_function = []
    bias_function = []


class manual_cast:
    class Linear(torch.nn.Linear, CastWeightBiasOp):
        comfy_cast_weights = True

        def forward(self, input):
            weight = self.weight
            for function in self.weight_function:
                weight = function(weight)
            return torch.nn.functional.linear(input, weight.to(input.dtype), self.bias)


def pick_operations(
    weight_dtype, compute_dtype, load_device=None, disable_fast_fp8=False, fp8_optimizations=False, model_config=None
):
    if model_config is not None and model_config.quant_config:
        return mixed_precision_ops(model_config.quant_config, compute_dtype, disabled={"float8_e4m3fn", "float8_e5m2"})
    return manual_cast


def mixed_precision_ops(quant_config=None, compute_dtype=torch.bfloat16, full_precision_mm=False, disabled=()):
    class MixedPrecisionOps(manual_cast):
        class Linear(torch.nn.Module, CastWeightBiasOp):
            def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
                super().__init__()
                self.factory_kwargs = {"device": device, "dtype": compute_dtype}
                self.in_features, self.out_features = in_features, out_features
                self._full_precision_mm = full_precision_mm
                values = torch.empty(out_features, **self.factory_kwargs) if bias else None
                self.bias = torch.nn.Parameter(values, requires_grad=False) if bias else None

            def _load_from_state_dict(
                self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            ):
                weight = state_dict.pop(f"{prefix}weight", None)
                marker = state_dict.pop(f"{prefix}comfy_quant", None)
                device, dtype = self.factory_kwargs["device"], self.factory_kwargs["dtype"]
                if weight is None:
                    self.weight = None
                    return
                if marker is None:
                    self.weight = torch.nn.Parameter(weight.to(device=device, dtype=dtype), requires_grad=False)
                else:
                    self._take_quantized(state_dict, prefix, weight, json.loads(marker.numpy().tobytes()))
                super()._load_from_state_dict(
                    state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
                )
                if f"{prefix}weight" in missing_keys:
                    missing_keys.remove(f"{prefix}weight")

            def _take_quantized(self, state_dict, prefix, weight, marker):
                self.quant_format = marker["format"]
                self._full_precision_mm |= marker.get("full_precision_matrix_mult", False) or self.quant_format in disabled
                algorithm = QUANT_ALGOS[self.quant_format]  # KeyError: ComfyUI does not know the format
                self.layout_type = algorithm["comfy_tensor_layout"]
                fields = {"scale": state_dict.pop(f"{prefix}weight_scale")}
                if marker.get("convrot"):
                    fields |= {"convrot": True, "convrot_groupsize": marker.get("convrot_groupsize", 256)}
                params = get_layout_class(self.layout_type).Params(
                    orig_dtype=self.factory_kwargs["dtype"], orig_shape=(self.out_features, self.in_features), **fields
                )
                weight = QuantizedTensor(weight.to(algorithm["storage_t"]), self.layout_type, params)
                self.weight = torch.nn.Parameter(weight, requires_grad=False)

            def state_dict(self, *args, destination=None, prefix="", **kwargs):
                tensors = {} if destination is None else destination
                if self.bias is not None:
                    tensors[f"{prefix}bias"] = self.bias
                if not isinstance(self.weight, QuantizedTensor):
                    tensors[f"{prefix}weight"] = self.weight
                    return tensors
                tensors.update(self.weight.state_dict(f"{prefix}weight"))
                marker = {"format": self.quant_format}
                if getattr(self.weight._params, "convrot", False):
                    marker |= {"convrot": True, "convrot_groupsize": self.weight._params.convrot_groupsize}
                tensors[f"{prefix}comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
                if getattr(self, "input_scale", None) is not None:
                    tensors[f"{prefix}input_scale"] = self.input_scale
                return tensors

            def forward(self, input, *args, **kwargs):
                weight = self.weight
                if self.weight_function:
                    weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
                    for function in self.weight_function:
                        weight = function(weight)
                elif isinstance(weight, QuantizedTensor):
                    algorithm = QUANT_ALGOS[self.quant_format]
                    if algorithm.get("quantize_input", True) and not self._full_precision_mm:
                        input = QuantizedTensor.from_float(input, self.layout_type)
                return torch.nn.functional.linear(input, weight, self.bias)

            def convert_weight(self, weight, inplace=False, **kwargs):
                return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                if isinstance(self.weight, QuantizedTensor):
                    weight = self.weight.requantize_from_float(
                        weight, scale="recalculate", stochastic_rounding=seed, inplace_ops=True
                    )
                if return_weight:
                    return weight
                self.weight = torch.nn.Parameter(weight, requires_grad=False)

            def _apply(self, fn, recurse=True):
                for name, parameter in self._parameters.items():
                    if parameter is not None:
                        setattr(self, name, torch.nn.Parameter(fn(parameter), requires_grad=False))
                return self

    return MixedPrecisionOps
