"""Symmetric INT8 encoding on the GPU, with tensor, row and 2-D block scales.

    scale = max(absmax / 127, floor)    code = clamp(round(weight / scale), -127, 127)

Bit for bit `kernels.int8.encode` with the scales of streamquant/formats/int8.py. Both divisions are true ones,
correctly rounded as IEEE 754 says (comfy-kitchen divides too); rounding is half to even; NaN gives 0. A tensor-wise
scale needs the whole tensor's absmax first: `encode` with one group. Everything else is fused.
"""

from __future__ import annotations

import torch

from . import scaled

SMALLEST_ROW_SCALE = 1e-12
SMALLEST_BLOCK_SCALE = 1e-8


def encode(tile: torch.Tensor, scale: torch.Tensor, measure: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes of `tile / scale`; with `measure` also the sums of squared error and squared weight.

    tile [groups, group]: bfloat16, float16 or float32. scale [groups]: float32, not zero.
    Returns int8 [groups, group], and float64 [2] or None.
    """
    return scaled.encode_groups(tile, scale, "int8", scale if measure else None)


def encode_rows(weight: torch.Tensor, floor: float = SMALLEST_ROW_SCALE, measure: bool = False) -> tuple[torch.Tensor, ...]:
    """absmax, scale and codes of rows in one kernel.

    weight [rows, columns]: bfloat16, float16 or float32. floor: the least scale.
    Returns int8 [rows, columns], scale float32 [rows], absmax float32 [rows] (inf or NaN where the row holds one; the
    scale is that of its finite weights), and with `measure` float64 [2]: squared error and squared weight.
    """
    return scaled.encode_rows(weight, "int8", floor, measure)


def encode_blocks(
    weight: torch.Tensor, size: int, floor: float = SMALLEST_BLOCK_SCALE, measure: bool = False
) -> tuple[torch.Tensor, ...]:
    """absmax, scale and codes of size x size blocks in one kernel.

    weight [rows, columns]: bfloat16, float16 or float32; `size` divides both. floor: the least scale.
    Returns as `encode_rows`, scale and absmax [rows / size, columns / size].
    """
    return scaled.encode_blocks(weight, size, "int8", floor, measure)
