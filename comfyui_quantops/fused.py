"""Small batches through 4-bit weights on CUDA: a product that reads packed codes, instead of a whole weight decoded first.

A timestep embedding or a modulation multiplies one vector by a large matrix. Decoding it moves four and a half bytes a
weight; bitsandbytes' kernel moves half a byte. It decides by itself, per architecture, how large a batch it still wins.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, register_layout_op

from .decode import bitsandbytes_ops

LARGEST_BATCH = 64  # vectors above which decoding once is never slower


def gemm_4bit() -> Any:
    """bitsandbytes' product with a packed weight, or None where it is missing or too old to have it."""
    ops = bitsandbytes_ops()
    return getattr(ops, "gemm_4bit", None) if ops is not None else None


def fits(inputs: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> bool:
    """Whether the fused product computes this linear layer, and is worth it."""
    params = weight._params
    columns = weight.shape[1]
    return (
        inputs.device.type == "cuda"
        and weight._qdata.device == inputs.device
        and inputs.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and 0 < inputs.numel() <= LARGEST_BATCH * columns
        and columns % params.block_size == 0
        and params.standard_book
        and params.nested_block_size == 256
        and (bias is None or bias.dtype == inputs.dtype)
        and gemm_4bit() is not None
    )


def linear(inputs: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`inputs @ weight.T + bias` by the fused product, which `fits` has allowed."""
    params = weight._params
    arguments = [inputs.contiguous(), weight._qdata.reshape(-1, 1), list(weight.shape)]
    if params.nested_scale is None:
        return gemm_4bit()(*arguments, params.scale, params.block_size, params.book, bias)
    offset = torch.tensor(params.nested_offset, dtype=torch.float32, device=inputs.device)
    return gemm_4bit()(
        *arguments, params.nested_scale, params.block_size, params.book, bias, params.scale, params.nested_code, offset
    )


def register(layout: type) -> None:
    """Let linear layers with weights of `layout` come here."""

    @register_layout_op(torch.ops.aten.linear.default, layout)
    def handle(first: Any, arguments: tuple, keywords: dict[str, Any]) -> torch.Tensor:
        del first
        inputs, weight, bias = (*arguments, None)[:3]
        if isinstance(inputs, QuantizedTensor):
            inputs = inputs.dequantize()
        if not isinstance(weight, QuantizedTensor):
            return torch.nn.functional.linear(inputs, weight, bias)
        if not keywords and fits(inputs, weight, bias):
            return linear(inputs, weight, bias)
        return torch.nn.functional.linear(inputs, weight.dequantize(), bias, **keywords)
