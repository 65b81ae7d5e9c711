"""Random layers and knowledge of their inputs, for tests of refinement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from streamquant.kernels import refine as reference
from streamquant.kernels.codebooks import CODE_BOOKS
from streamquant.kernels.feedback import Feedback, dense_feedback, low_rank_feedback
from streamquant.kernels.jit import refine as compiled
from streamquant.kernels.refined import GRIDS, Refined

QUICK = settings(max_examples=40)
LARGEST = {"int8": 127.0, "e4m3": 448.0, "nf4": 1.0, "fp4": 1.0}

grids = st.sampled_from(GRIDS)
forms = st.booleans()
seeds = st.integers(0, 1 << 20)
# About the strip of 32 rows and the block of 32 columns, and everything small.
row_counts = st.one_of(st.integers(1, 6), st.sampled_from([31, 32, 33, 70]))
column_counts = st.one_of(st.integers(1, 12), st.sampled_from([31, 32, 33, 64, 100, 161]))
ranks = st.sampled_from([0, 1, 3, 8, 9, 20])


@dataclass(frozen=True)
class Layer:
    """A weight [M, N], scales [M, groups] with column_group [N], and H = diag(remainder) + vectors vectorsᵀ."""

    weight: np.ndarray
    scale: np.ndarray
    column_group: np.ndarray
    grid: str
    remainder: np.ndarray
    vectors: np.ndarray

    @property
    def hessian(self) -> np.ndarray:
        return np.diag(self.remainder) + self.vectors @ self.vectors.T

    def feedback(self, dense: bool = False, act_order: bool = True, dtype: type = np.float32) -> Feedback:
        order = np.argsort(-np.diagonal(self.hessian), kind="stable") if act_order else None
        if dense:
            return dense_feedback(self.hessian, order, dtype)
        return low_rank_feedback(self.remainder, self.vectors, order, dtype)

    def refined(self, feedback: Feedback, **options) -> Refined:
        """The compiled path."""
        return compiled.refine(self.weight, self.scale, self.column_group, feedback, self.grid, **options)

    def defined(self, feedback: Feedback, dtype: type = np.float32, **options) -> Refined:
        """The definition, on arrays as `refined`."""
        weight, scale = (torch.from_numpy(part.astype(dtype)) for part in (self.weight, self.scale))
        groups = torch.from_numpy(self.column_group)
        return Refined(
            *(part.numpy() for part in reference.refine(weight, scale, groups, feedback, self.grid, **options))
        )

    def decoded(self, codes: np.ndarray) -> np.ndarray:
        """float64 [M, N]: what the codes stand for."""
        if self.grid == "int8":
            values = codes.astype(np.float64)
        elif self.grid == "e4m3":
            values = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
        else:
            values = CODE_BOOKS[self.grid].astype(np.float64)[codes]
        return values * self.scale.astype(np.float64)[:, self.column_group]

    def output_error(self, codes: np.ndarray) -> np.ndarray:
        """e H eᵀ of each row in float64, from the definition."""
        error = self.decoded(codes) - self.weight
        return np.einsum("ij,jk,ik->i", error, self.hessian, error)

    def nearest(self) -> np.ndarray:
        """The codes of rounding to nearest."""
        scale = torch.from_numpy(self.scale[:, self.column_group])
        return reference.round_to_grid(torch.from_numpy(self.weight), scale, 1 / scale, self.grid)[1].numpy()


def layer(rows: int, columns: int, rank: int, grid: str, seed: int, group: int = 48) -> Layer:
    """Heavy-tailed weights with a scale per row and `group` columns; inputs with a few loud channels and directions."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(4, (rows, columns)) * 0.02).astype(np.float32)
    column_group = np.arange(columns) // group
    absmax = np.stack(
        [np.abs(weight[:, column_group == index]).max(axis=1) for index in range(column_group[-1] + 1)], axis=1
    )
    scale = np.maximum(absmax / np.float32(LARGEST[grid]), np.float32(1e-12))
    remainder = np.exp(rng.standard_normal(columns))
    vectors = rng.standard_normal((columns, rank)) * np.exp(rng.standard_normal(rank)) * np.sqrt(remainder)[:, None]
    return Layer(weight, scale, column_group, grid, remainder, vectors)
