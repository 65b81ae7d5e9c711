"""Weights back to floating point, by whatever is fastest and right on the device they are on.

Every way gives the bits of `streamquant.kernels`: its Triton kernels on CUDA, bitsandbytes' own decoder where it is
installed and right, plain torch elsewhere. None of these libraries is imported before a weight asks for it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from streamquant.formats import FORMATS, Format
from streamquant.kernels import bnb4
from streamquant.kernels.codebooks import CODE_BOOKS

# Elements decoded at a time in plain torch: temporaries of up to 13 bytes an element stay near the CPU, or small on a GPU.
CPU_CHUNK = 1 << 20
DEVICE_CHUNK = 1 << 24


@functools.cache
def bitsandbytes_ops() -> Any:
    """`torch.ops.bitsandbytes`, or None where bitsandbytes is not installed or does not work."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError, OSError):  # a broken installation is as good as none
        return None
    ops = torch.ops.bitsandbytes
    return ops if hasattr(ops, "dequantize_4bit") else None


@functools.cache
def triton_decoders() -> Any:
    """`streamquant.kernels.gpu.dequantize`, or None where Triton's kernels cannot run."""
    from streamquant.kernels import gpu

    if gpu.why_not() is not None:
        return None
    from streamquant.kernels.gpu import dequantize

    return dequantize


def is_standard_book(code_book: torch.Tensor, book: str) -> bool:
    """Whether a file's quant_map is bitsandbytes' own table, which its kernels have built in."""
    return torch.equal(code_book.cpu(), torch.from_numpy(CODE_BOOKS[book]))


def is_right_in_bitsandbytes(device: torch.device, columns: int, block_size: int) -> bool:
    """Whether bitsandbytes decodes this shape as the format says.

    On CPUs with AVX-512, 0.50.2 takes a wrong absmax for rows that are a multiple of 16 long and end within a block.
    """
    if device.type == "cpu":
        return columns % block_size == 0 or columns % 16 != 0
    return device.type == "cuda"


def decode_absmax(params: Any) -> torch.Tensor:
    """float32 [blocks]: absmax of a 4-bit layer, double quantization undone."""
    if params.nested_scale is None:
        return params.scale
    return bnb4.decode_absmax(
        params.scale, params.nested_scale, params.nested_code, params.nested_block_size, params.nested_offset
    )


def decode_4bit(qdata: torch.Tensor, params: Any) -> torch.Tensor:
    """`params.orig_dtype` [out_features, in_features] of packed NF4 or FP4 codes.

    qdata: packed codes in any storage dtype. params: `layouts.Bnb4bitLayout.Params`.
    """
    rows, columns = params.orig_shape
    elements = rows * columns
    packed = qdata.reshape(-1).view(torch.uint8)
    dtype = params.orig_dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return decode_4bit_in_torch(packed, params, elements).view(rows, columns)
    if packed.device.type == "cuda" and (triton := triton_decoders()) is not None:
        nested = None
        if params.nested_scale is not None:
            nested = triton.Nested(
                params.nested_scale, params.nested_code, params.nested_block_size, params.nested_offset
            )
        flat = triton.decode_4bit(packed, params.scale, params.block_size, params.code, elements, dtype, nested)
        return flat.view(rows, columns)
    ops = bitsandbytes_ops()
    if ops is not None and params.standard_book and is_right_in_bitsandbytes(packed.device, columns, params.block_size):
        absmax = decode_absmax(params)
        return ops.dequantize_4bit(packed, absmax, params.block_size, params.book, [rows, columns], dtype)
    return decode_4bit_in_torch(packed, params, elements).view(rows, columns)


def decode_4bit_in_torch(packed: torch.Tensor, params: Any, elements: int) -> torch.Tensor:
    """`params.orig_dtype` [elements], decoded piece by piece so that temporaries stay small."""
    absmax = decode_absmax(params)
    output = torch.empty(elements, dtype=params.orig_dtype, device=packed.device)
    size = params.block_size
    step = max((CPU_CHUNK if packed.device.type == "cpu" else DEVICE_CHUNK) // size, 1) * size
    for begin in range(0, elements, step):
        end = min(begin + step, elements)
        scales = absmax[begin // size : -(-end // size)]
        piece = packed[begin // 2 : (end + 1) // 2]
        output[begin:end] = bnb4.decode_with(piece, scales, size, params.code, end - begin)
    return output


def scaled_format(name: str, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> Format | None:
    """The FP8 or INT8 format of a weight whose `weight_scale` has this shape, or None where none fits.

    name: as in the layer's marker. The shape of the scales decides, for some writers put row scales under a block's name.
    """
    rows, columns = shape
    integer = name.startswith("int8")
    kind = "int8" if integer else "float8_e4m3fn"
    if scale_shape in ((rows,), (rows, 1)):
        return FORMATS["int8_tensorwise"](per_row=True) if integer else FORMATS["float8_e4m3fn_rowwise"]()
    if len(scale_shape) == 2 and 0 not in scale_shape and rows % scale_shape[0] == 0:
        block = FORMATS[f"{kind}_blockwise"](block_size=rows // scale_shape[0])
        return block if block.scale_shape(shape) == scale_shape and block.misfit(shape) is None else None
    if len(scale_shape) == 3 and not integer and 0 not in scale_shape and columns % scale_shape[1] == 0:
        runs = FORMATS["float8_e4m3fn_block3d"](block_size=columns // scale_shape[1])
        return runs if runs.scale_shape(shape) == scale_shape else None
    return None


def decode_scaled(codes: torch.Tensor, scale: torch.Tensor, layout: Format, dtype: torch.dtype) -> torch.Tensor:
    """`dtype` [out_features, in_features] of FP8 or INT8 codes with row or block scales."""
    geometry = layout.geometry(tuple(codes.shape))
    if codes.device.type == "cuda" and codes.numel() and (triton := triton_decoders()) is not None:
        scale = scale.float().contiguous()
        if geometry.mode == "block":
            return triton.decode_blocks(codes.contiguous(), scale, geometry.block_size, dtype)
        groups = codes.contiguous().view(-1, geometry.group)
        return triton.decode_groups(groups, scale.view(-1), dtype).view(codes.shape)
    # A row of scales covers this many rows of the weight.
    size = geometry.block_size if geometry.mode == "block" else 1
    step = max((CPU_CHUNK if codes.device.type == "cpu" else DEVICE_CHUNK) // max(codes.shape[1], 1) // size, 1) * size
    if codes.shape[0] <= step:
        return layout.decode({"weight": codes, "weight_scale": scale}, dtype)
    output = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for begin in range(0, codes.shape[0], step):
        part = {"weight": codes[begin : begin + step], "weight_scale": scale[begin // size : (begin + step) // size]}
        output[begin : begin + step] = layout.decode(part, dtype)
    return output
