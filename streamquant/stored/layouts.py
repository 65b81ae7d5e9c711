"""How one weight lies in its tensors, and any part of it in floating point again.

A layout decodes ranges: whole rows, or a piece of one row, so that memory depends neither on the weight's size nor on
its shape. The arithmetic is that of `streamquant.kernels`' references in float32 (codes times scale, 4-bit book times
absmax, then the rotation), to the bit.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from streamquant.checkpoint.reader import SourceTensor
from streamquant.kernels import DifferenceSums, select

from .numbers import byte_values, decode_bytes, floats

Read = Callable[[SourceTensor, int, int], Any]  # bytes [begin, end) of a tensor: `TileReader.tile`

TILE_ELEMENTS = 1 << 19  # calls are few, and the float32 of a tile, where it is decoded, stay in the cache
COMMON_EDGES = (128, 64, 256, 32, 16, 512)  # of blocks that share a scale
GRIDS = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "I8": "int8"}
ROW_ALIGNMENT = 128  # rows that share a band of tiled scales (NVFP4, MXFP8)


@dataclass
class Tile:
    """A decoded range. values: float32 [n]. saturated: how many codes are at an end of their grid."""

    values: np.ndarray
    saturated: int = 0


@dataclass(frozen=True)
class Layout(ABC):
    """One weight in a file. shape: as a loader sees it."""

    shape: tuple[int, ...]
    relative_error: ClassVar[float | None] = None  # usual for the format, where this project has no encoder to ask

    @property
    def columns(self) -> int:
        """Elements of a row: the last dimension; of a scalar, 1."""
        return self.shape[-1] if self.shape else 1

    @property
    def alignment(self) -> int:
        """Of how many elements the ends of a part of a row must be multiples: of the groups that are rotated together."""
        return 1

    @abstractmethod
    def decode(self, read: Read, begin: int, end: int) -> Tile:
        """Elements [begin, end) of the flattened weight: whole rows, or a part of one row."""

    def tile(self, read: Read, begin: int, end: int) -> Any:
        """The same elements as a tile of the CPU's backend, for others to be compared with."""
        return select("cpu").load(memoryview(self.decode(read, begin, end).values).cast("B"), "F32")

    def difference(self, read: Read, begin: int, end: int, tile: Any) -> DifferenceSums:
        """The sums over decoded elements [begin, end), at least one, against a tile of as many weights."""
        decoded = self.decode(read, begin, end)
        return replace(select("cpu").difference(decoded.values, tile), saturated=decoded.saturated)

    def scales(self, read: Read, limit: int) -> tuple[np.ndarray, bool]:
        """Up to about `limit` of the weight's scales, float32, and whether these are all."""
        return np.empty(0, dtype=np.float32), True

    @property
    def scale_tensor(self) -> SourceTensor | None:
        """The tensor of its scales, where there is one that can be exchanged for another."""
        return None


