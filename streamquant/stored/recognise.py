"""One quantized layer: from the tensors beside its weight, and what the file says of them, to a layout.

Nothing is believed that the tensors do not bear out: shapes and sizes are checked here, so that decoding cannot fail.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamquant.checkpoint.header import printable
from streamquant.checkpoint.reader import SourceTensor
from streamquant.formats.bnb4 import DTYPE_NAMES

from .four_bit import BOOK_BYTES, Blocks4bit, Nested, RotatedInt4
from .layouts import TILE_ELEMENTS, Layout, ScaledCodes, geometry
from .microscaled import BAND, MxFp8, NvFp4

COMFYUI, NODES = "stock ComfyUI", "ComfyUI with a node pack"
BITSANDBYTES = "bitsandbytes, diffusers, Forge"
TRANSFORMERS = "transformers with bitsandbytes"
FINE_GRAINED = "transformers (fine-grained FP8)"
# Format -> dtype of its codes.
SCALED_FORMATS = {
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fn_rowwise": "F8_E4M3", "float8_e4m3fn_blockwise": "F8_E4M3",
    "float8_e4m3fn_block3d": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e5m2_rowwise": "F8_E5M2",
    "float8_e5m2_blockwise": "F8_E5M2", "int8_tensorwise": "I8", "int8_blockwise": "I8",
}  # fmt: skip
STOCK_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "nvfp4", "mxfp8", "convrot_w4a4")
FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
CODE_DTYPES = ("F8_E4M3", "F8_E5M2", "I8")
SCALE_DTYPES = ("F32", "BF16", "F16", "F64", "F8_E8M0")
ORIGINS = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}
STATE_ORIGINS = {name: tag for tag, name in DTYPE_NAMES.items() if tag != "F64"}
INT8_DIVISOR = 127.0
MAX_BLOCK_SIZE = 1 << 16  # bitsandbytes' largest is 4096
LARGEST_BLOCK = 512  # edge of a block that anybody writes
FLOAT32_MAX = float(np.finfo(np.float32).max)
MOST_ELEMENTS = 1 << 62  # larger numbers count nothing that is in a file, and numpy has none
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Found:
    """What a layer turned out to be; the fields are those of `StoredLayer`."""

    format: str
    detail: str
    shape: tuple[int, ...]
    layout: Layout | None
    origin: str | None
    loaders: tuple[str, ...]
    faults: tuple[str, ...] = ()


def recognise(
    tensors: dict[str, SourceTensor],
    marker: dict[str, Any] | None,
    states: dict[str, dict[str, Any]],
    legacy: bool,
) -> Found | None:
    """What the layer is, or None when it is not quantized.

    tensors: "weight" and what lies beside it, by suffix. marker: ComfyUI's, if any. states: bitsandbytes quant_states by
    suffix. legacy: whether the file is of the older `scaled_fp8` kind.
    """
    dtype = tensors["weight"].info.dtype
    if states:
        return _bitsandbytes(tensors, marker, *next(iter(states.items())))
    if marker is not None:
        return _marked(tensors, marker)
    if "SCB" in tensors and dtype == "I8":
        return _llm_int8(tensors)
    if "weight.absmax" in tensors and dtype not in FLOATS:
        return _unknown("bnb_4bit", tensors, "its quant_state is missing, which says what its codes mean and what shape it has")
    if dtype not in CODE_DTYPES:
        return None
    if "weight_scale_inv" in tensors:
        return _scaled(tensors, "weight_scale_inv", _name(tensors), (FINE_GRAINED,))
    if legacy and dtype in FLOAT8:
        scale = "scale_weight" if "scale_weight" in tensors else None
        return _scaled(tensors, scale, FLOAT8[dtype], (COMFYUI,), note="older scaled_fp8 spelling")
    for suffix in ("weight_scale", "scale_weight"):
        if suffix in tensors:
            fault = "no marker names its format, so ComfyUI would load its codes without their scale"
            return _scaled(tensors, suffix, _name(tensors), (), faults=(fault,))
    if dtype in FLOAT8:
        return _scaled(tensors, None, FLOAT8[dtype], (COMFYUI,), note="a plain cast")
    return None


def _name(tensors: dict[str, SourceTensor]) -> str:
    return FLOAT8.get(tensors["weight"].info.dtype, "int8")


def _marked(tensors: dict[str, SourceTensor], marker: dict[str, Any]) -> Found:
    """A layer with a ComfyUI marker."""
    name = marker.get("format")
    if not isinstance(name, str):
        return _unknown("unnamed", tensors, "its marker names no format")
    loaders = (COMFYUI,) if name in STOCK_FORMATS else (NODES,)
    origin = ORIGINS.get(str(marker.get("orig_dtype")))
    if name in ("nvfp4", "mxfp8", "hybrid_mxfp8"):
        return _microscaled(tensors, marker, name, loaders, origin)
    if name == "convrot_w4a4":
        return _rotated_int4(tensors, marker, loaders)
    if name == "nf4":
        return _core_nf4(tensors, marker)
    if name not in SCALED_FORMATS:
        return _unknown(name, tensors, "its format is not known here", loaders=(NODES,))
    faults = []
    scale = "weight_scale" if "weight_scale" in tensors else None
    if scale is None and "scale_weight" in tensors:
        faults.append("its scale is spelled scale_weight where loaders look for weight_scale, so they compute without it")
    elif scale is None:
        faults.append("its weight_scale is missing, so loaders compute without it")
    codes = tensors["weight"].info.dtype
    if codes in CODE_DTYPES and codes != SCALED_FORMATS[name]:
        faults.append(f"its codes are {codes}, where {name} has {SCALED_FORMATS[name]}")
    if scale and (found := tensors[scale].info.dtype) != "F32":
        faults.append(f"its scale is stored as {found}, where loaders want F32: it is rounded")
    rotation = _rotation(marker)
    if rotation and name != "int8_tensorwise":
        faults.append("it is marked as rotated, which loaders undo for int8_tensorwise only")
        rotation = 0
    size = marker.get("group_size")
    declared = size if type(size) is int and 0 < size < MOST_ELEMENTS else 0
    return _scaled(tensors, scale, name, loaders, origin, rotation, tuple(faults), declared=declared)


def _rotation(marker: dict[str, Any]) -> int:
    """The Hadamard group size of a rotated INT8 layer, 0 when it is not rotated; the fields may lie under `params`."""
    nested = marker.get("params")
    fields = marker | nested if isinstance(nested, dict) else marker
    if not fields.get("convrot"):
        return 0
    size = fields.get("convrot_groupsize", 256)
    return size if type(size) is int else -1


def _is_group(size: int, columns: int) -> bool:
    """Whether columns can be rotated in groups of this size, each within a tile."""
    return 1 < size <= TILE_ELEMENTS and size & (size - 1) == 0 and size.bit_length() % 2 == 1 and columns % size == 0


def _scaled(
    tensors: dict[str, SourceTensor],
    scale_suffix: str | None,
    name: str,
    loaders: tuple[str, ...],
    origin: str | None = None,
    rotation: int = 0,
    faults: tuple[str, ...] = (),
    note: str = "",
    divisor: float = 1.0,
    declared: int = 0,
) -> Found:
    """FP8 or INT8 codes with one scale tensor, or none."""
    codes = tensors["weight"]
    shape = codes.info.shape
    if codes.info.dtype not in CODE_DTYPES:
        return _unknown(name, tensors, f"its codes are {codes.info.dtype}, which {printable(name)} does not have", loaders)
    if rotation and not (len(shape) == 2 and _is_group(rotation, shape[1])):
        return _unknown(name, tensors, f"its rotation by groups of {rotation} does not fit its shape", loaders)
    if scale_suffix is None:
        words = ["no scale", *([note] if note else [])]
        return Found(name, ", ".join(words), shape, ScaledCodes(shape, codes), origin, loaders, faults)
    scale = tensors[scale_suffix]
    blocks = geometry(shape, scale.info.shape, declared)
    if blocks is None or scale.info.dtype not in SCALE_DTYPES:
        what = f"its scale, {scale.info.dtype} {list(scale.info.shape)}, does not fit a weight of {list(shape)}"
        return _unknown(name, tensors, what, loaders)
    if declared and name.endswith(("_blockwise", "_block3d")) and 1 not in blocks and declared not in blocks:
        faults = (*faults, f"its marker says blocks of {declared}, and its scales are of blocks of {blocks[0]} x {blocks[1]}")
    elif loaders in ((COMFYUI,), (NODES,)) and (fault := _extent_fault(name, scale.info.elements, shape, blocks, declared)):
        faults = (*faults, fault)
    layout = ScaledCodes(shape, codes, scale, *blocks, rotation=rotation, divisor=divisor)
    words = [scales_in_words(shape, *blocks)]
    words += [f"rotated by {rotation}"] if rotation else []
    words += [note] if note else []
    return Found(name, ", ".join(words), shape, layout, origin, loaders, faults)


def _extent_fault(name: str, count: int, shape: tuple[int, ...], blocks: tuple[int, int], declared: int) -> str | None:
    """Why a loader that goes by the format's name would use these scales wrongly, or None."""
    name = printable(name, 40)
    row_block, column_block = blocks
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    if name in ("float8_e4m3fn", "float8_e5m2"):
        return None if count == 1 else f"{name} has one scale, and it has {count:,}"
    by_row = count == 1 or (row_block == 1 and column_block >= columns)
    if name in ("int8_tensorwise", "float8_e4m3fn_rowwise"):
        return None if by_row else f"{name} has one scale per row, and it has {count:,}"
    of_rows = name.endswith("_block3d")  # whose blocks are pieces of a row
    if declared and count == -(-rows // (1 if of_rows else declared)) * -(-columns // declared):
        return None
    if count == 1:  # a block may be as large as the layer
        return f"{name} has scales of blocks, and it has one" if max(rows, columns) > LARGEST_BLOCK else None
    is_row_a_block = of_rows and columns <= LARGEST_BLOCK
    return f"{name} has scales of blocks, and it has one per row" if by_row and not is_row_a_block else None


def scales_in_words(shape: tuple[int, ...], row_block: int, column_block: int) -> str:
    """How many weights share a scale."""
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    if row_block >= rows and column_block >= columns:
        return "tensor scale"
    if row_block == 1:
        return "row scales" if column_block >= columns else f"runs of {column_block}"
    return f"{row_block} x {column_block} blocks"


def _llm_int8(tensors: dict[str, SourceTensor]) -> Found:
    return _scaled(tensors, "SCB", "bnb_int8", (TRANSFORMERS,), divisor=INT8_DIVISOR)


def _bitsandbytes(tensors: dict[str, SourceTensor], marker: dict[str, Any] | None, suffix: str, state: dict[str, Any]) -> Found:
    """bitsandbytes 4-bit with its quant_state."""
    book = suffix.rsplit("__", 1)[-1]
    name = f"bnb_{book}"
    loaders = (BITSANDBYTES, NODES)
    shape, block_size = _shape(state.get("shape")), state.get("blocksize")
    if book not in ("nf4", "fp4") or shape is None or not _is_block_size(block_size):
        return _unknown(name, tensors, "its quant_state is not one of bitsandbytes 4-bit", loaders)
    if state.get("quant_type") != book:
        return _unknown(name, tensors, "its quant_state names two code books", loaders)
    origin = STATE_ORIGINS.get(str(state.get("dtype")))
    return _blocks(tensors, name, book, shape, block_size, origin, loaders, state)


def _core_nf4(tensors: dict[str, SourceTensor], marker: dict[str, Any]) -> Found:
    """ComfyUI's own spelling of NF4: absmax as weight_scale, the book as weight_code, the rest in the marker."""
    shape, block_size = _shape(marker.get("shape")), marker.get("blocksize", 64)
    renamed = {"weight": tensors["weight"]}
    renamed |= {"weight.absmax": tensors["weight_scale"]} if "weight_scale" in tensors else {}
    renamed |= {"weight.quant_map": tensors["weight_code"]} if "weight_code" in tensors else {}
    if shape is None or not _is_block_size(block_size) or marker.get("double_quant"):
        return _unknown("nf4", tensors, "its marker does not say its shape and block size", (NODES,))
    return _blocks(renamed, "nf4", "nf4", shape, block_size, STATE_ORIGINS.get(str(marker.get("dtype"))), (NODES,), {})


def _blocks(
    tensors: dict[str, SourceTensor],
    name: str,
    book: str,
    shape: tuple[int, ...],
    block_size: int,
    origin: str | None,
    loaders: tuple[str, ...],
    state: dict[str, Any],
) -> Found:
    """NF4 or FP4 in blocks: check that the tensors hold what the state says."""
    elements = math.prod(shape)
    count = -(-elements // block_size)
    packed, absmax, quant_map = (tensors.get(f"weight{part}") for part in ("", ".absmax", ".quant_map"))
    if absmax is None or absmax.info.elements != count or packed.info.nbytes < (elements + 1) // 2:
        return _unknown(name, tensors, f"its tensors do not hold a weight of {list(shape)} in blocks of {block_size}", loaders)
    if quant_map is not None and (quant_map.info.dtype != "F32" or quant_map.info.nbytes != BOOK_BYTES):
        return _unknown(name, tensors, "its quant_map is not 16 numbers", loaders)
    nested = None
    if absmax.info.dtype == "U8":
        nested = _nested(tensors, state, count)
        if nested is None:
            return _unknown(name, tensors, "its absmax is in 8 bits, and what decodes it is missing", loaders)
    elif absmax.info.dtype not in ("F32", "F16", "BF16"):
        return _unknown(name, tensors, f"its absmax is {absmax.info.dtype}", loaders)
    faults = ()
    if absmax.info.dtype in ("F16", "BF16"):
        faults = (f"its absmax is stored as {absmax.info.dtype}, where loaders want F32: it is rounded",)
    layout = Blocks4bit(shape, packed, absmax, block_size, book, quant_map, nested)
    detail = f"blocks of {block_size}{', absmax in 8 bits' if nested else ''}"
    return Found(name, detail, shape, layout, origin, loaders, faults)


def _nested(tensors: dict[str, SourceTensor], state: dict[str, Any], count: int) -> Nested | None:
    absmax, code_map = tensors.get("weight.nested_absmax"), tensors.get("weight.nested_quant_map")
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    numbers = type(size) is int and 0 < size < MOST_ELEMENTS and type(offset) in (int, float) and abs(offset) <= FLOAT32_MAX
    if absmax is None or code_map is None or not numbers or absmax.info.elements != -(-count // size):
        return None
    if (absmax.info.dtype, code_map.info.dtype, code_map.info.elements) != ("F32", "F32", 256):
        return None
    return Nested(absmax, code_map, size, float(offset))


def _rotated_int4(tensors: dict[str, SourceTensor], marker: dict[str, Any], loaders: tuple[str, ...]) -> Found:
    packed, scale = tensors["weight"], tensors.get("weight_scale")
    group = _rotation(marker | {"convrot": True})
    fits = scale is not None and len(packed.info.shape) == 2 and packed.info.dtype in ("I8", "U8")
    fits = fits and scale.info.dtype == "F32" and scale.info.elements == packed.info.shape[0]
    if not fits or not _is_group(group, 2 * packed.info.shape[1]):
        return _unknown("convrot_w4a4", tensors, "its tensors are not those of the format", loaders)
    shape = (packed.info.shape[0], 2 * packed.info.shape[1])
    layout = RotatedInt4(shape, packed, scale, group)
    return Found("convrot_w4a4", f"row scales, rotated by {group}", shape, layout, None, loaders)


def _microscaled(
    tensors: dict[str, SourceTensor], marker: dict[str, Any], name: str, loaders: tuple[str, ...], origin: str | None
) -> Found:
    codes, scale = tensors["weight"], tensors.get("weight_scale")
    four_bit = name == "nvfp4"
    group = 16 if four_bit else 32
    dtypes = ("U8", "F4") if four_bit else ("F8_E4M3",)
    if codes.info.dtype not in dtypes or len(codes.info.shape) != 2 or scale is None:
        return _unknown(name, tensors, "its tensors are not those of the format", loaders)
    rows, columns = codes.info.shape
    columns *= 2 if codes.info.dtype == "U8" else 1
    expected = -(-rows // BAND) * BAND * (-(-columns // group // 4) * 4)
    if columns % group or scale.info.nbytes != expected:
        return _unknown(name, tensors, f"its scales do not fit a weight of {rows} x {columns}", loaders)
    shape = _shape(marker.get("orig_shape")) or (rows, columns)
    if len(shape) != 2 or not (0 < shape[0] <= rows and 0 < shape[1] <= columns):
        return _unknown(name, tensors, f"its orig_shape {list(shape)} does not fit its codes", loaders)
    if not four_bit:
        return Found(name, "groups of 32", shape, MxFp8(shape, codes, scale, columns), origin, loaders)
    tensor_scale = tensors.get("weight_scale_2")
    if tensor_scale is None or tensor_scale.info.dtype != "F32" or tensor_scale.info.elements != 1:
        return _unknown(name, tensors, "its weight_scale_2 is missing", loaders)
    return Found(name, "groups of 16", shape, NvFp4(shape, codes, scale, columns, tensor_scale), origin, loaders)


def undescribed(tensors: dict[str, SourceTensor], suffix: str) -> Found:
    """A layer whose description is no JSON object."""
    what = suffix.removeprefix("weight.").partition("__")[0]
    return _unknown("undescribed", tensors, f"its {what} is not the JSON object that it should be: it is damaged")


def _unknown(name: str, tensors: dict[str, SourceTensor], fault: str, loaders: tuple[str, ...] = ()) -> Found:
    return Found(name, "cannot be decoded here", tensors["weight"].info.shape, None, None, loaders, (fault,))


def _is_block_size(value: Any) -> bool:
    """Whether 4-bit blocks may have this size. A tile decodes whole blocks: one as large as its layer would fill the memory."""
    return type(value) is int and 2 <= value <= MAX_BLOCK_SIZE and value % 2 == 0


def _shape(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, list) and value and all(type(dimension) is int and dimension > 0 for dimension in value):
        return tuple(value)
    return None


def undecodable_sentence(name: str, format_name: str, faults: tuple[str, ...]) -> str:
    """Why a layer stops whoever wants its weights."""
    return f"The layer {printable(name)} ({printable(format_name)}) cannot be decoded: {'; '.join(faults)}."


def loaders_in_words(per_layer: list[tuple[str, ...]], foreign: dict[str, str]) -> str:
    """Who loads a file with these layers: only who reads all of them."""
    if foreign:
        return f"what loads {', '.join(sorted(set(foreign.values())))}"
    if not per_layer:
        return "anything: no layer is quantized"
    counts = Counter(loader for loaders in per_layer for loader in loaders)
    everyone = [loader for loader, count in counts.items() if count == len(per_layer)]
    if everyone:
        return "; ".join(everyone)
    if all({COMFYUI, NODES} & set(loaders) for loaders in per_layer):
        return NODES
    return "no loader known here reads all of its layers"
