"""The operations of a model with layers of ours among ComfyUI's own: its mixed-precision operations, and four overrides.

All that ComfyUI does with a quantized layer (moving, offloading, dynamic loading, its own FP8 and INT8 kernels) is
inherited. A layer of ours differs in how it is loaded and in what it gives back to be saved.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from .layouts import is_ours, moved
from .lora import without_duplicates
from .restore import STAND_IN
from .saving import to_save


def hybrid_operations(base: type) -> type:
    """The class `HybridBNB4bitOps` over `base`: what `comfy.ops.pick_operations` returned for a quantized model."""

    class HybridBNB4bitOps(base):
        """ComfyUI's operations, whose linear layers also take NF4, FP4, and FP8 and INT8 with row and block scales."""

        class Linear(base.Linear):
            def __init__(
                self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
            ):
                super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
                # The JSON that describes the layer in its file, byte for byte; None where it has none.
                self.file_marker: bytes | None = None
                # Text encoders say what they compute in only when they make their layers.
                self.in_text_encoder = self.factory_kwargs["dtype"] is None
                if self.in_text_encoder:
                    self.factory_kwargs["dtype"] = dtype
                    if self.bias is not None:
                        self.bias = torch.nn.Parameter(torch.empty_like(self.bias, dtype=dtype), requires_grad=False)

            def _load_from_state_dict(
                self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
                missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
            ) -> None:  # fmt: skip
                arguments = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
                marker = state_dict.get(f"{prefix}comfy_quant")
                if marker is not None:
                    content = marker.cpu().numpy().tobytes()
                    self.file_marker = None if content == STAND_IN else content
                weight = state_dict.get(f"{prefix}weight")
                if not is_ours(weight):
                    super()._load_from_state_dict(*arguments)
                    if self.in_text_encoder and self.weight is None:
                        # Some CLIP files lack the projection that ComfyUI computes whether or not it is used.
                        missing = torch.zeros(self.out_features, self.in_features, **self.factory_kwargs)
                        self.weight = torch.nn.Parameter(missing, requires_grad=False)
                        missing_keys.append(f"{prefix}weight")
                    return
                if tuple(weight.shape) != (self.out_features, self.in_features):
                    error_msgs.append(
                        f"size mismatch for {prefix}weight: the file has {tuple(weight.shape)}, the model "
                        f"{(self.out_features, self.in_features)}."
                    )
                    return
                device, dtype = self.factory_kwargs["device"], self.factory_kwargs["dtype"]
                self.quant_format = self.layout_type = weight._layout_cls
                self.weight = torch.nn.Parameter(moved(weight, device, dtype), requires_grad=False)
                input_scale = state_dict.get(f"{prefix}input_scale")
                if input_scale is not None:
                    self.register_parameter(
                        "input_scale", torch.nn.Parameter(input_scale.to(device=device), requires_grad=False)
                    )
                consumed = {f"{prefix}{name}" for name in ("weight", "comfy_quant", "input_scale")}
                for key in consumed:
                    state_dict.pop(key, None)
                torch.nn.Module._load_from_state_dict(self, *arguments)
                missing_keys[:] = [key for key in missing_keys if key not in consumed]

            def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> Any:
                """ComfyUI's, but a quantized layer's marker is the one of its file, or none where it had none."""
                tensors = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
                if isinstance(self.weight, QuantizedTensor):
                    marker = f"{prefix}comfy_quant"
                    if self.file_marker is not None:
                        tensors[marker] = torch.frombuffer(bytearray(self.file_marker), dtype=torch.uint8)
                    elif is_ours(self.weight):
                        del tensors[marker]
                    tensors.update(to_save(self, f"{prefix}weight", self.weight))
                return tensors

            def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if len(self.weight_function) > 1:
                    self.weight_function = without_duplicates(self.weight_function)
                return super().forward(input, *args, **kwargs)

    HybridBNB4bitOps.Linear.__qualname__ = "HybridBNB4bitOps.Linear"
    return HybridBNB4bitOps
