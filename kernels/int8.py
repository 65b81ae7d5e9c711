"""Symmetric INT8 with one scale per group: the reference that defines the codes, and the way back."""

from __future__ import annotations

import torch

from .codebooks import INT8_MAX


def encode(tile: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes of `tile / scale`, rounded to nearest even and clamped to ±127.

    It divides (as comfy-kitchen does); multiplying by a reciprocal would round exact ties differently.
    tile [groups, group]: floating. scale [groups]: float32. Returns int8 [groups, group]; NaN gives 0.
    """
    steps = torch.div(tile.float(), scale.unsqueeze(1))
    return steps.round_().clamp_(-INT8_MAX, INT8_MAX).nan_to_num_(0.0).to(torch.int8)


def decode(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`codes * scale` in float32, then `dtype`.

    codes [groups, group]: int8. scale [groups]: float32. Returns `dtype` [groups, group].
    """
    return codes.float().mul_(scale.unsqueeze(1)).to(dtype)
