"""What every launcher needs: views that kernels can load, block sizes, and the one place where kernels are started."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch

LOADABLE = (torch.bfloat16, torch.float16, torch.float32)
# A tile that stays in registers between finding its absmax and encoding it: 32 elements a thread with 16 warps.
RESIDENT_ELEMENTS = 16384
STREAMED_ELEMENTS = 2048  # of a program whose elements do not depend on each other: 16 a thread with 4 warps
# One thread at a time: Triton's caches of compiled kernels, and its interpreter altogether, are not made for several.
_starting = threading.Lock()


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1) instead of compiling them."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def next_power_of_2(number: int) -> int:
    """Smallest power of two not below `number`, and 1 for 0: Triton's blocks have no other lengths."""
    return 1 << max(number - 1, 0).bit_length()


def ceil_divide(dividend: int, divisor: int) -> int:
    """`dividend / divisor`, rounded up."""
    return -(-dividend // divisor)


def is_vectorised(columns: int) -> bool:
    """Whether rows start at multiples of 16 elements, so that a thread loads several elements at once.

    Otherwise each is loaded by itself, with an address and a mask of its own, which fill the registers.
    """
    return columns % 16 == 0


def resident_elements(columns: int) -> int:
    """Elements of a tile that a program keeps in registers."""
    return RESIDENT_ELEMENTS if is_vectorised(columns) else RESIDENT_ELEMENTS // 4


def warps(elements: int, columns: int) -> int:
    """Warps, at most 16, for a program that holds `elements` elements of rows of `columns`: 16 (8) or more a thread."""
    return min(max(next_power_of_2(elements) // (512 if is_vectorised(columns) else 256), 1), 16)


def tile_shape(groups: int, group: int, elements: int) -> tuple[int, int]:
    """(rows, width) of a tile of at most `elements` elements over [groups, group], both powers of two."""
    width = min(next_power_of_2(group), elements)
    return min(elements // width, next_power_of_2(groups)), width


def row_tile(rows: int, columns: int) -> tuple[int, int]:
    """(rows, width), powers of two, of a program that holds whole rows: several where they are short."""
    width = next_power_of_2(columns)
    return min(max(STREAMED_ELEMENTS // width, 1), next_power_of_2(rows)), width


def check_weight(tensor: torch.Tensor, name: str, dimensions: int) -> None:
    """Refuse what no kernel here can load."""
    assert tensor.dtype in LOADABLE, f"{name} is {tensor.dtype}; the kernels read bfloat16, float16 and float32"
    assert tensor.dim() == dimensions, f"{name} has shape {tuple(tensor.shape)}, not {dimensions} dimensions"
    assert tensor.is_contiguous(), f"{name} of shape {tuple(tensor.shape)} is not contiguous"


def check(tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another dtype or shape than a kernel will take it for."""
    assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, not {dtype}"
    assert tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"
    assert tensor.is_contiguous(), f"{name} of shape {shape} is not contiguous"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as kernels load and store it: BF16 as int16 bits, FP8 as uint8, everything else as it is.

    Bits are exact everywhere; conversions of these dtypes are not: Triton's interpreter truncates them, and old devices
    lack them.
    """
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16)
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return tensor.view(torch.uint8)
    return tensor


def start(kernel: Any, programs: int, *arguments: Any, num_warps: int, **constants: Any) -> None:
    """Run `programs` programs of a kernel on the first argument's device and torch's current stream there.

    Products and sums are never fused: a fused multiply-add rounds once where the references round twice.
    """
    if not programs:
        return
    device = arguments[0].device
    with _starting, torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)
