"""Which scales are searched, and with what weights: method A of docs/rounding.md.

    FP8 with row scales or blocks up to 64   17 candidates from absmax / 448 upward, which never clip
    NF4                                      13 ratios of absmax, then two least-squares refits
    INT8, FP4, FP8 tensor-wise or blocks above 64   absmax: searching made real outputs worse

The search itself is `streamquant.kernels.scale_search`. The error may be weighted by the diagonal of H, E[x²] of each
input column.
"""

from __future__ import annotations

import numpy as np

SEARCHED_BLOCK = 64  # the largest block edge at which the FP8 search was shown to help


def searches(grid: str | None, mode: str, block_size: int = 0, careful: bool = False) -> bool:
    """Whether the scale of a grid ("int8", "e4m3", "nf4", "fp4") is searched in a scaling mode, or follows from absmax.

    careful: only where no layer's outputs were seen to suffer though nothing is known of its inputs, which leaves NF4
    (with a floor, `search_grid.SAFE_FLOOR`).
    """
    if grid == "e4m3":
        return not careful and (mode == "row" or (mode in ("block", "block3d") and block_size <= SEARCHED_BLOCK))
    return grid == "nf4"


def run_weights(diagonal: np.ndarray | None, columns: int, group: int) -> np.ndarray:
    """The weights of the runs of a weight with `columns` columns: float32 [cycle, group], run i taking row i mod cycle.

    diagonal [columns]: E[x²], None for equal weights. They are scaled to a mean of 1, which changes no choice.
    """
    if diagonal is None:
        return np.ones((1, group), dtype=np.float32)
    mean = float(np.mean(diagonal, dtype=np.float64))
    scaled = (diagonal / mean if mean > 0 else np.ones(columns)).astype(np.float32)
    cycle = columns // np.gcd(columns, group)  # runs until one begins where a row does again
    return np.resize(scaled, (int(cycle), group))
