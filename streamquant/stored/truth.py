"""The weights that a layer was made from, as far as a format needs to know them to say what its error has to be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from streamquant.kernels import select

from .layouts import Layout, Read, ScaledCodes, rotate, tiles


@dataclass(frozen=True)
class Truth:
    """Weights and their reader. absmax: the largest magnitude of all of them, None where not all were seen. mean_square: of
    those that were seen."""

    layout: Layout
    read: Read
    absmax: float | None
    mean_square: float
    _rotated: dict[int, float] = field(default_factory=dict)

    def values(self, begin: int, end: int) -> np.ndarray:
        """Elements [begin, end): float32, whole rows or a part of one."""
        return self.layout.decode(self.read, begin, end).values

    def seen_whole(self) -> Truth:
        """The same, after a look at all of them. What is not finite does not count."""
        backend = select("cpu")
        absmax = 0.0
        for begin, end in tiles(self.layout.shape):
            tile = backend.without_nonfinite(self.layout.tile(self.read, begin, end))
            absmax = max(absmax, float(backend.absmax(tile, end - begin)[0]))
        return replace(self, absmax=absmax)

    def rotated_absmax(self, group: int) -> float:
        """The largest magnitude after a rotation of groups, which spreads outliers: of every weight."""
        if group not in self._rotated:
            ranges = tiles(self.layout.shape)
            self._rotated[group] = max(float(np.abs(rotate(self.values(*part), group)).max()) for part in ranges)
        return self._rotated[group]

    def block_absmax(self, scaled: ScaledCodes, first_row: int, end_row: int) -> np.ndarray:
        """The largest magnitudes of whole blocks, also of what lies outside the rows: float32 [rows, columns / width]."""
        columns, width, edge = scaled.columns, scaled.column_block, scaled.row_block
        blocks = range(first_row // edge, (end_row - 1) // edge + 1)
        found = np.zeros((len(blocks), columns // width), dtype=np.float32)
        for absmax, block in zip(found, blocks, strict=True):
            start, stop = block * edge * columns, min((block + 1) * edge * columns, math.prod(scaled.shape))
            for begin, end in tiles(((stop - start) // columns, columns)):
                values = self.values(start + begin, start + end)
                values = rotate(values, scaled.rotation) if scaled.rotation else values
                np.maximum(absmax, _absmax(values, width).reshape(-1, columns // width).max(axis=0), out=absmax)
        return found[np.arange(first_row, end_row) // edge - blocks.start]


def _absmax(values: np.ndarray, group: int) -> np.ndarray:
    """The largest magnitude of each run of `group` values: float32, NaN where one is NaN."""
    backend = select("cpu")
    return backend.absmax(backend.load(memoryview(np.ascontiguousarray(values)).cast("B"), "F32"), group)
