"""The peer's learned rounding (`--objective svd`), for whoever wants to compare: codes by `kernels.svd_descent`."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamquant.budget import LearnedNeeds
from streamquant.formats.base import Encoded, Scales
from streamquant.kernels import why_no_jit
from streamquant.kernels.svd_descent import GROUP_ROWS

from .hadamard import hadamard
from .svd import SvdObjective

DEFAULT_SWEEPS = 2


def needs(shape: tuple[int, int], rank: int) -> LearnedNeeds:
    """Memory that the singular vectors of a weight take, and the rows that a tile must hold."""
    return LearnedNeeds(6 * 8 * (rank + 8) * sum(shape), 2 * 8 * rank * sum(shape), GROUP_ROWS)


class SvdConverter:
    """Decides the codes of one layer by the peer's objective; scales are those of absmax. Threads may share it.

    objective: singular vectors of the weight. rotation: of its columns, as the codes see them; 0 for none.
    """

    refines = True

    def __init__(self, objective: SvdObjective, sweeps: int = 0, rotation: int = 0):
        self.left, self.right = objective.left, objective.right
        self.sweeps = sweeps or DEFAULT_SWEEPS
        if rotation:
            grouped = self.right.reshape(-1, rotation, self.right.shape[1])
            self.right = (hadamard(rotation) @ grouped).reshape(self.right.shape).astype(np.float32)

    def searches(self, grid: str, mode: str, block_size: int) -> bool:
        """Never: the peer takes absmax."""
        return False

    def codes(
        self, backend: Any, tile: Any, first_row: int, column_group: np.ndarray, plain: Scales, chosen: Scales, grid: str,
        encoded: Encoded,
    ) -> np.ndarray:  # fmt: skip
        """As `LearnedRoundingConverter.codes`; a tile begins with a whole group of rows."""
        if why_no_jit() is None:
            from streamquant.kernels.jit.svd_descent import svd_descent
        else:
            from streamquant.kernels.svd_descent import svd_descent
        matrix = backend.matrix(tile, self.right.shape[0])
        host = np.asarray(matrix.cpu() if hasattr(matrix, "cpu") else matrix)
        left = self.left[first_row : first_row + len(host)]
        scale, multiplier = chosen.scale, chosen.multiplier
        codes = svd_descent(host, scale, column_group, left, self.right, grid, multiplier, self.sweeps).codes
        backend.measure_codes(matrix, codes, scale, column_group, grid, encoded.sums)
        return codes
