"""bitsandbytes 4-bit (NF4 and FP4), as `bitsandbytes.nn.Linear4bit` stores it: blocks over the flattened weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from streamquant.kernels.codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS, DYNAMIC_BOUNDARIES, DYNAMIC_MAP

from .base import Encoded, Encoder, Format, Output, Scales, json_output

if TYPE_CHECKING:
    import torch

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
SMALLEST_DIVISOR = np.float32(1e-38)
# The longest text json.dumps gives a float32 widened to float64, as "-1.1754943508222875e-38".
OFFSET_LENGTH = 24

# What bitsandbytes calls the source dtype, which is also the dtype it decodes to.
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


@dataclass(frozen=True)
class BitsAndBytes4bit(Format):
    """Shared by NF4 and FP4. double_quant stores absmax itself in 8 bits, in blocks of 256 around its mean."""

    book: ClassVar[str]
    block_size: int = 64
    double_quant: bool = False

    def outputs(self, shape: tuple[int, ...], dtype: str) -> list[Output]:
        elements = shape[0] * shape[1]
        blocks = -(-elements // self.block_size)
        quant_map = Output("weight.quant_map", "F32", (16,), constant=CODE_BOOKS[self.book].tobytes())
        packed = Output("weight", "U8", ((elements + 1) // 2, 1), elements_per_item=2, item_bytes=1)
        state_suffix = f"weight.quant_state.bitsandbytes__{self.book}"
        if not self.double_quant:
            absmax = Output("weight.absmax", "F32", (blocks,), self.block_size, 4)
            return [packed, absmax, quant_map, json_output(state_suffix, self._quant_state(shape, dtype))]
        nested_blocks = -(-blocks // NESTED_BLOCK_SIZE)
        state = self._nested_quant_state(shape, dtype, 0.0)
        return [
            packed,
            Output("weight.absmax", "U8", (blocks,), self.block_size, 1),
            Output("weight.nested_absmax", "F32", (nested_blocks,), self.block_size * NESTED_BLOCK_SIZE, 4),
            quant_map,
            Output("weight.nested_quant_map", "F32", (256,), constant=DYNAMIC_MAP.tobytes()),
            Output(state_suffix, "U8", (len(state),)),
        ]

    def _quant_state(self, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
        return {
            "quant_type": self.book,
            "blocksize": self.block_size,
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
        }

    def _nested_quant_state(self, shape: tuple[int, ...], dtype: str, offset: float) -> bytes:
        """The quant_state JSON, padded with spaces to a length that does not depend on the weights."""
        state = self._quant_state(shape, dtype)
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": offset}
        padding = OFFSET_LENGTH - len(json.dumps(offset))
        return (json.dumps(state) + " " * padding).encode()

    def encoder(self, shape: tuple[int, ...], dtype: str) -> Encoder:
        if not self.double_quant:
            return BlockEncoder(self.book, self.block_size, shape)
        return NestedEncoder(self, shape, dtype)

    def decode(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        from streamquant.kernels import bnb4

        state = json.loads(bytes(tensors[f"weight.quant_state.bitsandbytes__{self.book}"].tolist()))
        absmax = tensors["weight.absmax"]
        if self.double_quant:
            absmax = bnb4.decode_absmax(
                absmax,
                tensors["weight.nested_absmax"],
                tensors["weight.nested_quant_map"],
                state["nested_blocksize"],
                state["nested_offset"],
            )
        shape = tuple(state["shape"])
        elements = shape[0] * shape[1]
        packed, quant_map = tensors["weight"], tensors["weight.quant_map"]
        return bnb4.decode_with(packed, absmax, self.block_size, quant_map, elements).to(dtype).view(shape)

    def comfy_quant(self) -> dict[str, Any]:
        return {"format": self.name, "group_size": self.block_size}

    def in_quantization_metadata(self) -> bool:
        return False


@dataclass(frozen=True)
class BnbNF4(BitsAndBytes4bit):
    """4-bit codes of the NF4 book."""

    name: ClassVar[str] = "bnb_nf4"
    book: ClassVar[str] = "nf4"
    learned_grid: ClassVar[str | None] = "nf4"


@dataclass(frozen=True)
class BnbFP4(BitsAndBytes4bit):
    """4-bit codes of the FP4 book."""

    name: ClassVar[str] = "bnb_fp4"
    book: ClassVar[str] = "fp4"
    learned_grid: ClassVar[str | None] = "fp4"


class BlockEncoder(Encoder):
    """Packed codes and float32 absmax."""

    def __init__(self, book: str, block_size: int, shape: tuple[int, ...]):
        self.book, self.block_size, self.shape = book, block_size, shape

    @property
    def searches(self) -> bool:
        return self.rounding is not None and self.rounding.searches(self.book, "block", self.block_size)

    def absmax(self, backend: Any, tile: Any) -> np.ndarray:
        """float32 [blocks]: largest magnitude of each block; the short last one is floored, as bitsandbytes does."""
        elements, size = tile.shape[0], self.block_size
        whole = elements // size * size
        absmax = backend.absmax(tile[:whole], size) if whole else np.empty(0, dtype=np.float32)
        if whole < elements:
            absmax = np.append(absmax, np.maximum(backend.absmax(tile[whole:], elements - whole), SMALLEST_DIVISOR))
        return absmax

    def written(self, absmax: np.ndarray) -> list[np.ndarray]:
        """What is written of absmax."""
        return [absmax]

    def read(self, written: list[np.ndarray]) -> np.ndarray:
        """What a reader makes of that: float32 [blocks]."""
        return written[0]

    def encode(self, backend: Any, tile: Any, begin: int = 0) -> Encoded:
        encoded = Encoded()
        if self.rounding is None or not (self.searches or self.rounding.refines):
            packed, absmax = backend.bnb4(tile, self.block_size, self.book, encoded.sums)
            written = self.written(absmax)
            encoded.finite = bool(np.isfinite(absmax).all() and np.isfinite(self.read(written)).all())
            encoded.payloads = [packed, *written]
            return encoded
        plain = self.absmax(backend, tile)
        encoded.finite = bool(np.isfinite(plain).all())
        absmax = self._chosen(backend, tile, plain)
        written = self.written(absmax)
        encoded.finite &= bool(np.isfinite(self.read(written)).all())
        if not encoded.finite:
            packed, _ = backend.bnb4(tile, self.block_size, self.book, encoded.sums)
        elif self.rounding.refines:
            packed = self._learned(backend, tile, begin, plain, self.read(written), encoded)
        else:
            # Codes for the scales that a reader will see, which double quantization has moved a little.
            read = self.read(written)
            given = np.where(read > SMALLEST_DIVISOR, read, absmax)
            self.rounding.sample_blocks(backend, tile, self.block_size, self.book, given, encoded)
            packed, _ = backend.bnb4(tile, self.block_size, self.book, encoded.sums, given)
        encoded.payloads = [packed, *written]
        return encoded

    def _chosen(self, backend: Any, tile: Any, plain: np.ndarray) -> np.ndarray:
        """The absmax to use: searched where that is done and every weight of the tile is finite."""
        if not self.searches or not np.isfinite(plain).all():
            return plain
        found = self.rounding.book_absmax(backend, tile, self.block_size, self.book)
        return np.where(found > SMALLEST_DIVISOR, found, plain)

    def _learned(
        self, backend: Any, tile: Any, begin: int, plain: np.ndarray, chosen: np.ndarray, encoded: Encoded
    ) -> np.ndarray:
        """Packed codes by learned rounding."""
        columns, size = self.shape[1], self.block_size
        rows = tile.shape[0] // columns
        straddles = columns % size != 0

        def by_row(absmax: np.ndarray) -> Scales:
            scale = np.repeat(absmax, size)[: rows * columns] if straddles else absmax
            scale = scale.reshape(rows, -1)
            return Scales(scale, np.float32(1) / np.maximum(scale, SMALLEST_DIVISOR))

        column_group = np.arange(columns, dtype=np.int64) // (1 if straddles else size)
        scales = by_row(plain), by_row(chosen)
        first_row = begin // columns
        codes = self.rounding.codes(backend, tile, first_row, column_group, *scales, self.book, encoded).reshape(-1)
        if codes.size % 2:
            codes = np.append(codes, self.padding_code)
        return (codes[::2] << 4) | codes[1::2]

    @property
    def padding_code(self) -> np.uint8:
        """The code of 0, which fills up an odd last byte."""
        rank = np.searchsorted(BOUNDARIES[self.book], 0.0, side="left")
        return ASCENDING_CODES[self.book][rank]


class NestedEncoder(BlockEncoder):
    """Double quantization: the first pass takes the mean of absmax, the second stores absmax around it in 8 bits.

    bitsandbytes takes that mean in float32 in an order that depends on threads; here it is the float64 mean rounded
    once, so offsets may differ from its own in the last digit.
    """

    passes = 2

    def __init__(self, layout: BitsAndBytes4bit, shape: tuple[int, ...], dtype: str):
        super().__init__(layout.book, layout.block_size, shape)
        self.layout, self.dtype = layout, dtype
        self.blocks = -(-shape[0] * shape[1] // layout.block_size)
        # The sum of all absmax as an integer multiple of 2**-149: exact, so that tile boundaries cannot change it.
        self.total = 0

    @property
    def offset(self) -> np.float32:
        return np.float32(float(Fraction(self.total, max(self.blocks, 1) << 149)))

    def observe(self, backend: Any, tile: Any) -> tuple[int, bool]:
        plain = self.absmax(backend, tile)
        return exact_sum(self._chosen(backend, tile, plain)), bool(np.isfinite(plain).all())

    def absorb(self, learned: int) -> None:
        self.total += learned

    def written(self, absmax: np.ndarray) -> list[np.ndarray]:
        return list(encode_dynamic(absmax - self.offset))

    @np.errstate(over="ignore", invalid="ignore")  # 8 bits may round the largest absmax of all beyond float32
    def read(self, written: list[np.ndarray]) -> np.ndarray:
        codes, nested_absmax = written
        return DYNAMIC_MAP[codes] * np.repeat(nested_absmax, NESTED_BLOCK_SIZE)[: codes.size] + self.offset

    def finish(self) -> dict[str, bytes]:
        state = self.layout._nested_quant_state(self.shape, self.dtype, float(self.offset))
        return {f"weight.quant_state.bitsandbytes__{self.book}": state}

    def state(self) -> str:
        return str(self.total)

    def restore(self, state: str) -> None:
        self.total = int(state)


def exact_sum(values: np.ndarray) -> int:
    """Sum of non-negative float32 `values` in units of 2**-149, without rounding; NaN and infinity count as 0."""
    bits = values.view(np.uint32)
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | np.where(exponent > 0, np.uint32(1 << 23), np.uint32(0))
    # float64 holds a sum of fewer than 2**29 mantissas of 24 bits exactly.
    by_exponent = np.bincount(exponent, weights=mantissa.astype(np.float64), minlength=256)
    return sum(int(total) << max(index - 1, 0) for index, total in enumerate(by_exponent[:255].tolist()) if total)


@np.errstate(invalid="ignore")  # an infinity divided by itself becomes NaN, as it does in bitsandbytes
def encode_dynamic(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bitsandbytes' 8-bit blockwise quantization over its dynamic map.

    values: float32 [n]. Returns uint8 codes [n] and float32 absmax [ceil(n / 256)]. Nearest map entry, ties to the lower;
    a short last block divides by its absmax instead of multiplying by the reciprocal, as bitsandbytes does.
    """
    whole = values.size // NESTED_BLOCK_SIZE * NESTED_BLOCK_SIZE
    blocks, rest = values[:whole].reshape(-1, NESTED_BLOCK_SIZE), values[whole:]
    absmax = np.abs(blocks).max(axis=1, initial=0.0).astype(np.float32)
    scaled = (blocks * (np.float32(1) / np.maximum(absmax, SMALLEST_DIVISOR))[:, None]).reshape(-1)
    if rest.size:
        rest_absmax = np.maximum(np.abs(rest).max(), SMALLEST_DIVISOR)
        absmax = np.append(absmax, rest_absmax)
        scaled = np.append(scaled, rest / rest_absmax)
    return np.searchsorted(DYNAMIC_BOUNDARIES, scaled, side="left").astype(np.uint8), absmax
