"""Learned rounding of one layer: scales of least error, then codes that make up for each other's errors.

What a user feels is the output error tr((Q - W) H (Q - W)ᵀ), H = XᵀX / n being the second moment of the layer's inputs
(docs/rounding.md). Where H is known, the scales are searched with its diagonal as weights and the codes are found by error
feedback (`streamquant.kernels.refine`). Where nothing is known of the inputs there is nothing to learn from: the scales
are searched, and the codes are rounded to nearest.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from streamquant.budget import LearnedNeeds
from streamquant.formats.base import Encoded, Scales
from streamquant.kernels import ErrorSums
from streamquant.kernels.codebooks import CODE_VALUES
from streamquant.kernels.feedback import BLOCK, Feedback, low_rank_feedback
from streamquant.kernels.search_grid import SAFE_FLOOR, fp8_multiplier

from .hessian import LayerHessian
from .scales import run_weights, searches

FACTOR_BYTES = 8  # of the float64 in which H is prepared
SAMPLED_ROWS = 128  # of a layer, or up to twice as many, on which the output error is estimated
# One of so many blocks, where nothing is known of the inputs; odd, so as not to meet the same columns in every row.
SAMPLED_BLOCKS = 31


def needs(columns: int, rank: int, dense: bool) -> LearnedNeeds:
    """Memory that H of a layer takes while it is prepared and when it is: float64 factors, their float32 forms."""
    if dense:
        return LearnedNeeds(6 * FACTOR_BYTES * columns * columns, 2 * FACTOR_BYTES * columns * columns)
    width = rank + 8
    return LearnedNeeds(
        columns * FACTOR_BYTES * (6 * width + 4 * BLOCK), columns * FACTOR_BYTES * (2 * width + 2 * BLOCK)
    )


@functools.lru_cache(maxsize=4)
def _identity(columns: int) -> Feedback:
    """H = I, for which error feedback is rounding to nearest, by the same arithmetic."""
    return low_rank_feedback(np.ones(columns), np.zeros((columns, 0)))


class LearnedRoundingConverter:
    """Decides scales and codes for the encoder of one layer. Threads may share it.

    hessian: H of the inputs as the codes see them (rotated where they are), None where nothing is known of them.
    strength: how far H is drawn toward the identity, None for the form's own. sweeps: of coordinate descent. careful:
    search only scales that no layer's outputs suffer from, for whoever did not ask for more.
    """

    def __init__(
        self, columns: int, rows: int, hessian: LayerHessian | None = None, *, strength: float | None = None,
        sweeps: int = 0, careful: bool = False,
    ):  # fmt: skip
        self.columns, self.rows, self.sweeps, self.careful = columns, rows, sweeps, careful
        self.hessian = hessian
        self.diagonal = None if hessian is None else hessian.diagonal
        self.feedback: Feedback | None = None if hessian is None else hessian.shrunk(strength).feedback()
        self._weights: dict[int, np.ndarray] = {}

    @property
    def refines(self) -> bool:
        """Whether codes are learned, and tiles must be whole rows."""
        return self.feedback is not None

    def searches(self, grid: str, mode: str, block_size: int) -> bool:
        """Whether the scales of a format are searched."""
        return searches(grid, mode, block_size, self.careful)

    def weights(self, group: int) -> np.ndarray:
        """The importance of the elements of runs of `group` elements: `run_weights` of the diagonal of H."""
        if group not in self._weights:
            self._weights[group] = run_weights(self.diagonal, self.columns, group)
        return self._weights[group]

    def e4m3_multiplier(self, backend: Any, tile: Any, geometry: Any, absmax: np.ndarray, encoded: Encoded) -> np.ndarray:
        """448 / absmax · 2^(-i/17) of least error, for each scale of the tile: float32.

        geometry: the `ScaleGeometry` of the weight. absmax float32, one per scale.
        """
        errors = backend.e4m3_errors(tile, geometry.group, geometry.spread(absmax), self.weights(geometry.group))
        if geometry.mode == "block":
            across = self.columns // geometry.block_size
            errors = errors.reshape(-1, geometry.block_size, across, errors.shape[1]).sum(axis=1).reshape(-1, errors.shape[1])
        if not self.refines:
            encoded.output.add(float(errors[:, 0].sum()), float(errors.min(axis=1).sum()), 0.0)
        return fp8_multiplier(absmax, errors)

    def book_absmax(self, backend: Any, tile: Any, block_size: int, book: str) -> np.ndarray:
        """The scale of least error for each block of a code book: float32 [ceil(elements / block_size)]."""
        floor = SAFE_FLOOR if self.careful else 0.0
        return backend.book_absmax(tile, block_size, self.weights(block_size), book, floor)

    def sample_blocks(self, backend: Any, tile: Any, block_size: int, book: str, absmax: np.ndarray, encoded: Encoded) -> None:
        """What searching the scales gained, on some of the blocks."""
        whole = tile.shape[0] // block_size
        if not whole:
            return
        some = tile[: whole * block_size].reshape(-1, block_size)[::SAMPLED_BLOCKS].reshape(-1)
        before, after = ErrorSums(), ErrorSums()
        backend.bnb4(some, block_size, book, before)
        backend.bnb4(some, block_size, book, after, np.ascontiguousarray(absmax[:whole][::SAMPLED_BLOCKS]))
        encoded.output.add(before.error, after.error, before.weight)

    def codes(
        self, backend: Any, tile: Any, first_row: int, column_group: np.ndarray, plain: Scales, chosen: Scales, grid: str,
        encoded: Encoded,
    ) -> np.ndarray:  # fmt: skip
        """Learned codes of a tile of whole rows: one byte each, [rows, N].

        first_row: the tensor's row that is the tile's first. column_group [N] int64: the scale of each column. plain: the
        scales that absmax gives. chosen: those to be used.
        """
        matrix = backend.matrix(tile, self.columns)
        refined = backend.refine(
            matrix, chosen.scale, column_group, self.feedback, grid, chosen.multiplier, self.sweeps, True
        )
        backend.measure_codes(matrix, refined.codes, chosen.scale, column_group, grid, encoded.sums)
        step = max(self.rows // SAMPLED_ROWS, 1)
        rows = np.arange(-first_row % step, matrix.shape[0], step)  # the same ones whatever the tiles are
        if not rows.size:
            return refined.codes
        some = matrix[rows]
        nearest = backend.refine(
            some, plain.scale[rows], column_group, _identity(self.columns), grid,
            None if plain.multiplier is None else plain.multiplier[rows], 0, False,
        )  # fmt: skip
        exact = np.asarray(some.cpu() if hasattr(some, "cpu") else some, dtype=np.float64)
        encoded.output.add(
            self._output_error(nearest.codes, plain.scale[rows], column_group, grid, exact),
            self._output_error(refined.codes[rows], chosen.scale[rows], column_group, grid, exact),
            float(self.hessian.output_error(exact).sum()),
        )
        return refined.codes

    def _output_error(
        self, codes: np.ndarray, scale: np.ndarray, column_group: np.ndarray, grid: str, exact: np.ndarray
    ) -> float:
        decoded = CODE_VALUES[grid][codes.view(np.uint8)] * scale[:, column_group]
        return float(self.hessian.output_error(decoded - exact).sum())
