"""NVFP4 and MXFP8: short groups of a row share a scale, and the scales lie in tiles of 128 x 4.

The tiling is cuBLAS' (its documentation, "1D block scaling factors layout"): a matrix of scales, padded to multiples of 128
rows and 4 columns, is stored tile by tile, and inside a tile element (r, c) lies at `(r % 32) * 16 + (r // 32) * 4 + c`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from streamquant.checkpoint.reader import SourceTensor

from .layouts import Layout, Read, Tile, first_scales
from .numbers import E2M1, byte_values, decode_bytes, decode_nibbles, floats

BAND = 128  # rows whose scales lie together


@dataclass(frozen=True)
class TiledScales(Layout):
    """Shared by both. codes: of the padded weight; stored_columns: elements in one of its rows."""

    codes: SourceTensor
    scale: SourceTensor
    stored_columns: int
    group: ClassVar[int]

    def _rows(self, begin: int, end: int) -> tuple[int, int]:
        return begin // self.columns, (end - 1) // self.columns + 1

    def _cut(self, values: np.ndarray, begin: int, end: int) -> np.ndarray:
        """From whole stored rows [rows, stored_columns] to elements [begin, end) of the unpadded weight."""
        first = begin // self.columns * self.columns
        return np.ascontiguousarray(values[:, : self.columns]).reshape(-1)[begin - first : end - first]

    def _scale_codes(self, read: Read, first: int, last: int) -> np.ndarray:
        """uint8 [last - first, groups in a stored row]: the scales' bytes of rows [first, last)."""
        across = -(-self.stored_columns // self.group // 4) * 4
        begin, end = first // BAND, -(-last // BAND)
        raw = read(self.scale, begin * BAND * across, end * BAND * across)
        tiled = np.frombuffer(raw, dtype=np.uint8).reshape(end - begin, across // 4, 32, 4, 4)
        rows = tiled.transpose(0, 3, 2, 1, 4).reshape(-1, across)
        return rows[first - begin * BAND : last - begin * BAND, : self.stored_columns // self.group]


@dataclass(frozen=True)
class NvFp4(TiledScales):
    """E2M1 codes, the first in the high nibble; groups of 16 with E4M3 scales, times one scale of the tensor."""

    tensor_scale: SourceTensor
    high_first: bool = True
    group = 16
    relative_error = 0.095

    def decode(self, read: Read, begin: int, end: int) -> Tile:
        first, last = self._rows(begin, end)
        half = self.stored_columns // 2
        packed = np.frombuffer(read(self.codes, first * half, last * half), dtype=np.uint8)
        values = decode_nibbles(packed, E2M1, self.high_first).reshape(last - first, self.stored_columns)
        saturated = int(np.count_nonzero(np.abs(self._cut(values, begin, end)) == 6))
        codes = np.ascontiguousarray(self._scale_codes(read, first, last))
        scales = byte_values("F8_E4M3")[codes] * floats(read(self.tensor_scale, 0, 4), "F32")[0]
        values = values.reshape(last - first, -1, self.group) * scales[:, :, None]
        return Tile(self._cut(values.reshape(last - first, -1), begin, end), saturated)

    def scales(self, read: Read, limit: int) -> tuple[np.ndarray, bool]:
        return first_scales(self.tensor_scale, read, limit)

    @property
    def scale_tensor(self) -> SourceTensor | None:
        return self.tensor_scale


@dataclass(frozen=True)
class MxFp8(TiledScales):
    """E4M3 codes; groups of 32 with power-of-two scales (E8M0)."""

    group = 32
    relative_error = 0.03

    def decode(self, read: Read, begin: int, end: int) -> Tile:
        first, last = self._rows(begin, end)
        width = self.stored_columns
        codes = np.frombuffer(read(self.codes, first * width, last * width), dtype=np.uint8)
        values = decode_bytes(codes, "F8_E4M3").reshape(last - first, width)
        saturated = int(np.count_nonzero((self._cut(codes.reshape(last - first, width), begin, end) & 0x7F) == 0x7E))
        scales = byte_values("F8_E8M0")[self._scale_codes(read, first, last)]
        values = values.reshape(last - first, -1, self.group) * scales[:, :, None]
        return Tile(self._cut(values.reshape(last - first, -1), begin, end), saturated)

    def scales(self, read: Read, limit: int) -> tuple[np.ndarray, bool]:
        rows = max(min(limit * self.group // self.stored_columns, self.shape[0]), 1)
        return byte_values("F8_E8M0")[self._scale_codes(read, 0, rows)].reshape(-1), rows == self.shape[0]
