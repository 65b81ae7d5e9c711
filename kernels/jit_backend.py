"""The compiled path as a backend; it never imports torch."""

from __future__ import annotations

import functools
import math

import numpy as np

from .codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS, CODE_VALUES, book_steps
from .feedback import Feedback
from .refined import Refined
from .search_grid import BOOK_RATIOS, BOOK_REFITS, fp8_candidates
from .sums import DifferenceSums, ErrorSums, Steps

# How the floating safetensors dtypes lie in host memory. BF16 has no numpy dtype: its bits are kept as uint16.
HOST_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


class JitBackend:
    """numba-compiled operations on numpy tiles."""

    name = "numba"

    def load(self, raw, dtype: str) -> np.ndarray:
        """A flat tile of `raw` bytes: uint16 for BF16, float32 for the rest (F64 beyond float32 becomes infinite)."""
        tile = np.frombuffer(raw, dtype=HOST_DTYPES[dtype])
        if tile.dtype in (np.uint16, np.float32):
            return tile
        with np.errstate(over="ignore"):
            return tile.astype(np.float32)

    def nan_mask(self, tile: np.ndarray) -> np.ndarray:
        """bool [elements]: where the tile is NaN."""
        return np.isnan(_as_float32(tile))

    def without_nonfinite(self, tile: np.ndarray) -> np.ndarray:
        """The tile in float32 with 0 for every NaN and infinity."""
        return np.nan_to_num(_as_float32(tile), nan=0.0, posinf=0.0, neginf=0.0)

    def absmax(self, tile: np.ndarray, group: int) -> np.ndarray:
        """float32 [elements / group]: largest magnitude of each run of `group` elements, NaN where one is NaN."""
        from .jit.absmax import group_absmax

        result = np.empty(tile.size // group, dtype=np.float32)
        group_absmax(tile.reshape(-1, group), result)
        return result

    def fp8(self, tile, group: int, multiplier, scale, grid: str, sums: ErrorSums) -> np.ndarray:
        """uint8 [elements]: FP8 bytes; multiplier and scale float32 [elements / group]."""
        from .jit import fp8

        codes = np.empty(tile.size, dtype=np.uint8)
        pair = np.zeros(2)
        encode = fp8.encode_e4m3 if grid == "e4m3" else fp8.encode_e5m2
        encode(tile.reshape(-1, group), multiplier, scale, codes.reshape(-1, group), pair)
        sums.add(*pair)
        return codes

    def int8(self, tile, group: int, scale, sums: ErrorSums) -> np.ndarray:
        """int8 [elements]; scale float32 [elements / group]."""
        from .jit.int8 import encode_int8

        codes = np.empty(tile.size, dtype=np.int8)
        pair = np.zeros(2)
        encode_int8(tile.reshape(-1, group), scale, codes.reshape(-1, group), pair)
        sums.add(*pair)
        return codes

    def bnb4(
        self, tile, block_size: int, book: str, sums: ErrorSums, given: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [ceil(elements / 2)] packed codes and float32 [ceil(elements / block_size)] absmax.

        given: float32 like absmax, taken in its place.
        """
        from .jit.bnb4 import encode_4bit

        packed = np.empty((tile.size + 1) // 2, dtype=np.uint8)
        absmax = np.empty(-(-tile.size // block_size), dtype=np.float32) if given is None else given
        pair = np.zeros(2)
        ascending = ASCENDING_CODES[book]
        values = CODE_BOOKS[book][ascending]
        encode_4bit(
            tile, block_size, BOUNDARIES[book], _pair_codes(book), values, given is not None, packed, absmax, pair
        )
        sums.add(*pair)
        return packed, absmax

    def e4m3_errors(self, tile, group: int, absmax: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Σ weight·(Q - W)² of each run of `group` elements under each of `fp8_candidates(absmax)`: float64 [n, 17].

        absmax float32 [n], of all that shares the run's scale. weights float32 [cycle, group], run i taking row i mod
        cycle.
        """
        from .jit.scale_search import e4m3_errors

        multipliers = fp8_candidates(absmax)
        errors = np.empty(multipliers.shape)
        e4m3_errors(self.matrix(tile, group), multipliers, weights, 0, errors)
        return errors / np.square(multipliers, dtype=np.float64)

    def book_absmax(self, tile, block_size: int, weights: np.ndarray, book: str, floor: float = 0.0) -> np.ndarray:
        """The scale of least weighted error for each block: float32 [ceil(elements / block_size)].

        floor: the least share of absmax that a scale may be.
        """
        from .jit.absmax import group_absmax
        from .jit.scale_search import LANES, book_absmax

        runs = _padded_runs(_as_float32(tile), block_size)
        absmax = np.empty(len(runs), dtype=np.float32)
        group_absmax(runs, absmax)
        if block_size % LANES:
            extra = ((0, 0), (0, -block_size % LANES))
            runs, weights = np.pad(runs, extra), np.pad(weights, extra)
        values = CODE_BOOKS[book][ASCENDING_CODES[book]]
        ratios, lowest = BOOK_RATIOS[np.float32(floor) <= BOOK_RATIOS], np.float32(floor)
        book_absmax(runs, ratios, BOOK_REFITS, lowest, weights, 0, tuple(BOUNDARIES[book]), tuple(values), absmax)
        return absmax

    def rotate(self, tile, group_size: int) -> np.ndarray:
        """The tile's runs of `group_size` elements multiplied by the Hadamard matrix: float32 [elements]."""
        from .jit.hadamard import rotate_groups

        rotated = np.empty(tile.size, dtype=np.float32)
        rotate_groups(tile.reshape(-1, group_size), np.float32(group_size**-0.5), rotated.reshape(-1, group_size))
        return rotated

    def matrix(self, tile, columns: int) -> np.ndarray:
        """The tile as float32 [rows, columns]."""
        return _as_float32(tile).reshape(-1, columns)

    def refine(
        self, matrix, scale: np.ndarray, column_group: np.ndarray, feedback: Feedback, grid: str,
        multiplier: np.ndarray | None, sweeps: int, guard: bool,
    ) -> Refined:  # fmt: skip
        """Codes of `matrix` under a prepared H, as `streamquant.kernels.refine` defines; all arrays numpy's."""
        from .jit.refine import refine

        return refine(matrix, scale, column_group, feedback, grid, multiplier, sweeps, guard)

    def measure_codes(
        self, matrix, codes: np.ndarray, scale: np.ndarray, column_group: np.ndarray, grid: str, sums: ErrorSums
    ) -> None:
        """Add the squared error of codes [rows, N], one byte each, and the squared weight."""
        from .jit.squared_error import table_error

        # One memory layout, one compilation.
        pair = np.zeros(2)
        table_error(matrix, codes.view(np.uint8), CODE_VALUES[grid], np.ascontiguousarray(scale), column_group, pair)
        sums.add(*pair)

    def difference(self, values: np.ndarray, tile) -> DifferenceSums:
        """values float32 [n] against a tile: `streamquant.kernels.difference.of_values`."""
        from .jit.difference import difference_of_values

        return _difference(difference_of_values, np.ascontiguousarray(values), tile)

    def byte_difference(self, codes: np.ndarray, scale: np.ndarray, grid: str, rotation: int, tile) -> DifferenceSums:
        """`streamquant.kernels.difference.of_bytes`: codes uint8 [n], scale float32 [runs]."""
        from .jit.difference import E4M3, E5M2, INT8, difference_of_bytes

        number = {"e4m3": E4M3, "e5m2": E5M2, "int8": INT8}[grid]
        return _difference(difference_of_bytes, codes, np.ascontiguousarray(scale), number, rotation, tile)

    def book_difference(
        self, packed: np.ndarray, absmax: np.ndarray, block_size: int, book: np.ndarray, high_first: bool, tile
    ) -> DifferenceSums:
        """`streamquant.kernels.difference.of_book`: packed uint8, absmax float32 [blocks], book float32 [16]."""
        from .jit.difference import difference_of_book

        pairs, step_pairs = _value_pairs(book.tobytes(), high_first)
        return _difference(difference_of_book, packed, pairs, step_pairs, np.ascontiguousarray(absmax), block_size, tile)


def _difference(kernel, *given) -> DifferenceSums:
    """What a compiled kernel adds to its last argument, which this makes."""
    from .jit.difference import FAR_AT, FINITE, SUMS, WILD_AT

    sums = np.zeros(SUMS)
    sums[[FINITE, FAR_AT, WILD_AT]] = 1, -1, -1
    kernel(*given, sums)
    weight, error, product, largest, largest_at, absmax, finite, saturated, *steps = sums.tolist()
    is_finite = bool(finite) and math.isfinite(weight + error + abs(product))
    judged = Steps(*map(int, steps)) if steps[3] else None
    return DifferenceSums(weight, error, product, largest, int(largest_at), absmax, is_finite, int(saturated), judged)


def _padded_runs(flat: np.ndarray, group: int) -> np.ndarray:
    """`flat` as [runs, group]; zeros, which are a code of every book and add no error, fill up the last one."""
    return np.pad(flat, (0, -flat.size % group)).reshape(-1, group) if flat.size % group else flat.reshape(-1, group)


def _as_float32(tile: np.ndarray) -> np.ndarray:
    """A JIT tile as float32: BF16 bits are the upper half of a float32's."""
    return tile if tile.dtype == np.float32 else (tile.astype(np.uint32) << 16).view(np.float32)


@functools.cache
def _pair_codes(book: str) -> np.ndarray:
    """uint8 [256]: from a byte of two ranks to the byte of the two codes."""
    ranks = np.arange(256)
    ascending = ASCENDING_CODES[book].astype(np.int64)
    return ((ascending[ranks >> 4] << 4) | ascending[ranks & 15]).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def _value_pairs(book: bytes, high_first: bool) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [256] twice: of a byte of two codes the two values, and the two steps, negative at the ends of the book.

    book: float32 [16], as bytes.
    """
    values = np.frombuffer(book, dtype=np.float32)
    steps = book_steps(values)
    steps[[values.argmin(), values.argmax()]] *= -1
    codes = np.arange(256)
    both = np.stack([codes >> 4, codes & 15] if high_first else [codes & 15, codes >> 4], axis=1)
    return values[both].view(np.uint64).reshape(-1), steps[both].view(np.uint64).reshape(-1)
