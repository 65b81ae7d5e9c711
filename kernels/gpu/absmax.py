"""Largest magnitude of each group on the GPU: bit for bit `kernels.absmax.group_absmax`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .grids import as_float32, magnitude_bits


@triton.jit
def group_absmax_kernel(
    weight_pointer,  # [groups, group] float32, float16 or int16 (BF16 bits): the weights
    absmax_pointer,  # [groups, width_tiles] int32, written: float32 bits of the largest magnitude of a tile's row
    groups,
    group,  # elements of a group
    width_tiles,  # tiles of WIDTH that cover a group
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """absmax = max |weight|: one program per [ROWS, WIDTH] tile."""
    first_row = (tl.program_id(0) // width_tiles).to(tl.int64) * ROWS
    width_tile = tl.program_id(0) % width_tiles
    first_column = width_tile.to(tl.int64) * WIDTH
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = row < groups - first_row
    inside = here[:, None] & (column < group - first_column)[None, :]
    corner = first_row * group + first_column
    offset = row[:, None] * group + column[None, :]
    weight = as_float32(tl.load(weight_pointer + corner + offset, mask=inside, other=0))
    absmax = tl.max(magnitude_bits(weight), axis=1)
    tl.store(absmax_pointer + (first_row + row) * width_tiles + width_tile, absmax, mask=here)


def group_absmax(tile: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row of `tile`.

    tile [groups, group]: bfloat16, float16 or float32, group > 0. Returns float32 [groups]; a NaN in a group makes its
    result NaN.
    """
    launch.check_weight(tile, "tile", 2)
    groups, group = tile.shape
    rows, width = launch.tile_shape(groups, group, launch.STREAMED_ELEMENTS)
    width_tiles = launch.ceil_divide(group, width)
    partial = torch.empty((groups, width_tiles), dtype=torch.int32, device=tile.device)
    programs = launch.ceil_divide(groups, rows) * width_tiles
    constants = {"ROWS": rows, "WIDTH": width}
    launch.start(
        group_absmax_kernel, programs, launch.bits(tile), partial, groups, group, width_tiles, **constants, num_warps=4
    )
    # Bits of magnitudes order like the magnitudes, NaN above all.
    return (partial[:, 0] if width_tiles == 1 else partial.amax(dim=1)).view(torch.float32)
