"""What bitsandbytes itself writes and reads, by our suffixes."""

from __future__ import annotations

import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def quantized(weight: torch.Tensor, block_size: int, book: str, nested: bool = False) -> dict[str, torch.Tensor]:
    """The layer's tensors as `Linear4bit` puts them into a state dict."""
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type=book, compress_statistics=nested)
    return {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}


def read_state(tensors: dict[str, torch.Tensor]) -> functional.QuantState:
    """Our tensors through bitsandbytes' own loader, which refuses what it does not know."""
    inside = {suffix.removeprefix("weight."): value.clone() for suffix, value in tensors.items() if suffix != "weight"}
    return functional.QuantState.from_dict(inside, device=torch.device("cpu"))


def assert_same_weight(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal in every element; NaN where an absmax of nearly the largest float32 was restored as infinity."""
    if ours.dtype == torch.bfloat16:
        # The instruction that bitsandbytes rounds to BF16 with, where the processor has it, makes zeros of subnormals, and
        # so of those that would have rounded up to the smallest normal too.
        ours, theirs = (torch.where(part.abs() <= torch.finfo(part.dtype).tiny, 0, part) for part in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def decoded(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weight as bitsandbytes computes with it."""
    # Eager: bitsandbytes would have torch.compile its portable decoder, which costs minutes and gives the same bits.
    with torch.compiler.set_stance("force_eager"):
        return _decoded(tensors, dtype)


def _decoded(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    state = read_state(tensors)
    state.dtype = dtype
    rows_hold_whole_blocks = state.shape[1] % state.blocksize == 0
    if HAS_AVX512 and not rows_hold_whole_blocks:
        # The AVX-512 kernel of 0.50.2 takes a wrong block's absmax where blocks cross the ends of rows: it counts
        # columns // block_size of them to a row. Its portable implementation does not.
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        packed = tensors["weight"].reshape(-1)
        return _dequantize_4bit_compute(packed, absmax, state.code, state.blocksize, state.shape, dtype)
    return functional.dequantize_4bit(tensors["weight"], state)
