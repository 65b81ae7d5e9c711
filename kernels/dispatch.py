"""Which implementation runs an operation here: compiled (numba) or plain torch, and why not the other.

A backend takes a tile as raw host bytes and gives back numpy arrays, so that whoever calls it knows nothing of
devices. `JitBackend` never imports torch; `TorchBackend` is the references themselves, on the CPU or a CUDA device.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import numpy as np

from .codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS, CODE_VALUES
from .feedback import Feedback
from .refined import Refined
from .search_grid import BOOK_RATIOS, BOOK_REFITS, fp8_candidates

# How the floating safetensors dtypes lie in host memory. BF16 has no numpy dtype: its bits are kept as uint16.
HOST_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
TORCH_CHUNK = 1 << 18  # elements the torch references work on at a time on the CPU, so that temporaries stay in cache
NORM_CHUNK = 1 << 22  # elements copied to float64 at a time
# Families of operations that have Triton kernels.
GPU_FAMILIES = ("FP8 and INT8 encoding", "NF4 and FP4 encoding", "scale search", "decoding", "rotation", "refinement")


@dataclass
class ErrorSums:
    """Squared error and squared weight of what was encoded, in float64: their ratio's root is the relative error."""

    error: float = 0.0
    weight: float = 0.0

    def add(self, error: float, weight: float) -> None:
        self.error += error
        self.weight += weight


