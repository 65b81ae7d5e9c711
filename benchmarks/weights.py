"""Weights that look enough like a diffusion model's: heavy tails, hot input channels, a low-rank part.

Random numbers are drawn once into a pool; a tensor is the pool read from ever-new places, scaled by column (input
channel) and by row (output), plus a low-rank part. That makes gigabytes as fast as memory can be multiplied, in tiles
that stay in the processor's cache. There is no matrix product in it, hence no BLAS: the same seed gives the same bytes
whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import numpy as np
import numpy.typing as npt

POOL = 1 << 20
TILE = 1 << 17
RANK = 2
HOT_CHANNELS = 0.004
DEGREES_OF_FREEDOM = 5

Floats = npt.NDArray[np.float32]


class Weights:
    """The weights of one synthetic checkpoint: the same `seed` and names give the same values."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        generator = np.random.default_rng(seed)
        pool = generator.standard_t(DEGREES_OF_FREEDOM, size=POOL).astype(np.float32)
        # Student's t is wider than a gaussian by this much; with unit variance the scales below mean what they say.
        self._pool = pool / np.float32(np.sqrt(DEGREES_OF_FREEDOM / (DEGREES_OF_FREEDOM - 2)))

    def tiles(self, name: str, shape: tuple[int, ...], dtype: str) -> Iterator[npt.NDArray[np.generic]]:
        """Yield the values of tensor `name` in order, in arrays that are overwritten by the next one."""
        generator = np.random.default_rng([self._seed, crc32(name.encode())])
        if len(shape) == 1:
            yield encode(1 + np.float32(0.1) * self._draw(generator, 1, shape[0])[0], dtype)
            return
        rows, columns = shape
        column_scale = _column_scale(generator, columns)
        low_rank = generator.standard_normal((RANK, columns), dtype=np.float32) * column_scale
        step = max(1, min(rows, TILE // columns))
        values, part = np.empty((2, step, columns), np.float32)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            tile, scratch = values[:count], part[:count]
            row_scale = np.exp(0.25 * generator.standard_normal((count, 1), dtype=np.float32))
            factors = 0.2 * generator.standard_normal((count, RANK), dtype=np.float32)
            np.multiply(self._draw(generator, count, columns), column_scale, out=tile)
            for index in range(RANK):
                np.multiply(factors[:, index : index + 1], low_rank[index], out=scratch)
                tile += scratch
            tile *= row_scale
            yield encode(tile, dtype)

    def _draw(self, generator: np.random.Generator, rows: int, columns: int) -> Floats:
        """Return a view of the pool at a random place, wrapped round only for tiles larger than the pool."""
        count = rows * columns
        if count >= self._pool.size:
            return np.resize(self._pool, (rows, columns))
        start = int(generator.integers(self._pool.size - count))
        return self._pool[start : start + count].reshape(rows, columns)


def _column_scale(generator: np.random.Generator, columns: int) -> Floats:
    """Return each input channel's scale: about one over the root of the fan-in, a few of them hot."""
    scale = np.exp(0.25 * generator.standard_normal(columns, dtype=np.float32))
    hot = generator.choice(columns, size=max(1, round(columns * HOT_CHANNELS)), replace=False)
    scale[hot] *= generator.uniform(5, 20, size=hot.size).astype(np.float32)
    return scale / np.float32(np.sqrt(columns))


def encode(values: Floats, dtype: str) -> npt.NDArray[np.generic]:
    """Return `values` in the bits of a safetensors `dtype`. May overwrite `values`.

    numpy has no BF16: its bits are the upper half of float32's, after rounding to nearest, ties to even.
    """
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return (bits >> 16).astype(np.uint16)
