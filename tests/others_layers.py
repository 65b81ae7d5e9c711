"""Layers as other programs store them, made by those programs' own code, and decoded by it: the truth to compare with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from bitsandbytes import functional
from comfy_kitchen.backends.eager import convrot_w4a4, quantization
from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout
from small_checkpoints import Tensor

TAGS = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


class Stored(NamedTuple):
    """A layer as a file holds it. tensors: by suffix. marker: the ComfyUI JSON. decoded: float32, by the other program."""

    tensors: dict[str, Tensor]
    marker: dict | None
    decoded: torch.Tensor

    def named(self, layer: str) -> dict[str, Tensor]:
        """The tensors under a layer's name, with the marker where there is one."""
        found = {f"{layer}.{suffix}": tensor for suffix, tensor in self.tensors.items()}
        if self.marker is not None:
            found[f"{layer}.comfy_quant"] = json_tensor(self.marker)
        return found


def of_torch(value: torch.Tensor) -> Tensor:
    raw = value.contiguous().reshape(-1).view(torch.uint8)
    return Tensor(TAGS[value.dtype], tuple(value.shape), bytes(raw.numpy()))


def json_tensor(value: dict, padding: int = 0) -> Tensor:
    data = json.dumps(value).encode() + b" " * padding
    return Tensor("U8", (len(data),), data)


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Gaussian BF16 weights with a loud column."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    values[:, columns // 2] *= 8
    return values.bfloat16()


def nvfp4(w: torch.Tensor) -> Stored:
    tensor_scale = w.float().abs().amax() / (448 * 6)
    packed, scales = quantization.quantize_nvfp4(w, tensor_scale, pad_16x=True)
    decoded = quantization.dequantize_nvfp4(packed, tensor_scale, scales, torch.float32)[: w.shape[0], : w.shape[1]]
    tensors = {"weight": of_torch(packed), "weight_scale": of_torch(scales), "weight_scale_2": of_torch(tensor_scale)}
    return Stored(tensors, {"format": "nvfp4", "group_size": 16, "orig_shape": list(w.shape)}, decoded)


def mxfp8(w: torch.Tensor) -> Stored:
    codes, scales = quantization.quantize_mxfp8(w, pad_32x=True)
    decoded = quantization.dequantize_mxfp8(codes, scales, torch.float32)[: w.shape[0], : w.shape[1]]
    tensors = {"weight": of_torch(codes), "weight_scale": of_torch(scales.view(torch.uint8))}
    return Stored(tensors, {"format": "mxfp8", "group_size": 32, "orig_shape": list(w.shape)}, decoded)


def int8_convrot(w: torch.Tensor, group: int = 64) -> Stored:
    codes, params = TensorWiseINT8Layout.quantize(
        w, is_weight=True, per_channel=True, convrot=True, convrot_groupsize=group
    )
    scale = params.scale.float().reshape(-1, 1)
    decoded = torch.ops.comfy_kitchen.dequantize_int8_convrot_weight_dtype(codes, scale, group, 0).float()
    marker = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    return Stored({"weight": of_torch(codes), "weight_scale": of_torch(scale)}, marker, decoded)


def int4_convrot(w: torch.Tensor) -> Stored:
    packed, scales = convrot_w4a4.quantize_convrot_w4a4_weight(w, 64)
    decoded = convrot_w4a4.dequantize_convrot_w4a4_weight(packed, scales, 64)
    marker = {"format": "convrot_w4a4", "convrot_groupsize": 64, "linear_dtype": "int4"}
    return Stored({"weight": of_torch(packed), "weight_scale": of_torch(scales)}, marker, decoded)


def float8(w: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Stored:
    scale = w.float().abs().amax() / torch.finfo(dtype).max
    codes = (w.float() / scale).to(dtype)
    name = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}[dtype]
    tensors = {"weight": of_torch(codes), "weight_scale": of_torch(scale)}
    return Stored(tensors, {"format": name}, codes.float() * scale)


def legacy_float8(w: torch.Tensor) -> Stored:
    """The older ComfyUI spelling: no marker at the layer, `scale_weight`, one `scaled_fp8` tensor in the file."""
    found = float8(w)
    tensors = {"weight": found.tensors["weight"], "scale_weight": found.tensors["weight_scale"]}
    return Stored(tensors, None, found.decoded)


def fine_grained_float8(w: torch.Tensor, block: int = 128) -> Stored:
    """transformers' fine-grained FP8: blocks of which the last may be short, scale as `weight_scale_inv`."""
    rows, columns = -(-w.shape[0] // block), -(-w.shape[1] // block)
    padded = torch.zeros(rows * block, columns * block)
    padded[: w.shape[0], : w.shape[1]] = w.float()
    scale = padded.view(rows, block, columns, block).abs().amax(dim=(1, 3)) / 448
    spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: w.shape[0], : w.shape[1]]
    codes = (w.float() / spread).to(torch.float8_e4m3fn)
    return Stored({"weight": of_torch(codes), "weight_scale_inv": of_torch(scale)}, None, codes.float() * spread)


def plain_cast(w: torch.Tensor) -> Stored:
    codes = w.float().to(torch.float8_e4m3fn)
    return Stored({"weight": of_torch(codes)}, None, codes.float())


def llm_int8(w: torch.Tensor) -> Stored:
    """bitsandbytes `Linear8bitLt`."""
    codes, row_absmax, _ = functional.int8_vectorwise_quant(w.half())
    decoded = functional.int8_vectorwise_dequant(codes, row_absmax)
    format_number = torch.zeros((), dtype=torch.uint8)
    tensors = {"weight": of_torch(codes), "SCB": of_torch(row_absmax), "weight_format": of_torch(format_number)}
    return Stored(tensors, None, decoded.float())


def bnb4(w: torch.Tensor, book: str = "nf4", block_size: int = 64, nested: bool = False, storage=torch.uint8) -> Stored:
    """bitsandbytes `Linear4bit`. The truth is its own table times its own absmax."""
    packed, state = functional.quantize_4bit(
        w, blocksize=block_size, quant_type=book, compress_statistics=nested, quant_storage=storage
    )
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = packed.reshape(-1).view(torch.uint8)
    flat = state.code[torch.stack([codes >> 4, codes & 15], 1).reshape(-1).long()][: w.numel()]
    decoded = flat * absmax.repeat_interleave(block_size)[: w.numel()]
    named = {f"weight.{name}": of_torch(value) for name, value in state.as_dict(packed=True).items()}
    return Stored({"weight": of_torch(packed)} | named, None, decoded.view(w.shape))


# Every layout here by name, made from a BF16 weight whose columns are a multiple of 64.
EVERY_LAYOUT: dict[str, Callable[[torch.Tensor], Stored]] = {
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
    "int8 convrot": int8_convrot,
    "int4 convrot": int4_convrot,
    "float8": float8,
    "float8 e5m2": lambda w: float8(w, torch.float8_e5m2),
    "fine-grained float8": fine_grained_float8,
    "llm.int8": llm_int8,
    "nf4": bnb4,
    "fp4": lambda w: bnb4(w, "fp4", 128),
    "nf4 nested": lambda w: bnb4(w, "nf4", 64, nested=True),
    "nf4 in bf16": lambda w: bnb4(w, "nf4", 64, storage=torch.bfloat16),
}
