"""FP8 encoding on the GPU: E4M3 and E5M2 with tensor, row, 2-D block and row-group scales.

    multiplier = largest / max(absmax, 1e-12)    scale = 1 / multiplier    code = fp8(weight * multiplier)

Bit for bit `kernels.fp8.encode` with the scales of streamquant/formats/fp8.py: round to nearest even, saturating at
±448 and ±57344, by integer arithmetic (`grids`), because Triton has no E4M3 below sm_89. NaN gives 0x7F, whatever its
sign. A tensor-wise scale needs the whole tensor's absmax first: `encode` with one group. Everything else is fused.
"""

from __future__ import annotations

import torch

from . import scaled

GRIDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SMALLEST_ABSMAX = 1e-12


def encode(
    tile: torch.Tensor, multiplier: torch.Tensor, grid: str, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes of `tile * multiplier`; with `scale` also the sums of squared error and squared weight.

    tile [groups, group]: bfloat16, float16 or float32. multiplier, scale [groups]: float32. grid: "e4m3" or "e5m2".
    Returns float8 [groups, group], and float64 [2] or None.
    """
    codes, sums = scaled.encode_groups(tile, multiplier, grid, scale)
    return codes.view(GRIDS[grid]), sums


def encode_rows(weight: torch.Tensor, grid: str, measure: bool = False) -> tuple[torch.Tensor, ...]:
    """absmax, scale and codes of rows in one kernel (row groups: a view [rows * groups, group]).

    weight [rows, columns]: bfloat16, float16 or float32. grid: "e4m3" or "e5m2".
    Returns float8 [rows, columns], scale float32 [rows], absmax float32 [rows] (inf or NaN where the row holds one;
    the scale is that of its finite weights), and with `measure` float64 [2]: squared error and squared weight.
    """
    codes, *rest = scaled.encode_rows(weight, grid, SMALLEST_ABSMAX, measure)
    return codes.view(GRIDS[grid]), *rest


def encode_blocks(weight: torch.Tensor, size: int, grid: str, measure: bool = False) -> tuple[torch.Tensor, ...]:
    """absmax, scale and codes of size x size blocks in one kernel.

    weight [rows, columns]: bfloat16, float16 or float32; `size` divides both. grid: "e4m3" or "e5m2".
    Returns as `encode_rows`, scale and absmax [rows / size, columns / size].
    """
    codes, *rest = scaled.encode_blocks(weight, size, grid, SMALLEST_ABSMAX, measure)
    return codes.view(GRIDS[grid]), *rest