def tiles(shape: tuple[int, ...], elements: int = TILE_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Cut a weight into ranges of about `elements` (a power of two) that every layout decodes."""
    total = math.prod(shape)
    columns = shape[-1] if shape else 1
    if not total:
        return
    if columns > elements:
        for row in range(0, total, columns):
            for begin in range(row, row + columns, elements):
                yield begin, min(begin + elements, row + columns)
        return
    rows = elements // columns
    step = (rows // ROW_ALIGNMENT * ROW_ALIGNMENT or rows) * columns
    for begin in range(0, total, step):
        yield begin, min(begin + step, total)


def elements(layout: Layout, read: Read, begin: int, end: int) -> np.ndarray:
    """Elements [begin, end) of the flattened weight: float32. Both are multiples of the layout's alignment."""
    columns = layout.columns
    first, last = -(-begin // columns) * columns, end // columns * columns  # the whole rows among them
    if first >= last:
        cuts = [begin, min(first, end), end] if first < end else [begin, end]
    else:
        cuts = [begin, first, last, end]
    pieces = [layout.decode(read, start, stop).values for start, stop in itertools.pairwise(cuts) if start < stop]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class Plain(Layout):
    """A floating tensor."""

    tensor: SourceTensor

    def decode(self, read: Read, begin: int, end: int) -> Tile:
        width = self.tensor.info.nbytes // self.tensor.info.elements
        return Tile(floats(read(self.tensor, begin * width, end * width), self.tensor.info.dtype))

    def tile(self, read: Read, begin: int, end: int) -> Any:
        width = self.tensor.info.nbytes // self.tensor.info.elements
        return select("cpu").load(read(self.tensor, begin * width, end * width), self.tensor.info.dtype)


@dataclass(frozen=True)
class ScaledCodes(Layout):
    """FP8 or INT8 codes with scales of any extent: `w = code * scale / divisor`, perhaps rotated.

    row_block x column_block elements share a scale; scales [ceil(rows / row_block), ceil(columns / column_block)] lie
    row-major, whatever shape the tensor has. scale: None stands for 1. rotation: the Hadamard group size, 0 for none.
    """

    codes: SourceTensor
    scale: SourceTensor | None = None
    row_block: int = 0
    column_block: int = 0
    rotation: int = 0
    divisor: float = 1.0

    @property
    def alignment(self) -> int:
        return self.rotation or 1

    @property
    def scales_in_row(self) -> int:
        return -(-self.columns // self.column_block)

    def decode(self, read: Read, begin: int, end: int) -> Tile:
        codes = np.frombuffer(read(self.codes, begin, end), dtype=np.uint8)
        values = decode_bytes(codes, self.codes.info.dtype)
        saturated = _saturated(codes, self.codes.info.dtype)
        if self.scale is not None:
            self._scale(values, read, begin)
        if self.rotation:
            values = rotate(values, self.rotation)
        return Tile(values, saturated)

    def _scale(self, values: np.ndarray, read: Read, begin: int) -> None:
        """Multiply a run of values that starts at element `begin` by their scales, in place."""
        first_row, first_column = divmod(begin, self.columns)
        rows = -(-(first_column + values.size) // self.columns)
        scales = self._scales(read, first_row, first_row + rows)
        if scales.size == 1:
            values *= scales.reshape(-1)[0]
            return
        if self.row_block > 1:
            scales = scales[np.arange(first_row, first_row + rows) // self.row_block - first_row // self.row_block]
        whole_rows = values.size == rows * self.columns
        if whole_rows and self.columns % self.column_block == 0:
            values.reshape(rows, -1, self.column_block)[...] *= scales[:, :, None]
            return
        columns = np.arange(first_column, first_column + values.size // rows)
        values.reshape(rows, -1)[...] *= scales[:, columns // self.column_block]

    def difference(self, read: Read, begin: int, end: int, tile: Any) -> DifferenceSums:
        scale = self._run_scales(read, begin, end)
        if scale is None:
            return super().difference(read, begin, end, tile)
        codes = np.frombuffer(read(self.codes, begin, end), dtype=np.uint8)
        return select("cpu").byte_difference(codes, scale, GRIDS[self.codes.info.dtype], self.rotation, tile)

    def _run_scales(self, read: Read, begin: int, end: int) -> np.ndarray | None:
        """float32, one scale for each of equally long runs of elements [begin, end); None where runs differ in length."""
        if self.scale is None:
            return np.ones(1, dtype=np.float32)
        width = self.column_block
        if self.scale.info.elements == 1:
            return self._scales(read, 0, 1).reshape(-1)
        if self.columns % width or begin % width or end % width:
            return None
        first, last = begin // self.columns, (end - 1) // self.columns + 1
        scales = self._scales(read, first, last)
        if self.row_block > 1:
            scales = scales[np.arange(first, last) // self.row_block - first // self.row_block]
        start = (begin - first * self.columns) // width
        return scales.reshape(-1)[start : start + (end - begin) // width]

    def _scales(self, read: Read, first_row: int, end_row: int) -> np.ndarray:
        """The scales of rows [first_row, end_row): float32 [rows of blocks, scales_in_row]."""
        width = self.scale.info.nbytes // self.scale.info.elements
        first, last = first_row // self.row_block, (end_row - 1) // self.row_block + 1
        across = self.scales_in_row
        raw = read(self.scale, first * across * width, last * across * width)
        scales = floats(raw, self.scale.info.dtype).reshape(-1, across)
        return scales / np.float32(self.divisor) if self.divisor != 1.0 else scales

    def scales(self, read: Read, limit: int) -> tuple[np.ndarray, bool]:
        if self.scale is None:
            return super().scales(read, limit)
        found, complete = first_scales(self.scale, read, limit)
        return found / np.float32(self.divisor), complete

    @property
    def scale_tensor(self) -> SourceTensor | None:
        return self.scale


def first_scales(tensor: SourceTensor, read: Read, limit: int) -> tuple[np.ndarray, bool]:
    """The first `limit` values of a scale tensor, float32, and whether these are all."""
    width = tensor.info.nbytes // max(tensor.info.elements, 1)
    count = min(limit, tensor.info.elements)
    return floats(read(tensor, 0, count * width), tensor.info.dtype), count == tensor.info.elements


def _saturated(codes: np.ndarray, dtype: str) -> int:
    """How many codes have the largest finite magnitude of their grid, as the kernels count them: INT8's -128 is no end."""
    if dtype == "I8":
        return int(np.count_nonzero((codes == 0x7F) | (codes == 0x81)))
    largest = {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B}[dtype]
    return int(np.count_nonzero((codes & 0x7F) == largest))


def rotate(values: np.ndarray, group: int) -> np.ndarray:
    """Runs of `group` float32 values multiplied by the Hadamard matrix (its own inverse)."""
    rotated = select("cpu").rotate(values, group)
    return rotated if isinstance(rotated, np.ndarray) else rotated.numpy()


def geometry(shape: tuple[int, ...], scale_shape: tuple[int, ...], declared: int = 0) -> tuple[int, int] | None:
    """(row_block, column_block) of scales with this shape over a weight of `shape`; None when they cannot be its scales.

    One scale covers the tensor; [M] or [M, 1] the rows; [R, C] or [R, C, 1] blocks, of which the last in a row or column
    may be short. declared: the edge of a block that the file states, 0 where it states none.
    """
    count = math.prod(scale_shape)
    if count == 1:
        return max(math.prod(shape[:-1]), 1), max(shape[-1] if shape else 1, 1)
    if len(shape) != 2:
        return None
    rows, columns = shape
    if count == rows and scale_shape in ((rows,), (rows, 1), (rows, 1, 1)):
        return 1, columns
    if len(scale_shape) == 3 and scale_shape[2] == 1:
        scale_shape = scale_shape[:2]
    if len(scale_shape) != 2 or not all(scale_shape) or scale_shape[0] > rows or scale_shape[1] > columns:
        return None
    row_block, column_block = _edge(rows, scale_shape[0], declared), _edge(columns, scale_shape[1], declared)
    return (row_block, column_block) if row_block and column_block else None


def _edge(length: int, blocks: int, declared: int) -> int:
    """How many elements a block has along one side; 0 when no edge gives so many blocks. A last block may be short, so
    several edges may fit: the declared one goes first, then those in use.
    """
    even = length // blocks if length % blocks == 0 else 0
    for edge in (declared, even if even in COMMON_EDGES else 0, *COMMON_EDGES, even, -(-length // blocks)):
        if edge and -(-length // edge) == blocks:
            return edge
    return 0


def largest_value(dtype: str) -> float:
    """The largest finite value of a one-byte code."""
    values = byte_values(dtype)
    return float(values[np.isfinite(values)].max())