@functools.cache
def why_no_jit() -> str | None:
    """None when the compiled path can run, else the reason in words."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'streamquant[fast]')"
    try:
        from .jit import absmax  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: no folder to keep compiled code in
        return f"numba does not work here: {error}"
    return None


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


class TorchBackend:
    """The references, in plain torch, on the CPU or a CUDA device."""

    name = "torch"

    def __init__(self, device: str = "cpu"):
        import torch

        self.device = torch.device(device)
        self._staging = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def load(self, raw, dtype: str):
        """A flat torch tile of `raw` bytes on this backend's device."""
        import torch

        array = np.frombuffer(raw, dtype=np.uint8)
        torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[dtype]
        with self._context():
            if self._stream is not None:
                # Pinned memory is what lets the copy run beside the other workers' kernels; one buffer serves all tiles.
                self._stream.synchronize()  # the last tile may still be on its way out of it
                if self._staging is None or self._staging.numel() < array.size:
                    self._staging = torch.empty(array.size, dtype=torch.uint8, pin_memory=True)
                np.copyto(self._staging.numpy()[: array.size], array)
                tile = self._staging[: array.size].to(self.device, non_blocking=True).view(torch_dtype)
            else:
                tile = torch.from_numpy(array.copy()).view(torch_dtype)  # torch warns of memory it may not write to
            return tile.float() if dtype == "F64" else tile

    def _chunks(self, elements: int, group: int):
        step = elements if self.device.type == "cuda" else max(TORCH_CHUNK // group, 1) * group
        return [(begin, min(begin + step, elements)) for begin in range(0, elements, step)]

    def _on_device(self, values: np.ndarray):
        import torch

        # torch warns of memory it may not write to, and kernels want rows without gaps.
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(self.device)

    def _context(self):
        """Everything that touches a tile runs on this backend's stream: other streams do not wait for it."""
        import contextlib

        import torch

        if self._stream is None:
            return contextlib.nullcontext()
        # What a caller made of a tile on a stream of its own, such as some of its rows, must be there.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def nan_mask(self, tile) -> np.ndarray:
        with self._context():
            return tile.isnan().cpu().numpy()

    def without_nonfinite(self, tile):
        with self._context():
            return tile.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def absmax(self, tile, group: int) -> np.ndarray:
        from .absmax import group_absmax

        with self._context():
            chunks = self._chunks(tile.numel(), group)
            return _host([group_absmax(tile[begin:end].view(-1, group)) for begin, end in chunks])

    def fp8(self, tile, group: int, multiplier, scale, grid: str, sums: ErrorSums) -> np.ndarray:
        import torch

        from . import fp8

        with self._context():
            multiplier, scale = self._on_device(multiplier), self._on_device(scale)
            codes = []
            for begin, end in self._chunks(tile.numel(), group):
                part = tile[begin:end].view(-1, group)
                groups = slice(begin // group, end // group)
                encoded = fp8.encode(part, multiplier[groups], grid)
                _measure(fp8.decode(encoded, scale[groups], torch.float32), part, sums)
                codes.append(encoded.view(torch.uint8).view(-1))
            return _host(codes)

    def int8(self, tile, group: int, scale, sums: ErrorSums) -> np.ndarray:
        import torch

        from . import int8

        with self._context():
            scale = self._on_device(scale)
            codes = []
            for begin, end in self._chunks(tile.numel(), group):
                part = tile[begin:end].view(-1, group)
                groups = slice(begin // group, end // group)
                encoded = int8.encode(part, scale[groups])
                _measure(int8.decode(encoded, scale[groups], torch.float32), part, sums)
                codes.append(encoded.view(-1))
            return _host(codes)

    def bnb4(
        self, tile, block_size: int, book: str, sums: ErrorSums, given: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        from . import bnb4

        with self._context():
            packed, absmax = [], []
            scales = None if given is None else self._on_device(given)
            for begin, end in self._chunks(tile.numel(), block_size):
                part = tile[begin:end]
                blocks = slice(begin // block_size, -(-end // block_size))
                codes, block_absmax = bnb4.encode(part, block_size, book, None if scales is None else scales[blocks])
                _measure(bnb4.decode(codes, block_absmax, block_size, book, part.numel()), part, sums)
                packed.append(codes)
                absmax.append(block_absmax)
            return _host(packed), _host(absmax)

    def e4m3_errors(self, tile, group: int, absmax: np.ndarray, weights: np.ndarray) -> np.ndarray:
        from .scale_search import e4m3_errors

        multipliers = fp8_candidates(absmax)
        with self._context():
            runs = tile.view(-1, group)
            errors = e4m3_errors(runs, self._on_device(multipliers), self._on_device(weights)).cpu().numpy()
        return errors / np.square(multipliers, dtype=np.float64)

    def book_absmax(self, tile, block_size: int, weights: np.ndarray, book: str, floor: float = 0.0) -> np.ndarray:
        import torch

        from .scale_search import book_absmax

        with self._context():
            runs = torch.nn.functional.pad(tile, (0, -tile.numel() % block_size)).view(-1, block_size)
            return book_absmax(runs, self._on_device(weights), book, floor).cpu().numpy()

    def rotate(self, tile, group_size: int):
        from .hadamard import rotate

        with self._context():
            return rotate(tile.view(-1, group_size), group_size).view(-1)

    def matrix(self, tile, columns: int):
        with self._context():
            return tile.float().view(-1, columns)

    def refine(
        self, matrix, scale: np.ndarray, column_group: np.ndarray, feedback: Feedback, grid: str,
        multiplier: np.ndarray | None, sweeps: int, guard: bool,
    ) -> Refined:  # fmt: skip
        import torch

        from .refine import refine

        with self._context():
            given = None if multiplier is None else self._on_device(multiplier)
            groups = torch.from_numpy(column_group)
            refined = refine(matrix, self._on_device(scale), groups, feedback, grid, given, sweeps, guard)
            return Refined(*(part.cpu().numpy() for part in refined))

    def measure_codes(
        self, matrix, codes: np.ndarray, scale: np.ndarray, column_group: np.ndarray, grid: str, sums: ErrorSums
    ) -> None:
        with self._context():
            table, groups = self._on_device(CODE_VALUES[grid]), self._on_device(column_group)
            chunk = NORM_CHUNK if self.device.type == "cuda" else TORCH_CHUNK
            step = max(chunk // max(matrix.shape[1], 1), 1)
            for begin in range(0, len(matrix), step):
                rows = slice(begin, begin + step)
                values = table[self._on_device(codes[rows].view(np.uint8)).int()]
                _measure(values * self._on_device(scale[rows])[:, groups], matrix[rows], sums)


def _host(parts) -> np.ndarray:
    import torch

    return (parts[0] if len(parts) == 1 else torch.cat(parts)).cpu().numpy()


def _measure(decoded, part, sums: ErrorSums) -> None:
    weight = part.float().reshape(-1)
    sums.add(_sum_of_squares(decoded.reshape(-1) - weight), _sum_of_squares(weight))


def _sum_of_squares(values) -> float:
    """In float64, for float32 holds no square of a weight above 2e19 or below 1e-23; by parts, for the copy that takes."""
    import torch

    return sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in values.split(NORM_CHUNK))


def select(device: str = "cpu"):
    """The backend for a device ("cpu" or "cuda[:N]"): numba on the CPU and Triton on a GPU where they run, else torch.

    One object per worker thread: a TorchBackend owns its staging buffer and CUDA stream.
    """
    if device == "cpu":
        return JitBackend() if why_no_jit() is None else TorchBackend(device)
    from . import gpu

    if gpu.why_not(device) is not None:
        return TorchBackend(device)
    from .gpu.backend import GpuBackend

    return GpuBackend(device)


def available() -> dict[str, str]:
    """What runs here: implementation and device, then each family of operations on a GPU -> "yes", or what instead and
    why."""
    from . import gpu

    report = {"numba (CPU)": why_no_jit() or "yes"}
    if importlib.util.find_spec("torch") is None:
        return report | dict.fromkeys(("torch (CPU)", "torch (CUDA)", "Triton (CUDA)"), "torch is not installed")
    import torch

    has_device, no_triton = torch.cuda.is_available(), gpu.why_not()
    report["torch (CPU)"] = "yes"
    report["torch (CUDA)"] = "yes" if has_device else "torch sees no CUDA device"
    report["Triton (CUDA)"] = no_triton or "yes"
    if has_device:
        ours = "Triton" if no_triton is None else f"plain torch: {no_triton}"
        report |= {f"{family} (CUDA)": ours for family in GPU_FAMILIES}
    return report
