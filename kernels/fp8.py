"""FP8 with one multiplier per group: the reference that defines the codes, and the way back.

Every scaling mode is the same operation on a different view of the weight: one group for a tensor-wise scale, a row
for a row scale, a run of `block_size` elements for block scales (a 2-D block's multiplier is repeated for its rows).
"""

from __future__ import annotations

import torch

GRIDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def encode(tile: torch.Tensor, multiplier: torch.Tensor, grid: str) -> torch.Tensor:
    """Codes of `tile * multiplier`, clamped to the grid's largest value and rounded to nearest even.

    tile [groups, group]: floating. multiplier [groups]: float32. grid: "e4m3" or "e5m2".
    Returns float8 [groups, group]. NaN stays NaN, infinities saturate.
    """
    dtype = GRIDS[grid]
    largest = torch.finfo(dtype).max
    # float() copies only when the tile is not float32 already; the product must not overwrite the caller's tile.
    return torch.mul(tile.float(), multiplier.unsqueeze(1)).clamp_(-largest, largest).to(dtype)


def decode(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`codes * scale` in float32, then `dtype`.

    codes [groups, group]: float8. scale [groups]: float32. Returns `dtype` [groups, group].
    """
    return codes.float().mul_(scale.unsqueeze(1)).to(dtype)
