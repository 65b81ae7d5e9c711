"""What is not quantized: copied byte for byte, or cast to another floating dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from streamquant.kernels.jit_backend import HOST_DTYPES

from .base import Encoded, Encoder, Format, Output

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Copy(Format):
    """The source tensor as it is. Its elements are its bytes, so that every dtype passes through, sub-byte ones too."""

    name: ClassVar[str] = "copy"

    def outputs(self, shape: tuple[int, ...], dtype: str) -> list[Output]:
        return [Output("", dtype, shape, elements_per_item=1, item_bytes=1)]

    def encoder(self, shape: tuple[int, ...], dtype: str) -> Encoder:
        return CopyEncoder()

    def decode(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return tensors[""].to(dtype)


class CopyEncoder(Encoder):
    wants_bytes = True

    def encode(self, backend: Any, tile: np.ndarray, begin: int = 0) -> Encoded:
        return Encoded([tile])


@dataclass(frozen=True)
class Cast(Format):
    """A floating tensor rounded to BF16 or F16 (to nearest even, through float32)."""

    name: ClassVar[str] = "cast"
    target: str = "BF16"

    def outputs(self, shape: tuple[int, ...], dtype: str) -> list[Output]:
        return [Output("", self.target, shape, elements_per_item=1, item_bytes=2)]

    def encoder(self, shape: tuple[int, ...], dtype: str) -> Encoder:
        return CastEncoder(dtype, self.target)

    def decode(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return tensors[""].to(dtype)


class CastEncoder(Encoder):
    wants_bytes = True

    def __init__(self, source: str, target: str):
        self.source, self.target = source, target

    def encode(self, backend: Any, tile: np.ndarray, begin: int = 0) -> Encoded:
        values = to_float32(tile, self.source)
        with np.errstate(over="ignore"):
            cast = values.astype(np.float16) if self.target == "F16" else round_to_bf16(values)
        encoded = Encoded([cast])
        if not np.isfinite(to_float32(cast.view(np.uint8), self.target)).all():
            encoded.finite = False
            encoded.sums.add(np.nan, 0.0)  # nobody knows the error of what has no size: it is no 0
            return encoded
        error = to_float32(cast.view(np.uint8), self.target) - values
        # In float64, for float32 holds no square of a weight above 2e19 or below 1e-23; einsum widens as it goes along.
        error_sum, weight_sum = (np.einsum("i,i->", part, part, dtype=np.float64) for part in (error, values))
        encoded.sums.add(float(error_sum), float(weight_sum))
        return encoded


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """uint8 bytes of a BF16, F16, F32 or F64 tile as float32 [elements]; F64 beyond its range becomes infinite."""
    values = raw.view(HOST_DTYPES[dtype])
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """BF16 bits (uint16) of float32 `values`, to nearest even; NaN stays a quiet NaN."""
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
