"""The backend whose operations are the Triton kernels of this package, with the bytes of every other backend."""

from __future__ import annotations

import numpy as np
import torch

from ..feedback import Feedback
from ..refined import Refined
from ..sums import ErrorSums
from ..torch_backend import TorchBackend
from . import absmax, bnb4, book_search, fp8, hadamard, int8, scale_search
from .refine import refine


class GpuBackend(TorchBackend):
    """Triton kernels on a CUDA or ROCm device (in Triton's interpreter on the CPU); what has none is plain torch.

    Errors are measured by the kernels that encode, a weight being read once for both: sums are of float32 squares in
    units of the scale, added up in float64.
    """

    name = "triton"

    def absmax(self, tile, group: int) -> np.ndarray:
        with self._context():
            return absmax.group_absmax(tile.view(-1, group)).cpu().numpy()

    def fp8(self, tile, group: int, multiplier, scale, grid: str, sums: ErrorSums) -> np.ndarray:
        with self._context():
            factors = self._on_device(multiplier), grid, self._on_device(scale)
            codes, found = fp8.encode(tile.view(-1, group), *factors)
            sums.add(*found.tolist())
            return codes.view(torch.uint8).view(-1).cpu().numpy()

    def int8(self, tile, group: int, scale, sums: ErrorSums) -> np.ndarray:
        with self._context():
            codes, found = int8.encode(tile.view(-1, group), self._on_device(scale), measure=True)
            sums.add(*found.tolist())
            return codes.view(-1).cpu().numpy()

    def bnb4(
        self, tile, block_size: int, book: str, sums: ErrorSums, given: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        with self._context():
            scales = None if given is None else self._on_device(given)
            packed, found, pair = bnb4.encode(tile, block_size, book, measure=True, given=scales)
            sums.add(*pair.tolist())
            return packed.cpu().numpy(), found.cpu().numpy()

    def e4m3_errors(self, tile, group: int, absmax: np.ndarray, weights: np.ndarray) -> np.ndarray:
        with self._context():
            importance = None if (weights == 1).all() else self._on_device(weights)
            return scale_search.e4m3_errors(tile, group, self._on_device(absmax), importance).cpu().numpy()

    def book_absmax(self, tile, block_size: int, weights: np.ndarray, book: str, floor: float = 0.0) -> np.ndarray:
        with self._context():
            importance = None if (weights == 1).all() else self._on_device(weights)
            return book_search.book_absmax(tile, block_size, importance, book, floor).cpu().numpy()

    def rotate(self, tile, group_size: int) -> torch.Tensor:
        with self._context():
            return hadamard.rotate(tile.view(-1, group_size), group_size).view(-1)

    def refine(
        self, matrix, scale: np.ndarray, column_group: np.ndarray, feedback: Feedback, grid: str,
        multiplier: np.ndarray | None, sweeps: int, guard: bool,
    ) -> Refined:  # fmt: skip
        with self._context():
            factor = None if multiplier is None else self._on_device(multiplier)
            groups = self._on_device(column_group)
            refined = refine(matrix, self._on_device(scale), groups, feedback, grid, factor, sweeps, guard)
            return Refined(*(part.cpu().numpy() for part in refined))
