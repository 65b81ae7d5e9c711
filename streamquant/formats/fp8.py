"""FP8 with tensor, row, 2-D block and per-row-group scales, and E5M2 with a tensor scale.

Codes are `round(w * s)` with `s = max / absmax`, and the stored scale is `1 / s`, so that `w ≈ code * scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from streamquant.kernels.codebooks import E4M3_MAX, E5M2_MAX

from .base import Encoded, Encoder, Format, Output
from .scaling import ScaledEncoder, ScaleGeometry

if TYPE_CHECKING:
    import torch

SMALLEST_ABSMAX = np.float32(1e-12)


@dataclass(frozen=True)
class Float8TensorWise(Format):
    """E4M3 with one scale for the tensor. Stock ComfyUI loads it."""

    name: ClassVar[str] = "float8_e4m3fn"
    mode: ClassVar[str] = "tensor"
    grid: ClassVar[str] = "e4m3"
    learned_grid: ClassVar[str | None] = "e4m3"

    @property
    def group_size(self) -> int:
        return 0

    def geometry(self, shape: tuple[int, ...]) -> ScaleGeometry:
        return ScaleGeometry(self.mode, (shape[0], shape[1]), self.group_size)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return self.geometry(shape).misfit()

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `weight_scale` for a weight [M, N]."""
        return ()

    def outputs(self, shape: tuple[int, ...], dtype: str) -> list[Output]:
        code_dtype = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}[self.grid]
        return [
            Output("weight", code_dtype, shape, elements_per_item=1, item_bytes=1),
            self.geometry(shape).output(self.scale_shape(shape)),
        ]

    def encoder(self, shape: tuple[int, ...], dtype: str) -> Encoder:
        return Float8Encoder(self.geometry(shape), self.grid)

    def decode(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        from streamquant.kernels import fp8

        codes, scale = tensors["weight"], tensors["weight_scale"].float()
        if not codes.numel():
            return codes.to(dtype)
        group = self.geometry(tuple(codes.shape)).group or codes.numel()
        if self.mode == "block":
            scale = scale.repeat_interleave(self.group_size, dim=0)
        return fp8.decode(codes.reshape(-1, group), scale.reshape(-1), dtype).view(codes.shape)

    def comfy_quant(self) -> dict[str, Any]:
        return {"format": self.name}


@dataclass(frozen=True)
class Float8E5M2(Float8TensorWise):
    """E5M2 with one scale for the tensor. Stock ComfyUI loads it."""

    name: ClassVar[str] = "float8_e5m2"
    grid: ClassVar[str] = "e5m2"
    learned_grid: ClassVar[str | None] = None


@dataclass(frozen=True)
class Float8RowWise(Float8TensorWise):
    """E4M3 with one scale per output row, `weight_scale` [M]."""

    name: ClassVar[str] = "float8_e4m3fn_rowwise"
    mode: ClassVar[str] = "row"

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0],)


@dataclass(frozen=True)
class Float8BlockWise(Float8TensorWise):
    """E4M3 with one scale per block_size x block_size tile, `weight_scale` [M/b, N/b]."""

    name: ClassVar[str] = "float8_e4m3fn_blockwise"
    mode: ClassVar[str] = "block"
    block_size: int = 128

    @property
    def group_size(self) -> int:
        return self.block_size

    def fallback(self) -> Format:
        return Float8RowWise()

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] // self.block_size, shape[1] // self.block_size)

    def comfy_quant(self) -> dict[str, Any]:
        return {"format": self.name, "group_size": self.block_size}


@dataclass(frozen=True)
class Float8Block3d(Float8BlockWise):
    """E4M3 with one scale per run of block_size elements of a row, `weight_scale` [M, N/b, 1]."""

    name: ClassVar[str] = "float8_e4m3fn_block3d"
    mode: ClassVar[str] = "block3d"

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], shape[1] // self.block_size, 1)


class Float8Encoder(ScaledEncoder):
    """FP8 codes: multiply by `max / absmax`, round to nearest even, saturate."""

    nan_code = 0x7F

    def __init__(self, geometry: ScaleGeometry, grid: str):
        super().__init__(geometry)
        self.grid = grid
        self.maximum = np.float32({"e4m3": E4M3_MAX, "e5m2": E5M2_MAX}[grid])

    def scales(self, absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        multiplier = self.maximum / np.maximum(absmax, SMALLEST_ABSMAX)
        return multiplier, np.float32(1) / multiplier

    def searched(self, backend: Any, tile: Any, absmax: np.ndarray, encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
        multiplier = self.rounding.e4m3_multiplier(backend, tile, self.geometry, absmax, encoded)
        with np.errstate(over="ignore"):  # a larger scale than absmax gives may lead beyond float32
            held = np.isfinite(self.maximum * (np.float32(1) / multiplier))
        multiplier = np.where(held, multiplier, self.scales(absmax)[0])
        return multiplier, np.float32(1) / multiplier

    def codes(self, backend: Any, tile: Any, group: int, scales: tuple[np.ndarray, ...], sums: Any) -> np.ndarray:
        multiplier, scale = scales
        return backend.fp8(tile, group, multiplier, scale, self.grid, sums)
