"""Scales for FP8 and INT8: which elements share one, how it follows from their largest magnitude, what it weighs.

Four modes over a weight [out_features, in_features] = [M, N] and a block edge b:

    tensor   one scale                         shape []            two passes
    row      one per row                       shape [M]           (INT8: [M, 1])
    block    one per b x b tile                shape [M/b, N/b]
    block3d  one per run of b within a row     shape [M, N/b, 1]
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Encoded, Encoder, Fill, Output, Scales

MODES = ("tensor", "row", "block", "block3d")


@dataclass(frozen=True)
class ScaleGeometry:
    """Where the scales of one weight lie. shape: [M, N]; block_size is ignored by tensor and row."""

    mode: str
    shape: tuple[int, int]
    block_size: int

    @property
    def group(self) -> int:
        """Contiguous elements that certainly share a scale; 0: all of a tile (tensor mode)."""
        return {"tensor": 0, "row": self.shape[1]}.get(self.mode, self.block_size)

    def misfit(self) -> str | None:
        """Why the block edge does not divide the weight, or None."""
        rows, columns = self.shape
        size = self.block_size
        if self.mode == "block" and (rows % size or columns % size):
            return f"{rows} x {columns} is not divisible into blocks of {size} x {size}"
        if self.mode == "block3d" and columns % size:
            return f"{columns} columns are not divisible into groups of {size}"
        return None

    def output(self, scale_shape: tuple[int, ...]) -> Output:
        """The `weight_scale` tensor."""
        columns, size = self.shape[1], self.block_size
        per_item, items = 0, 0
        if self.mode == "row":
            per_item, items = columns, 1
        elif self.mode == "block":
            per_item, items = columns * size, columns // size
        elif self.mode == "block3d":
            per_item, items = size, 1
        return Output("weight_scale", "F32", scale_shape, per_item, 4 * items)

    def shared(self, absmax: np.ndarray) -> np.ndarray:
        """From the magnitudes of contiguous groups to one per scale (2-D blocks span rows)."""
        if self.mode != "block":
            return absmax
        return absmax.reshape(-1, self.block_size, self.shape[1] // self.block_size).max(axis=1).reshape(-1)

    def spread(self, per_scale: np.ndarray) -> np.ndarray:
        """From one value per scale back to one per contiguous group."""
        if self.mode != "block":
            return per_scale
        by_block_row = per_scale.reshape(-1, 1, self.shape[1] // self.block_size)
        return np.repeat(by_block_row, self.block_size, axis=1).reshape(-1)


class ScaledEncoder(Encoder):
    """Encoder shared by FP8 and INT8; subclasses say how scales follow from absmax and codes from scales.

    `rotation`: each run of so many columns is multiplied by the Hadamard matrix before anything else; 0 for none.
    """

    nan_code: int
    grid: str

    def __init__(self, geometry: ScaleGeometry, rotation: int = 0):
        self.geometry, self.rotation = geometry, rotation
        self.passes = 2 if geometry.mode == "tensor" else 1
        self.largest = np.float32(0)

    @abstractmethod
    def scales(self, absmax: np.ndarray) -> tuple[np.ndarray, ...]:
        """What `codes` needs for float32 magnitudes [n], each float32 [n]; the last is the scale that is stored."""

    @abstractmethod
    def codes(self, backend: Any, tile: Any, group: int, scales: tuple[np.ndarray, ...], sums: Any) -> np.ndarray:
        """Codes of a tile whose runs of `group` elements have these scales."""

    def observe(self, backend: Any, tile: Any) -> tuple[float, bool]:
        """The largest finite magnitude of the tile."""
        absmax, finite = _finite_absmax(backend, tile, tile.shape[0])
        return float(absmax[0]), finite

    def absorb(self, learned: float) -> None:
        self.largest = max(self.largest, np.float32(learned))

    def encode(self, backend: Any, tile: Any, begin: int = 0) -> Encoded:
        encoded = Encoded()
        if self.rotation:
            tile, encoded.finite = _rotated(backend, tile, self.rotation)
        geometry = self.geometry
        if geometry.mode == "tensor":
            group = tile.shape[0]
            spread = plain = scales = self.scales(np.array([self.largest], dtype=np.float32))
        else:
            group = geometry.group
            absmax, finite = _finite_absmax(backend, tile, group)
            encoded.finite &= finite
            encoded.largest = float(absmax.max(initial=0.0))
            shared = geometry.shared(absmax)
            plain = scales = self.scales(shared)
            if finite and self.rounding and self.rounding.searches(self.grid, geometry.mode, geometry.block_size):
                scales = self.searched(backend, tile, shared, encoded)
            spread = tuple(geometry.spread(part) for part in scales)
        if encoded.finite and self.rounding and self.rounding.refines:
            codes = self._learned(backend, tile, begin, plain, scales, encoded)
        else:
            codes = self.codes(backend, tile, group, spread, encoded.sums)
        if not np.isfinite(encoded.sums.weight):
            # Only with --allow-nonfinite does anyone see this tile: NaN gets the grid's own, infinities saturate.
            encoded.finite = False
            codes[backend.nan_mask(tile)] = self.nan_code
        if not encoded.finite:
            encoded.sums = type(encoded.sums)(error=np.nan)  # nobody knows the error of what has no size: it is no 0
        encoded.payloads = [codes] if geometry.mode == "tensor" else [codes, scales[-1]]
        return encoded

    def searched(self, backend: Any, tile: Any, absmax: np.ndarray, encoded: Encoded) -> tuple[np.ndarray, ...]:
        """Scales of least error, as `scales` returns them; absmax float32, one per scale."""
        raise TypeError(f"{type(self).__name__} takes the scale that absmax gives")

    def _learned(self, backend: Any, tile: Any, begin: int, plain: Any, chosen: Any, encoded: Encoded) -> np.ndarray:
        """Codes by learned rounding. plain, chosen: as `scales` returns them."""
        rows, columns = tile.shape[0] // self.geometry.shape[1], self.geometry.shape[1]

        def by_row(scales: tuple[np.ndarray, ...]) -> Scales:
            if self.geometry.mode == "tensor":
                spread = [np.broadcast_to(part, (rows, 1)) for part in scales]
            else:
                spread = [self.geometry.spread(part).reshape(rows, -1) for part in scales]
            return Scales(spread[-1], spread[0] if len(spread) > 1 else None)

        group = self.geometry.group or columns
        column_group = np.arange(columns, dtype=np.int64) // group
        scales = by_row(plain), by_row(chosen)
        first_row = begin // columns
        return self.rounding.codes(backend, tile, first_row, column_group, *scales, self.grid, encoded).reshape(-1)

    def commit(self, encoded: Encoded) -> None:
        self.largest = max(self.largest, np.float32(encoded.largest))

    def finish(self) -> dict[str, bytes | Fill]:
        """A tensor's single scale; and for a layer of nothing but zeros, scales of 1 in whatever mode."""
        if not self.largest:
            return {"weight_scale": Fill(np.float32(1).tobytes())}
        if self.geometry.mode == "tensor":
            return {"weight_scale": self.scales(np.array([self.largest], dtype=np.float32))[-1].tobytes()}
        return {}

    def state(self) -> float:
        return float(self.largest)

    def restore(self, state: float) -> None:
        self.largest = np.float32(state)


def _rotated(backend: Any, tile: Any, group_size: int) -> tuple[Any, bool]:
    """The tile rotated, and whether all of it was finite; what is not becomes 0 before it spreads over its group."""
    rotated = backend.rotate(tile, group_size)
    if np.isfinite(backend.absmax(rotated, rotated.shape[0])[0]):
        return rotated, True
    return backend.rotate(backend.without_nonfinite(tile), group_size), False


def _finite_absmax(backend: Any, tile: Any, group: int) -> tuple[np.ndarray, bool]:
    """Largest finite magnitude of each run of `group` elements, and whether every element is finite."""
    absmax = backend.absmax(tile, group)
    if np.isfinite(absmax).all():
        return absmax, True
    return backend.absmax(backend.without_nonfinite(tile), group), False
