"""How far codes are from the weights they were made of: the reference of the sums that every measure of quality follows from.

A run of elements shares a scale; `decoded - weight` is taken in float32, as a loader would decode, and summed in float64.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from . import bnb4, fp8, hadamard, int8
from .sums import DifferenceSums

CODE_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}


def of_values(decoded: torch.Tensor, tile: torch.Tensor) -> DifferenceSums:
    """decoded float32 [n] against tile [n], floating."""
    weight = tile.float()
    error = decoded - weight
    magnitude = error.abs()
    largest_at = int(magnitude.argmax())
    w, e = weight.double(), error.double()
    sums = float(w @ w), float(e @ e), float(e @ w)
    finite = bool(decoded.isfinite().all() and weight.isfinite().all() and magnitude[largest_at].isfinite())
    return DifferenceSums(*sums, float(magnitude[largest_at]), largest_at, float(weight.abs().max()), finite)


def of_bytes(codes: torch.Tensor, scale: torch.Tensor, grid: str, rotation: int, tile: torch.Tensor) -> DifferenceSums:
    """One-byte codes uint8 [n] against tile [n].

    scale [runs] float32, of n / runs elements each. grid: "e4m3", "e5m2" or "int8". rotation: the Hadamard group size, 0
    for none.
    """
    decode = int8.decode if grid == "int8" else fp8.decode
    values = decode(codes.view(CODE_DTYPES[grid]).view(scale.numel(), -1), scale, torch.float32)
    if rotation:
        values = hadamard.rotate(values.view(-1, rotation), rotation)
    ends = {"e4m3": (0x7E, 0xFE), "e5m2": (0x7B, 0xFB), "int8": (0x7F, 0x81)}[grid]  # INT8's -128 is no code that is written
    saturated = sum(int((codes == end).sum()) for end in ends)
    return replace(of_values(values.view(-1), tile), saturated=saturated)


def of_book(
    packed: torch.Tensor, absmax: torch.Tensor, block_size: int, book: torch.Tensor, high_first: bool, tile: torch.Tensor
) -> DifferenceSums:
    """Packed 4-bit codes uint8 [ceil(n / 2)] against tile [n], in blocks of `block_size`, of which the last may be short.

    absmax [blocks] float32. book [16] float32. high_first: whether the first of two codes is in the high nibble.
    """
    if not high_first:
        packed = (packed << 4) | (packed >> 4)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: tile.numel()]
    saturated = int((codes == book.argmin()).sum() + (codes == book.argmax()).sum())
    return replace(of_values(bnb4.decode_with(packed, absmax, block_size, book, tile.numel()), tile), saturated=saturated)
