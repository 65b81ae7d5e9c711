"""NVFP4 and MXFP8: short groups of a row share a scale, and the scales lie in tiles of 128 x 4.

The tiling is cuBLAS' (its documentation, "1D block scaling factors layout"): a matrix of scales, padded to multiples of 128
rows and 4 columns, is stored tile by tile, and inside a tile element (r, c) lies at `(r % 32) * 16 + (r // 32) * 4 + c`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from streamquant.checkpoint.reader import SourceTensor

from .layouts import Layout, Read, Tile, first_scales
from .numbers import E2M1, byte_values, decode_bytes, decode_nibbles, floats

BAND = 128  # rows whose scales lie together
TILE_BYTES = 512  # of a tile of scales


@dataclass(frozen=True)
class TiledScales(Layout):
    """Shared by both. codes: of the padded weight; stored_columns: elements of its rows. largest: the magnitude of a code."""

    codes: SourceTensor
    scale: SourceTensor
    stored_columns: int
    group: ClassVar[int]
    largest: ClassVar[int]

    @property
    def _across(self) -> int:
        """Groups in a stored row."""
        return self.stored_columns // self.group

    def decode(self, read: Read, begin: int, end: int) -> Tile:
        first, last = begin // self.columns, (end - 1) // self.columns + 1
        left, right = 0, self._across
        if last - first == 1:  # of one row, which may be endless, only the groups that are asked for
            left, right = begin % self.columns // self.group, -(-(end - first * self.columns) // self.group)
        start = first * self.stored_columns + left * self.group
        codes = self._codes(read, start, start + (last - first - 1) * self.stored_columns + (right - left) * self.group)

        def cut(values: np.ndarray) -> np.ndarray:
            """Elements [begin, end) of the unpadded weight."""
            unpadded = values.reshape(last - first, -1)[:, : self.columns - left * self.group]
            offset = begin - first * self.columns - left * self.group
            return np.ascontiguousarray(unpadded).reshape(-1)[offset : offset + end - begin]

        saturated = int(np.count_nonzero(np.abs(cut(codes)) == self.largest))
        scales = self._scales(read, first, last, left, right)
        return Tile(cut(codes.reshape(last - first, -1, self.group) * scales[:, :, None]), saturated)

    @abstractmethod
    def _codes(self, read: Read, begin: int, end: int) -> np.ndarray:
        """float32 [end - begin]: what codes [begin, end) of the padded weight stand for, before their scales."""

    @abstractmethod
    def _scales(self, read: Read, first: int, last: int, left: int, right: int) -> np.ndarray:
        """float32 [last - first, right - left]: the scales of groups [left, right) of rows [first, last)."""

    def _scale_codes(self, read: Read, first: int, last: int, left: int, right: int) -> np.ndarray:
        """uint8: the bytes of the same. Of several rows it must be all groups."""
        band, bands = first // BAND, -(-last // BAND) - first // BAND
        across, place, tiles = -(-self._across // 4), left // 4, -(-right // 4) - left // 4
        start = (band * across + place) * TILE_BYTES
        raw = read(self.scale, start, start + ((bands - 1) * across + tiles) * TILE_BYTES)
        tiled = np.frombuffer(raw, dtype=np.uint8).reshape(bands, tiles, 32, 4, 4)
        rows = tiled.transpose(0, 3, 2, 1, 4).reshape(-1, 4 * tiles)
        return rows[first - band * BAND : last - band * BAND, left - 4 * place : right - 4 * place]


@dataclass(frozen=True)
class NvFp4(TiledScales):
    """E2M1 codes, the first in the high nibble; groups of 16 with E4M3 scales, times one scale of the tensor."""

    tensor_scale: SourceTensor
    high_first: bool = True
    group = 16
    largest = 6
    relative_error = 0.095

    def _codes(self, read: Read, begin: int, end: int) -> np.ndarray:
        packed = np.frombuffer(read(self.codes, begin // 2, end // 2), dtype=np.uint8)
        return decode_nibbles(packed, E2M1, self.high_first)

    def _scales(self, read: Read, first: int, last: int, left: int, right: int) -> np.ndarray:
        scales = byte_values("F8_E4M3")[self._scale_codes(read, first, last, left, right)]
        return scales * floats(read(self.tensor_scale, 0, 4), "F32")[0]

    def scales(self, read: Read, limit: int) -> tuple[np.ndarray, bool]:
        return first_scales(self.tensor_scale, read, limit)

    @property
    def scale_tensor(self) -> SourceTensor | None:
        return self.tensor_scale


@dataclass(frozen=True)
class MxFp8(TiledScales):
    """E4M3 codes; groups of 32 with power-of-two scales (E8M0)."""

    group = 32
    largest = 448
    relative_error = 0.03

    def _codes(self, read: Read, begin: int, end: int) -> np.ndarray:
        return decode_bytes(np.frombuffer(read(self.codes, begin, end), dtype=np.uint8), "F8_E4M3")

    def _scales(self, read: Read, first: int, last: int, left: int, right: int) -> np.ndarray:
        return byte_values("F8_E8M0")[self._scale_codes(read, first, last, left, right)]

    def scales(self, read: Read, limit: int) -> tuple[np.ndarray, bool]:
        rows = max(min(limit // self._across, self.shape[0]), 1)
        groups = self._across if rows > 1 else min(self._across, limit)
        return self._scales(read, 0, rows, 0, groups).reshape(-1), (rows, groups) == (self.shape[0], self._across)
