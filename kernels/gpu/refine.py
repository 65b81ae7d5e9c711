"""Rounding with error feedback on the GPU, and coordinate-descent sweeps after it: bit for bit the codes of
`streamquant.kernels.refine`, whose docstring has the formulas and the order of arithmetic.

Columns follow one another, so the time grows with N and hardly with the rows until these fill the device: a tile should
have thousands. Codes of a row never depend on the other rows.
"""

from __future__ import annotations

import torch

from ..codebooks import BOUNDARIES
from ..feedback import BLOCK, Feedback
from ..refined import GRIDS, Refined
from . import launch
from .bnb4 import book_values, nibble_tables
from .feedback import on_device
from .refine_kernels import forward_kernel, nearest_kernel, restore_nearest_kernel, sweep_kernel

# Of a program, which is one warp: four threads share a row. With more rows a warp has more to do between one column and
# the next, with fewer most of its work is overhead; 6144 rows keep every scheduler of a large device busy.
ROWS = 8
RESTORED = (8, 256)  # rows and columns of a program that restores nearest


def refine(
    tile: torch.Tensor, scale: torch.Tensor, column_group: torch.Tensor, feedback: Feedback, grid: str,
    multiplier: torch.Tensor | None = None, sweeps: int = 0, guard: bool = True,
) -> Refined:  # fmt: skip
    """Codes of a tile of whole rows under a prepared H, all on the device of `tile`.

    tile [rows, N]: bfloat16, float16 or float32, finite. scale [rows, groups]: float32. column_group [N]: integers, the
    scale of each column as it stands in the tile. feedback: in float32; uploaded once and kept while it lives. grid:
    one of GRIDS. multiplier [rows, groups]: float32, what E4M3 and the code books multiply by before rounding, None for
    1 / scale. sweeps: how many follow. guard: keep nearest where it is better, and say in `before` what it costs.
    Returns codes [rows, N], int8 for the INT8 grid, else uint8, and float64 [rows] objectives.
    Memory: 4 bytes an element where sweeps or a dense H need the errors of all columns, else 4·k a row.
    """
    launch.check_weight(tile, "tile", 2)
    rows, columns = tile.shape
    groups = scale.shape[-1]
    multiplier = 1 / scale if multiplier is None else multiplier
    launch.check(scale, "scale", torch.float32, (rows, groups))
    launch.check(multiplier, "multiplier", torch.float32, (rows, groups))
    assert tuple(column_group.shape) == (columns,), f"column_group has shape {tuple(column_group.shape)}, not {(columns,)}"
    assert grid in GRIDS, f"there is no grid {grid!r}"
    assert feedback.columns == columns, f"the feedback is of {feedback.columns} columns, the tile has {columns}"
    assert ROWS * columns < 1 << 31, f"rows of {columns} columns are too long"
    prepared = on_device(feedback, tile.device)
    padded, rank, programs = prepared.order.numel(), prepared.rank, launch.ceil_divide(rows, ROWS)
    column_group = column_group.to(tile.device, torch.int32)
    book = "fp4" if grid == "fp4" else "nf4"  # the other grids never look at it
    inputs = (launch.bits(tile), scale, multiplier, book_values(book, tile.device))
    constants = {"B": tuple(BOUNDARIES[book].tolist()), "GRID": grid}
    tables = nibble_tables(book)
    in_order = (prepared.order, column_group[prepared.order])
    per_program = {"DENSE": prepared.dense, "ROWS": ROWS, "num_warps": 1} | constants

    codes = torch.empty(tile.shape, dtype=torch.int8 if grid == "int8" else torch.uint8, device=tile.device)
    after = torch.empty(rows, dtype=torch.float64, device=tile.device)
    before = torch.empty_like(after)
    keep = prepared.dense or sweeps > 0
    kept = padded if keep else BLOCK
    # Zeros, because what lies beyond the last column is multiplied by zeros: it must be finite.
    errors = scale.new_zeros((programs, kept, ROWS))
    state = scale.new_zeros((programs, 0 if prepared.dense else rank, ROWS))

    sizes = (rows, columns, groups, rank, padded)
    # Without vectors a column knows nothing of the others: nearest is the best there is, and needs no sequence.
    nearest_is_best = prepared.is_diagonal and not sweeps
    if guard or nearest_is_best:
        shares = prepared.pivots if prepared.dense else prepared.diagonal
        matrices = (prepared.gains, prepared.vectors, shares)
        launch.start(
            nearest_kernel, programs, *inputs, *in_order, *matrices, errors, state, before, *sizes, kept, *tables,
            **per_program,
        )  # fmt: skip
    if nearest_is_best:
        after, worse = before.clone(), torch.ones_like(before, dtype=torch.bool)
    else:
        state.zero_()
        matrices = (prepared.gains, prepared.vectors, prepared.coupling, prepared.pivots)
        launch.start(
            forward_kernel, programs, *inputs, *in_order, *matrices, codes, errors, state, after, *sizes, kept, *tables,
            KEEP=keep, **per_program,
        )  # fmt: skip
        matrices = (prepared.directions, prepared.vectors, prepared.slopes, prepared.diagonal, prepared.curvature)
        changes = scale.new_zeros((programs if sweeps else 0, BLOCK, ROWS))
        for _ in range(sweeps):
            launch.start(
                sweep_kernel, programs, *inputs, *in_order, *matrices, codes, errors, changes, state, after, *sizes,
                *tables, **per_program,
            )  # fmt: skip
        worse = after > before
    if guard or nearest_is_best:
        height, width = RESTORED
        across = launch.ceil_divide(columns, width)
        launch.start(
            restore_nearest_kernel, launch.ceil_divide(rows, height) * across, *inputs, column_group, worse, codes, rows,
            columns, groups, across, *tables, HEIGHT=height, WIDTH=width, num_warps=4, **constants,
        )  # fmt: skip
    if not guard:
        return Refined(codes, torch.full_like(after, torch.nan), after)
    return Refined(codes, before, torch.minimum(after, before))
