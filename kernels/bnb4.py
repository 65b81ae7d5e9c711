"""bitsandbytes NF4 and FP4: the reference that defines packed codes and absmax, and the way back.

Bit for bit what bitsandbytes 0.50 computes on the CPU: a full block is multiplied by the float32 reciprocal of its
absmax, the short last block is divided by it; the code is the nearest value of the book, ties to the lower; the first
of two elements sits in the high nibble.
"""

from __future__ import annotations

import torch

from .codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS

SMALLEST_DIVISOR = 1e-38


def encode(
    flat: torch.Tensor, block_size: int, book: str, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and absmax of consecutive blocks.

    flat [elements]: floating. block_size: even. book: "nf4" or "fp4". given [blocks] float32: scales chosen otherwise, to
    be taken in place of absmax; what lies beyond them saturates.
    Returns uint8 [ceil(elements / 2)] and float32 [ceil(elements / block_size)]. A NaN makes its block's absmax NaN and
    all its codes those of the book's largest value.
    """
    device = flat.device
    values = flat.float()
    whole = values.numel() // block_size * block_size
    blocks, rest = values[:whole].view(-1, block_size), values[whole:]
    if given is not None:
        absmax = given[: whole // block_size]
    else:
        absmax = blocks.abs().amax(dim=1) if whole else values.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST_DIVISOR)).unsqueeze(1)).view(-1)
    if rest.numel():
        rest_absmax = (rest.abs().amax() if given is None else given[-1]).clamp(min=SMALLEST_DIVISOR)
        absmax = torch.cat([absmax, rest_absmax.view(1)])
        scaled = torch.cat([scaled, rest / rest_absmax])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    boundaries = torch.from_numpy(BOUNDARIES[book]).to(device)
    ascending = torch.from_numpy(ASCENDING_CODES[book]).to(device)
    codes = ascending[torch.bucketize(scaled, boundaries, out_int32=True)]
    return (codes[::2] << 4) | codes[1::2], absmax


def decode(packed: torch.Tensor, absmax: torch.Tensor, block_size: int, book: str, elements: int) -> torch.Tensor:
    """float32 [elements] of packed codes.

    packed uint8 [ceil(elements / 2)]. absmax float32 [ceil(elements / block_size)].
    """
    return decode_with(packed, absmax, block_size, torch.from_numpy(CODE_BOOKS[book]).to(packed.device), elements)


def decode_with(
    packed: torch.Tensor, absmax: torch.Tensor, block_size: int, code_book: torch.Tensor, elements: int
) -> torch.Tensor:
    """As `decode`, with the 16 float32 values a file carries itself (its quant_map)."""
    packed = packed.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:elements]
    values = code_book[codes.int()]
    whole = elements // block_size * block_size
    values[:whole].view(-1, block_size).mul_(absmax[: whole // block_size].unsqueeze(1))
    if whole < elements:
        values[whole:].mul_(absmax[-1])
    return values


def decode_absmax(
    codes: torch.Tensor, nested_absmax: torch.Tensor, nested_map: torch.Tensor, nested_block_size: int, offset: float
) -> torch.Tensor:
    """float32 [blocks]: absmax that double quantization stored as 8-bit codes.

    codes uint8 [blocks]. nested_absmax float32 [ceil(blocks / nested_block_size)]. nested_map float32 [256].
    offset: the mean that was taken off before.
    """
    scale = nested_absmax.repeat_interleave(nested_block_size)[: codes.numel()]
    return nested_map[codes.int()] * scale + offset
