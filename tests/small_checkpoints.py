"""Small checkpoints made in the test, and files read back without the code under test.

A tensor is its bytes: so every dtype can be made, those that torch and numpy lack too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from streamquant import FormatChoice, Recipe
from streamquant.checkpoint.header import DTYPE_BITS, build_header, layout

NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


class Tensor(NamedTuple):
    """One tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def floats(*shape: int, dtype: str = "BF16", seed: int = 0) -> Tensor:
    """Gaussian weights."""
    return of_values(np.random.default_rng(seed).standard_normal(shape), dtype)


def of_values(values: np.ndarray, dtype: str = "BF16") -> Tensor:
    """These values in a floating dtype; BF16, which numpy lacks, is the upper half of float32."""
    values = np.asarray(values)
    if dtype == "BF16":
        data = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    else:
        data = values.astype(NUMPY[dtype]).tobytes()
    return Tensor(dtype, values.shape, data)


def noise(dtype: str, *shape: int, seed: int = 0) -> Tensor:
    """Random bytes under any dtype: what is copied is never looked at."""
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    assert bits % 8 == 0
    return Tensor(dtype, shape, np.random.default_rng(seed).bytes(bits // 8))


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    placed = layout((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(build_header(placed, metadata or {}) + b"".join(tensors[info.name].data for info in placed))
    return path


def save_shards(folder: Path, *shards: dict[str, Tensor], stem: str = "model", **weight_map: str) -> Path:
    """Write shards and their index; weight_map: entries that differ from the truth. Returns the index."""
    listed = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save(folder / name, tensors, {"format": "pt", f"from shard {number}": "yes"})
        listed |= dict.fromkeys(tensors, name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed | weight_map}))
    return index


def split(path: Path) -> tuple[dict, bytes]:
    """A file's header as JSON and its data section."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:begin]), raw[begin:]


def load(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file."""
    header, data = split(path)
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = Tensor(entry["dtype"], tuple(entry["shape"]), data[begin:end])
    return found


def metadata_of(path: Path) -> dict[str, str]:
    return split(path)[0].get("__metadata__", {})


def sample() -> dict[str, Tensor]:
    """A little of everything: every floating dtype, odd shapes, a layer of zeros, what stays, what is no weight."""
    return {
        "blocks.0.attn.qkv.weight": floats(96, 64, seed=1),
        "blocks.0.attn.qkv.bias": floats(96, seed=2),
        "blocks.0.mlp.up.weight": floats(37, 33, dtype="F16", seed=3),
        "blocks.0.norm1.weight": floats(64, dtype="F32", seed=4),
        "blocks.1.attn.qkv.weight": floats(128, 160, dtype="F32", seed=5),
        "blocks.1.mlp.up.weight": floats(7, 65, dtype="F64", seed=6),
        "blocks.1.mlp.zeros.weight": of_values(np.zeros((64, 64))),
        "blocks.1.tall.weight": floats(301, 1, seed=7),
        "blocks.2.attn.qkv.weight": floats(256, 96, seed=8),
        "blocks.2.empty.weight": floats(0, 8),
        "conv.weight": floats(4, 2, 3, 3, seed=9),
        "img_in.weight": floats(64, 16, dtype="F32", seed=10),
        "position_ids": noise("I64", 5, seed=11),
        "scalar": floats(dtype="F32", seed=12),
    }


# One recipe per format and mode; block sizes that some of the sample's layers fit and some do not.
EVERY_FORMAT = {
    "fp8-tensor": Recipe(FormatChoice("fp8", rounding="rtn")),
    "fp8-row": Recipe(FormatChoice("fp8", "row", rounding="rtn")),
    "fp8-block": Recipe(FormatChoice("fp8", "block", 32, rounding="rtn")),
    "fp8-block3d": Recipe(FormatChoice("fp8", "block3d", 32, rounding="rtn")),
    "fp8-e5m2": Recipe(FormatChoice("fp8_e5m2", rounding="rtn")),
    "int8-tensor": Recipe(FormatChoice("int8", "tensor", rounding="rtn")),
    "int8-row": Recipe(FormatChoice("int8", "row", rounding="rtn")),
    "int8-row-rotated": Recipe(FormatChoice("int8", convrot=True, convrot_group_size=16)),
    "int8-block": Recipe(FormatChoice("int8", "block", 32, rounding="rtn")),
    "nf4": Recipe(FormatChoice("nf4", rounding="rtn")),
    "nf4-double": Recipe(FormatChoice("nf4", block_size=32, double_quant=True, rounding="rtn")),
    "fp4": Recipe(FormatChoice("fp4", block_size=128, rounding="rtn"), comfy_quant=True),
    "fp4-double": Recipe(FormatChoice("fp4", double_quant=True, rounding="rtn")),
    "cast-bf16": Recipe(FormatChoice("keep"), cast="BF16"),
    "cast-fp16": Recipe(FormatChoice("int8", rounding="rtn"), cast="F16"),
}

# The same formats with scales of least error: compiled and plain search may differ where two scales are equally good.
SEARCHED_FORMATS = {
    "fp8-row-searched": Recipe(FormatChoice("fp8", "row", rounding="simple")),
    "fp8-block-searched": Recipe(FormatChoice("fp8", "block", 32, rounding="simple")),
    "nf4-searched": Recipe(FormatChoice("nf4", rounding="simple")),
    "nf4-careful": Recipe(FormatChoice("nf4")),
    "nf4-double-searched": Recipe(FormatChoice("nf4", block_size=32, double_quant=True)),
    "int8-row-auto": Recipe(FormatChoice("int8")),
}

# A choice for each format and mode whose scales are searched and whose codes are learned where inputs are known.
LEARNED_CHOICES = {
    "fp8-tensor": FormatChoice("fp8"),
    "fp8-row": FormatChoice("fp8", "row"),
    "fp8-block": FormatChoice("fp8", "block", 32),
    "fp8-block3d": FormatChoice("fp8", "block3d", 32),
    "int8-tensor": FormatChoice("int8", "tensor"),
    "int8-row": FormatChoice("int8", convrot=False),
    "int8-rotated": FormatChoice("int8", convrot=True, convrot_group_size=16),
    "int8-block": FormatChoice("int8", "block", 32),
    "nf4": FormatChoice("nf4"),
    "nf4-double": FormatChoice("nf4", block_size=32, double_quant=True),
    "fp4": FormatChoice("fp4", block_size=32),
}
