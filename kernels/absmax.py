"""Largest magnitude of each group: the reference."""

from __future__ import annotations

import torch


def group_absmax(tile: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row of `tile`.

    tile [groups, group]: any floating dtype. Returns float32 [groups]; a NaN in a group makes its result NaN.
    """
    # amax and amin together read the tile once and allocate nothing of its size, unlike abs().
    lowest, highest = torch.aminmax(tile, dim=1)
    return torch.maximum(-lowest.float(), highest.float()).abs()
