"""Layouts whose codes are four bits wide: bitsandbytes NF4 and FP4, and the INT4 of ConvRot W4A4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from streamquant.checkpoint.reader import SourceTensor
from streamquant.kernels import DifferenceSums, select
from streamquant.kernels.codebooks import CODE_BOOKS

from .layouts import Layout, Read, Tile, first_scales, rotate
from .numbers import INT4, decode_nibbles, floats

BOOK_BYTES = 64


@dataclass(frozen=True)
class Nested:
    """absmax in 8 bits: `map[q] * absmax + offset`, one nested absmax per `block_size` codes."""

    absmax: SourceTensor
    code_map: SourceTensor
    block_size: int
    offset: float


@dataclass(frozen=True)
class Blocks4bit(Layout):
    """bitsandbytes 4-bit: blocks over the flattened weight, `w = book[code] * absmax[block]`, first code in the high nibble.

    book: the file's own table (float32 [16]), or None for the standard one of `book_name`. The shape of `packed` and its
    dtype do not matter: only the bytes do.
    """

    packed: SourceTensor
    absmax: SourceTensor
    block_size: int
    book_name: str
    book: SourceTensor | None = None
    nested: Nested | None = None
    high_first: bool = True

    def decode(self, read: Read, begin: int, end: int) -> Tile:
        total = int(np.prod(self.shape, dtype=np.int64))
        first, last = begin // self.block_size, -(-end // self.block_size)
        start, stop = first * self.block_size, min(last * self.block_size, total)
        packed = np.frombuffer(read(self.packed, start // 2, (stop + 1) // 2), dtype=np.uint8)
        book = self._book(read)
        values = decode_nibbles(packed, book, self.high_first)[: stop - start]
        ends = np.array([book.min(), book.max()], dtype=np.float32)
        absmax = self.block_scales(read, first, last)
        inside = values[begin - start : end - start]
        saturated = int(np.count_nonzero(inside == ends[0]) + np.count_nonzero(inside == ends[1]))
        whole = values.size // self.block_size
        values[: whole * self.block_size].reshape(whole, self.block_size)[...] *= absmax[:whole, None]
        values[whole * self.block_size :] *= absmax[-1]
        return Tile(inside, saturated)

    def difference(self, read: Read, begin: int, end: int, tile: Any) -> DifferenceSums:
        if begin % self.block_size:
            return super().difference(read, begin, end, tile)
        packed = np.frombuffer(read(self.packed, begin // 2, (end + 1) // 2), dtype=np.uint8)
        absmax = self.block_scales(read, begin // self.block_size, -(-end // self.block_size))
        return select("cpu").book_difference(packed, absmax, self.block_size, self._book(read), self.high_first, tile)

    def _book(self, read: Read) -> np.ndarray:
        if self.book is None:
            return CODE_BOOKS[self.book_name]
        return floats(read(self.book, 0, self.book.info.nbytes), self.book.info.dtype)

    def block_scales(self, read: Read, first: int, last: int) -> np.ndarray:
        """float32 absmax of blocks [first, last)."""
        width = self.absmax.info.nbytes // self.absmax.info.elements
        raw = read(self.absmax, first * width, last * width)
        if self.nested is None:
            return floats(raw, self.absmax.info.dtype)
        nested = self.nested
        code_map = floats(read(nested.code_map, 0, nested.code_map.info.nbytes), "F32")
        index = np.arange(first, last) // nested.block_size
        scales = floats(read(nested.absmax, 4 * int(index[0]), 4 * (int(index[-1]) + 1)), "F32")
        codes = np.frombuffer(raw, dtype=np.uint8)
        return code_map[codes] * scales[index - index[0]] + np.float32(nested.offset)

    def scales(self, read: Read, limit: int) -> tuple[np.ndarray, bool]:
        count = min(limit, self.absmax.info.elements)
        return self.block_scales(read, 0, count), count == self.absmax.info.elements

    @property
    def scale_tensor(self) -> SourceTensor | None:
        return self.absmax


@dataclass(frozen=True)
class RotatedInt4(Layout):
    """ConvRot W4A4: INT4 codes, the first in the low nibble, a scale per row, rotated in groups."""

    packed: SourceTensor
    scale: SourceTensor
    rotation: int
    high_first: bool = False
    relative_error = 0.18

    @property
    def alignment(self) -> int:
        return self.rotation

    def decode(self, read: Read, begin: int, end: int) -> Tile:
        columns = self.columns
        packed = np.frombuffer(read(self.packed, begin // 2, (end + 1) // 2), dtype=np.uint8)
        values = decode_nibbles(packed, INT4, self.high_first)
        saturated = int(np.count_nonzero(np.abs(values) >= 7))
        first, last = begin // columns, (end - 1) // columns + 1
        scales = floats(read(self.scale, 4 * first, 4 * last), "F32")
        values = (values.reshape(last - first, -1) * scales[:, None]).reshape(-1)
        return Tile(rotate(values, self.rotation), saturated)

    def scales(self, read: Read, limit: int) -> tuple[np.ndarray, bool]:
        return first_scales(self.scale, read, limit)

    @property
    def scale_tensor(self) -> SourceTensor | None:
        return self.scale
