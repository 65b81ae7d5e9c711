"""From a checkpoint's tensors to one quantized tensor per layer, before ComfyUI looks at a shape.

ComfyUI recognises a model by the shapes of its weights; packed codes have others. So everything that ComfyUI cannot read
itself becomes a `QuantizedTensor` of the weight's own shape in the state dict. What ComfyUI reads stays as it is. Every
layer is checked here, from headers and small tensors alone: nothing large has been allocated when a file is refused.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Container
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from streamquant.checkpoint.header import printable
from streamquant.checkpoint.json_text import MAX_MARKER_BYTES, load_json
from streamquant.formats.bnb4 import BLOCK_SIZES
from streamquant.stored.recognise import MOST_ELEMENTS

from . import decode
from .errors import UnloadableError
from .layouts import BNB_LAYOUT, SCALED_LAYOUT, Bnb4bitLayout, ScaledLayout

QUANT_STATE = ".quant_state.bitsandbytes__"
BNB_FORMATS = {"bnb_nf4", "bnb_fp4"}
SCALED_FORMATS = {
    "float8_e4m3fn_rowwise": torch.float8_e4m3fn,
    "float8_e4m3fn_blockwise": torch.float8_e4m3fn,
    "float8_e4m3fn_block3d": torch.float8_e4m3fn,
    "int8_blockwise": torch.int8,
}
# Parts of a 4-bit layer beside its weight, by what follows the weight's name.
BNB_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
# A marker of our own for 4-bit layers that have none in the file: ComfyUI looks for markers to choose its dtypes.
STAND_IN = b'{"format": "streamquant_stand_in"}'
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def read_json(tensor: torch.Tensor, what: str) -> dict[str, Any]:
    """The JSON object in a uint8 tensor. Raises UnloadableError."""
    value = None
    if tensor.dtype == torch.uint8 and tensor.numel() <= MAX_MARKER_BYTES:
        with contextlib.suppress(ValueError):
            value = load_json(bytes(tensor.flatten().tolist()))
    if not isinstance(value, dict):
        raise UnloadableError(f"{printable(what)} is no JSON object: the file is damaged, download or convert it again.")
    return value


def restore(state_dict: dict[str, torch.Tensor], known_formats: Container[str]) -> int:
    """Turn each layer that ComfyUI cannot read into a quantized tensor, in place; returns how many there are.

    known_formats: names of the formats that this ComfyUI reads itself. Raises UnloadableError, naming the layer, for one
    that is incomplete, inconsistent, or in a format that neither knows.
    """
    restored = {}
    for key in [key for key in state_dict if QUANT_STATE in key]:
        weight_key, _, book = key.partition(QUANT_STATE)
        if book not in ("nf4", "fp4") or not weight_key.endswith(".weight"):
            raise UnloadableError(
                f"{printable(key)} is not a bitsandbytes 4-bit layer of a kind that can be loaded (nf4, fp4): "
                "convert the original file instead."
            )
        restored[weight_key] = _restore_4bit(state_dict, weight_key, key, book)
    for key in [key for key in state_dict if key.endswith(".comfy_quant")]:
        layer = key.removesuffix(".comfy_quant")
        name = str(read_json(state_dict[key], key).get("format"))
        if f"{layer}.weight" in restored:
            continue
        if f"{layer}.weight" not in state_dict:
            raise UnloadableError(f"{printable(key)} marks a layer whose weight is not there: the file is incomplete.")
        if name in SCALED_FORMATS:
            restored[f"{layer}.weight"] = _restore_scaled(state_dict, layer, name)
        elif name in BNB_FORMATS:
            raise UnloadableError(
                f"{printable(layer)} is marked {name} but has no quant_state: the file is incomplete, convert it again."
            )
        elif name not in known_formats:
            raise UnloadableError(
                f"{printable(layer)} is in the format {printable(name)}, which neither this ComfyUI nor this node "
                "knows: update ComfyUI, or convert the original file to another format."
            )
        elif f"{layer}.weight_scale" not in state_dict:
            raise UnloadableError(f"{printable(layer)} ({name}) has no weight_scale: the file is incomplete.")
    for key, weight in restored.items():
        for part in BNB_PARTS:
            state_dict.pop(key + part, None)
        state_dict[key] = weight
        if weight._layout_cls == BNB_LAYOUT:
            state_dict.pop(f"{key}{QUANT_STATE}{weight._params.book}")
            marker = key.removesuffix("weight") + "comfy_quant"
            state_dict.setdefault(marker, torch.frombuffer(bytearray(STAND_IN), dtype=torch.uint8))
        else:
            state_dict.pop(key + "_scale")
    return len(restored)


def _restore_4bit(tensors: dict[str, torch.Tensor], key: str, state_key: str, book: str) -> QuantizedTensor:
    where = printable(key)
    quant_state = bytes(tensors[state_key].flatten().tolist())
    state = read_json(tensors[state_key], state_key)
    shape, size, dtype = state.get("shape"), state.get("blocksize"), DTYPES.get(str(state.get("dtype")))
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n >= 0 for n in shape)
    if not is_shape or size not in BLOCK_SIZES or dtype is None or state.get("quant_type") != book:
        raise UnloadableError(
            f"{where}: its quant_state {printable(quant_state.decode(errors='replace'), 200)} does not describe a matrix "
            f"of {book}: the file is damaged, download or convert it again."
        )
    elements = math.prod(shape)
    blocks = -(-elements // size)

    def part(suffix: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        tensor = tensors.get(key + suffix)
        if tensor is None or tensor.dtype != dtype or tensor.numel() != count:
            found = "is not there" if tensor is None else f"is {tensor.dtype} of {tensor.numel():,} elements"
            raise UnloadableError(f"{where}{suffix} {found}, where {count:,} of {dtype} belong: the file is damaged.")
        return tensor

    packed = tensors.get(key)
    if packed is None or packed.nbytes < (elements + 1) // 2 or packed.nbytes >= (elements + 1) // 2 + 8:
        found = "is not there" if packed is None else f"holds {packed.nbytes:,} bytes"
        raise UnloadableError(f"{where} {found}, where {elements:,} weights of 4 bits belong: the file is damaged.")
    fields: dict[str, Any] = {"code": part(".quant_map", torch.float32, 16), "block_size": size, "book": book}
    if "nested_offset" in state:
        nested_size, offset = state.get("nested_blocksize"), state["nested_offset"]
        if type(nested_size) is not int or not 1 <= nested_size < MOST_ELEMENTS or type(offset) not in (int, float):
            raise UnloadableError(f"{where}: its quant_state does not say how absmax is quantized: the file is damaged.")
        fields |= {
            "scale": part(".absmax", torch.uint8, blocks),
            "nested_scale": part(".nested_absmax", torch.float32, -(-blocks // nested_size)),
            "nested_code": part(".nested_quant_map", torch.float32, 256),
            "nested_offset": float(offset),
            "nested_block_size": nested_size,
        }
    else:
        fields["scale"] = part(".absmax", torch.float32, blocks)
    params = Bnb4bitLayout.Params(
        orig_dtype=dtype, orig_shape=tuple(shape), quant_state=quant_state,
        standard_book=decode.is_standard_book(fields["code"], book), **fields,
    )  # fmt: skip
    return QuantizedTensor(packed, BNB_LAYOUT, params)


def _restore_scaled(tensors: dict[str, torch.Tensor], layer: str, name: str) -> QuantizedTensor:
    where, codes, scale = printable(layer), tensors[f"{layer}.weight"], tensors.get(f"{layer}.weight_scale")
    if scale is None:
        raise UnloadableError(f"{where} ({name}) has no weight_scale: the file is incomplete.")
    if codes.dtype != SCALED_FORMATS[name] or codes.dim() != 2 or not scale.is_floating_point():
        raise UnloadableError(
            f"{where} is marked {name}, but its weight is {codes.dtype} {tuple(codes.shape)} with {scale.dtype} scales: "
            "the file is damaged."
        )
    layout = decode.scaled_format(name, tuple(codes.shape), tuple(scale.shape))
    if layout is None:
        raise UnloadableError(
            f"{where} ({name}): scales of shape {tuple(scale.shape)} do not divide a weight of {tuple(codes.shape)}: "
            "the file is damaged, or was written by another convention."
        )
    # The logical dtype is only a preference here: ComfyUI decides what it computes in.
    params = ScaledLayout.Params(scale=scale, orig_dtype=torch.bfloat16, orig_shape=tuple(codes.shape), format=layout)
    return QuantizedTensor(codes, SCALED_LAYOUT, params)
