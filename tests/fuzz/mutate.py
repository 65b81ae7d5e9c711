"""Mutations that keep a safetensors file readable: its header is changed as JSON, its length made right again.

A flipped bit in a header is refused at once, and what lies behind the header would never be reached. So most mutations
change one value in the JSON (of the header, of a marker in the data, of JSON inside the metadata) or the bytes of one tensor, and
give every tensor its place anew.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from streamquant.checkpoint.header import DTYPE_BITS

NUMBERS = (0, 1, -1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 65, 127, 128, 255, 256, 1024, 4096, 2**31 - 1, 2**31, 2**32, 2**53, 2**63,
           2**64 - 1, 2**64, 10**40, 0.5, -0.0, 1e308, float("inf"), float("nan"))  # fmt: skip
TEXTS = ("", "weight", "l.weight", "__metadata__", "fp8", "float8_e4m3fn", "float8_e4m3fn_blockwise", "int8_tensorwise", "int8_blockwise",
         "nvfp4", "mxfp8", "hybrid_mxfp8", "convrot_w4a4", "nf4", "fp4", "bfloat16", "torch.float16", "\x1b[2J", "[red]", "\u202e", "\0", "9" * 5000,
         "a." * 400, "<script>", "../x", *DTYPE_BITS)  # fmt: skip
KEYS = ("format", "shape", "blocksize", "quant_type", "dtype", "nested_blocksize", "nested_offset", "orig_shape", "orig_dtype", "convrot",
        "convrot_groupsize", "group_size", "params", "double_quant", "layers", "tensor_xxh3_64", "recipe", "source")  # fmt: skip
SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "weight_scale_inv", "scale_weight", "SCB", "weight_format", "comfy_quant", "input_scale",
            "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
            "weight.quant_state.bitsandbytes__fp4", "weight_code", "scaled_fp8", "count", "mean", "diagonal", "sketch", "hessian")  # fmt: skip


def mutate(data: bytes, max_size: int, seed: int, plain: Callable[[bytes, int], bytes]) -> bytes:
    """One changed file; plain: atheris' own mutation, taken now and then, and where the file is none."""
    chance = random.Random(seed)
    opened = _open(data) if chance.random() < 0.9 else None
    if opened is None:
        return plain(data, max_size)
    metadata, tensors = opened
    for _ in range(chance.choice((1, 1, 2, 4))):
        _change(metadata, tensors, chance, plain)
    return _close(metadata, tensors, chance)[:max_size]


def _open(data: bytes) -> tuple[dict[str, Any], dict[str, list[Any]]] | None:
    """(metadata, name -> [dtype, shape, bytes])."""
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        document = json.loads(data[8:begin])
        metadata = document.pop("__metadata__", {})
        tensors = {name: [entry["dtype"], entry["shape"], data[begin:][slice(*entry["data_offsets"])]] for name, entry in document.items()}
        return (metadata, tensors) if tensors and type(metadata) is dict else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _close(metadata: dict[str, Any], tensors: dict[str, list[Any]], chance: random.Random) -> bytes:
    document: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        if chance.random() < 0.97:
            raw = _fitted(dtype, shape, raw)
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    try:
        head = json.dumps(document, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return data
    return len(head).to_bytes(8, "little") + head + data


def _fitted(dtype: Any, shape: Any, raw: bytes) -> bytes:
    """The tensor's bytes cut or repeated to what dtype and shape need, where that is little."""
    try:
        bits = DTYPE_BITS[dtype]
        for dimension in shape:
            bits *= dimension
        needed = bits // 8
    except (TypeError, KeyError):
        return raw
    if type(needed) is not int or not 0 <= needed <= 1 << 15:
        return raw
    return (raw * (needed // max(len(raw), 1) + 1) or bytes(needed))[:needed]


def _change(metadata: dict[str, Any], tensors: dict[str, list[Any]], chance: random.Random, plain: Callable) -> None:
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    kind = chance.randrange(10)
    if kind == 0:
        tensor[0] = chance.choice(list(DTYPE_BITS))
    elif kind == 1 and type(tensor[1]) is list:
        tensor[1] = _shape(tensor[1], chance)
    elif kind == 2:
        tensors[_renamed(name, chance)] = tensors.pop(name)
    elif kind == 3 and len(tensors) > 1:
        del tensors[name]
    elif kind == 4:
        tensors[_renamed(name, chance)] = list(tensor)
    elif kind == 5:
        tensor[2] = plain(tensor[2], 1 << 14)
        if tensor[0] in ("U8", "I8") and len(tensor[1]) == 1:
            tensor[1] = [len(tensor[2])]
    elif kind == 6:
        key = chance.choice((*metadata, "streamquant", "_quantization_metadata", chance.choice(TEXTS)))
        metadata[key] = _json_text(metadata.get(key, "{}"), chance)
    else:
        for found in tensors.values():
            if found[0] == "U8" and found[2][:1] == b"{":
                found[2] = _json_text(found[2].decode("utf-8", "replace"), chance).encode("utf-8", "replace")
                found[1] = [len(found[2])]
                break


def _shape(shape: list[Any], chance: random.Random) -> list[Any]:
    shape = list(shape)
    kind = chance.randrange(5)
    if kind == 0:
        shape.insert(chance.randint(0, len(shape)), chance.choice(NUMBERS[:20]))
    elif kind == 1 and shape:
        shape.pop(chance.randrange(len(shape)))
    elif kind == 2 and shape:
        shape[chance.randrange(len(shape))] = chance.choice(NUMBERS)
    elif kind == 3:
        chance.shuffle(shape)
    else:
        shape += [1] * chance.choice((1, 2, 31, 70))
    return shape


def _renamed(name: str, chance: random.Random) -> str:
    layer = name.split(".")[0]
    return chance.choice((f"{layer}.{chance.choice(SUFFIXES)}", f"l.{chance.choice(SUFFIXES)}", f"{name}.{chance.choice(TEXTS)}",
                          chance.choice(TEXTS) or "x", f"{layer}.{chance.choice(NUMBERS[:20])}.weight"))  # fmt: skip


def _json_text(text: str, chance: random.Random) -> str:
    """JSON with one value changed, or damaged."""
    text = str(text)  # metadata that was changed may be any JSON
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = {}
    if chance.random() < 0.1:
        return chance.choice(("[" * 300 + "]" * 300, '{"a":' * 400 + "1" + "}" * 400, "null", "[]", text[:-1], text + "\0", " " + text, "1" * 5000))
    return json.dumps(_changed(value, chance, 4))


def _changed(value: Any, chance: random.Random, depth: int) -> Any:
    if isinstance(value, dict) and depth:
        key = chance.choice((*value, chance.choice(KEYS)))
        if chance.random() < 0.1:
            return {other: item for other, item in value.items() if other != key}
        return value | {key: _changed(value.get(key), chance, depth - 1)}
    if isinstance(value, list) and value and depth and chance.random() < 0.7:
        position = chance.randrange(len(value))
        return [*value[:position], _changed(value[position], chance, depth - 1), *value[position + 1 :]]
    return chance.choice((chance.choice(NUMBERS), chance.choice(TEXTS), None, True, False, [], {}, [chance.choice(NUMBERS)] * chance.choice((1, 2, 70)),
                          {chance.choice(KEYS): chance.choice(NUMBERS)}))  # fmt: skip
