"""How far codes are from the weights they were made of: the reference of the sums that every measure of quality follows from.

A run of elements shares a scale; `decoded - weight` is taken in float32, as a loader would decode, and summed in float64.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from . import bnb4, fp8, hadamard, int8
from .codebooks import book_steps
from .sums import FAR, FARTHER, FARTHEST, LOOSE, SPAN, WILD, DifferenceSums, Steps

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
    for none. Steps are those of the rotated weights.
    """
    decode = int8.decode if grid == "int8" else fp8.decode
    values = decode(codes.view(CODE_DTYPES[grid]).view(scale.numel(), -1), scale, torch.float32).view(-1)
    ends = {"e4m3": (0x7E, 0xFE), "e5m2": (0x7B, 0xFB), "int8": (0x7F, 0x81)}[grid]  # INT8's -128 is no code that is written
    at_end = (codes == ends[0]) | (codes == ends[1])
    step = byte_steps(codes, grid) * scale.abs().repeat_interleave(codes.numel() // scale.numel())
    decoded = hadamard.rotate(values.view(-1, rotation), rotation).view(-1) if rotation else values
    weight = hadamard.rotate(tile.view(-1, rotation), rotation).view(-1) if rotation else tile.float()
    found = of_values(decoded, tile)
    return replace(found, saturated=int(at_end.sum()), steps=in_steps(values, weight, step, at_end))


def byte_steps(codes: torch.Tensor, grid: str) -> torch.Tensor:
    """float32 [n]: how far each code's neighbours lie apart: 1 for INT8; of a float's binade, 2**-mantissa of its power."""
    if grid == "int8":
        return torch.ones(codes.shape, dtype=torch.float32, device=codes.device)
    mantissa, bias = {"e4m3": (3, 7), "e5m2": (2, 15)}[grid]
    exponent = ((codes & 0x7F) >> mantissa).int().clamp(min=1) - bias
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - mantissa)


def of_book(
    packed: torch.Tensor, absmax: torch.Tensor, block_size: int, book: torch.Tensor, high_first: bool, tile: torch.Tensor
) -> DifferenceSums:
    """Packed 4-bit codes uint8 [ceil(n / 2)] against tile [n], in blocks of `block_size`, of which the last may be short.

    absmax [blocks] float32. book [16] float32. high_first: whether the first of two codes is in the high nibble.
    """
    if not high_first:
        packed = (packed << 4) | (packed >> 4)
    elements = tile.numel()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:elements].int()
    at_end = (codes == book.argmin()) | (codes == book.argmax())
    values = bnb4.decode_with(packed, absmax, block_size, book, elements)
    steps = torch.from_numpy(book_steps(book.cpu().numpy())).to(codes.device)
    step = steps[codes] * absmax.abs().repeat_interleave(block_size)[:elements]
    found = of_values(values, tile)
    return replace(found, saturated=int(at_end.sum()), steps=in_steps(values, tile.float(), step, at_end))


def in_steps(values: torch.Tensor, weight: torch.Tensor, step: torch.Tensor, at_end: torch.Tensor) -> Steps:
    """values, weight, step float32 [n]; at_end bool [n]: codes beyond which a weight is clipped."""
    error = values - weight
    error = torch.where(at_end & (error * values < 0), torch.zeros_like(error), error.abs())
    found = Steps()
    found.far, found.farther, found.farthest = (int((error > factor * step).sum()) for factor in (FAR, FARTHER, FARTHEST))
    found.loose = int((error > LOOSE * step).sum())
    far = error > FAR * step
    found.far_at = int(far.int().argmax()) if found.far else -1
    for begin in range(0, error.numel(), SPAN):
        part = slice(begin, begin + SPAN)
        found.spans += 1
        found.far_spans += bool(far[part].any())
        if float((error[part].double() ** 2).sum()) > WILD * float((step[part].double() ** 2).sum()):
            found.wild_spans += 1
            found.wild_at = begin if found.wild_at < 0 else found.wild_at
    return found
