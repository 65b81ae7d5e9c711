"""Symmetric INT8 (-127…127) with tensor, row and 2-D block scales: `w ≈ code * scale`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from streamquant.kernels.codebooks import INT8_MAX

from .base import Encoder, Format, Output
from .scaling import ScaledEncoder, ScaleGeometry

if TYPE_CHECKING:
    import torch

SMALLEST_SCALE = {"tensor": np.float32(1e-12), "row": np.float32(1e-12), "block": np.float32(1e-8)}
LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(INT8_MAX), np.float32(0))  # 127 times it is finite


@dataclass(frozen=True)
class Int8TensorWise(Format):
    """INT8 with one scale for the tensor, or (`per_row`) one per output row as [M, 1]. Stock ComfyUI loads both.

    convrot_group_size: rows are stored rotated, each run of so many columns multiplied by a Hadamard matrix, which takes
    the outliers out of them (`streamquant.kernels.hadamard`); a power of 4, and 0 for as they are. The loader rotates
    activations alike.
    """

    name: ClassVar[str] = "int8_tensorwise"
    learned_grid: ClassVar[str | None] = "int8"
    per_row: bool = True
    convrot_group_size: int = 0

    def geometry(self, shape: tuple[int, ...]) -> ScaleGeometry:
        return ScaleGeometry("row" if self.per_row else "tensor", (shape[0], shape[1]), 0)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if self.convrot_group_size and shape[1] % self.convrot_group_size:
            return f"{shape[1]} columns are not divisible into groups of {self.convrot_group_size} to rotate"
        return self.geometry(shape).misfit()

    def fallback(self) -> Format | None:
        return Int8TensorWise(per_row=True) if self.convrot_group_size else None

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `weight_scale` for a weight [M, N]."""
        return (shape[0], 1) if self.per_row else ()

    def outputs(self, shape: tuple[int, ...], dtype: str) -> list[Output]:
        return [
            Output("weight", "I8", shape, elements_per_item=1, item_bytes=1),
            self.geometry(shape).output(self.scale_shape(shape)),
        ]

    def encoder(self, shape: tuple[int, ...], dtype: str) -> Encoder:
        return Int8Encoder(self.geometry(shape), self.convrot_group_size)

    def decode(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        import torch

        from streamquant.kernels import int8

        codes, scale = tensors["weight"], tensors["weight_scale"].float()
        if not codes.numel():
            return codes.to(dtype)
        geometry = self.geometry(tuple(codes.shape))
        group = geometry.group or codes.numel()
        if geometry.mode == "block":
            scale = scale.repeat_interleave(geometry.block_size, dim=0)
        if not self.convrot_group_size:
            return int8.decode(codes.reshape(-1, group), scale.reshape(-1), dtype).view(codes.shape)
        from streamquant.kernels.hadamard import rotate

        rotated = int8.decode(codes.reshape(-1, group), scale.reshape(-1), torch.float32).view(codes.shape)
        return rotate(rotated, self.convrot_group_size).to(dtype)

    def comfy_quant(self) -> dict[str, Any]:
        rotation = {"convrot": True, "convrot_groupsize": self.convrot_group_size} if self.convrot_group_size else {}
        return {"format": self.name} | rotation | ({"per_row": True} if self.per_row else {})


@dataclass(frozen=True)
class Int8BlockWise(Int8TensorWise):
    """INT8 with one scale per block_size x block_size tile, `weight_scale` [M/b, N/b], and an `input_scale` of 1."""

    name: ClassVar[str] = "int8_blockwise"
    per_row: bool = False
    convrot_group_size: int = 0
    block_size: int = 128

    def geometry(self, shape: tuple[int, ...]) -> ScaleGeometry:
        return ScaleGeometry("block", (shape[0], shape[1]), self.block_size)

    def fallback(self) -> Format:
        return Int8TensorWise(per_row=True)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] // self.block_size, shape[1] // self.block_size)

    def outputs(self, shape: tuple[int, ...], dtype: str) -> list[Output]:
        input_scale = Output("input_scale", "F32", (), constant=np.float32(1).tobytes())
        return [*super().outputs(shape, dtype), input_scale]

    def comfy_quant(self) -> dict[str, Any]:
        return {"format": self.name, "group_size": self.block_size}


class Int8Encoder(ScaledEncoder):
    """INT8 codes: divide by `absmax / 127`, round to nearest even, clamp."""

    nan_code = 0
    grid = "int8"

    def scales(self, absmax: np.ndarray) -> tuple[np.ndarray]:
        scale = np.minimum(absmax / np.float32(INT8_MAX), LARGEST_SCALE)
        return (np.maximum(scale, SMALLEST_SCALE[self.geometry.mode]),)

    def codes(self, backend: Any, tile: Any, group: int, scales: tuple[np.ndarray, ...], sums: Any) -> np.ndarray:
        return backend.int8(tile, group, scales[0], sums)
