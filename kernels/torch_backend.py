"""The references as a backend, on the CPU or a CUDA device."""

from __future__ import annotations

import numpy as np

from .codebooks import CODE_VALUES
from .feedback import Feedback
from .refined import Refined
from .search_grid import fp8_candidates
from .sums import DifferenceSums, ErrorSums

TORCH_CHUNK = 1 << 18  # elements the torch references work on at a time on the CPU, so that temporaries stay in cache
NORM_CHUNK = 1 << 22  # elements copied to float64 at a time


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

    def difference(self, values: np.ndarray, tile) -> DifferenceSums:
        from .difference import of_values

        with self._context():
            return of_values(self._on_device(values), tile)

    def byte_difference(self, codes: np.ndarray, scale: np.ndarray, grid: str, rotation: int, tile) -> DifferenceSums:
        from .difference import of_bytes

        with self._context():
            return of_bytes(self._on_device(codes), self._on_device(scale), grid, rotation, tile)

    def book_difference(
        self, packed: np.ndarray, absmax: np.ndarray, block_size: int, book: np.ndarray, high_first: bool, tile
    ) -> DifferenceSums:
        from .difference import of_book

        with self._context():
            return of_book(
                self._on_device(packed), self._on_device(absmax), block_size, self._on_device(book), high_first, tile
            )


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
