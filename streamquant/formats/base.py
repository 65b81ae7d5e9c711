"""What a format is: the tensors it writes, how tiles become them, and the way back.

A layer is a source tensor, seen as a flat run of elements. Every output that grows with the weight is *streamed*: for
each `elements_per_item` source elements it holds one item of `item_bytes` bytes, in order. From that alone follow the
tile boundaries a format accepts, the bytes each tile writes and where, before a weight is read. What remains of a
layer is *constant* (known when planned) or *final* (known when its last tile is done).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from streamquant.kernels import ErrorSums

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Output:
    """One tensor that a format writes for a layer.

    suffix: appended to the layer's name with a dot. dtype: safetensors tag. shape: as stored.
    elements_per_item, item_bytes: the streaming law above; 0 when not streamed.
    constant: the bytes, when they are known from the plan.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    elements_per_item: int = 0
    item_bytes: int = 0
    constant: bytes | None = None

    @property
    def streamed(self) -> bool:
        return self.elements_per_item > 0

    def extent(self, begin: int, end: int) -> tuple[int, int]:
        """Bytes [from, to) of this output that the source elements [begin, end) determine."""
        first = begin // self.elements_per_item
        last = -(-end // self.elements_per_item)
        return first * self.item_bytes, last * self.item_bytes


@dataclass(frozen=True)
class Fill:
    """The bytes of a whole tensor, however large, as one repeated item."""

    item: bytes


@dataclass
class OutputErrors:
    """Estimated squared output error, tr(E H Eᵀ): rounded to nearest with absmax, as written, and of the output itself.

    Sums over whatever was sampled; H is the identity where nothing is known of the inputs, and `energy` then is 0 where
    the error of the weights says it already.
    """

    before: float = 0.0
    after: float = 0.0
    energy: float = 0.0

    def add(self, before: float, after: float, energy: float) -> None:
        self.before += before
        self.after += after
        self.energy += energy


@dataclass(frozen=True)
class Scales:
    """Scales of a tile of whole rows: float32 [rows, groups]. multiplier: what FP8 and the books multiply by, if not
    1 / scale."""

    scale: np.ndarray
    multiplier: np.ndarray | None = None


class Rounding(Protocol):
    """What decides scales and codes where nearest with absmax does not: see streamquant/rounding/converter.py."""

    refines: bool

    def searches(self, grid: str, mode: str, block_size: int) -> bool: ...

    def e4m3_multiplier(self, backend: Any, tile: Any, geometry: Any, absmax: np.ndarray, encoded: Encoded) -> np.ndarray: ...

    def book_absmax(self, backend: Any, tile: Any, block_size: int, book: str) -> np.ndarray: ...

    def sample_blocks(
        self, backend: Any, tile: Any, block_size: int, book: str, absmax: np.ndarray, encoded: Encoded
    ) -> None: ...

    def codes(
        self, backend: Any, tile: Any, first_row: int, column_group: np.ndarray, plain: Scales, chosen: Scales, grid: str,
        encoded: Encoded,
    ) -> np.ndarray: ...  # fmt: skip


@dataclass
class Encoded:
    """One encoded tile.

    payloads: an array for each streamed output, in the order of `outputs`. largest: the tile's largest finite
    magnitude. finite: False when the tile held a NaN or an infinity. sums: squared error and weight. output: estimated
    output error, where rounding or scales were chosen by more than nearest and absmax.
    """

    payloads: list[Any] = field(default_factory=list)
    sums: ErrorSums = field(default_factory=ErrorSums)
    largest: float = 0.0
    finite: bool = True
    output: OutputErrors = field(default_factory=OutputErrors)


class Encoder(ABC):
    """Turns one layer's tiles into payloads. Tiles are independent, so several threads may encode at once.

    A format that must know the whole tensor first has `passes` == 2: every tile goes through `observe` (whose results
    are merged by `absorb`, in order), then every tile through `encode`. `rounding` is set before the first tile; None
    rounds to nearest with the scales that absmax gives.
    """

    passes = 1
    rounding: Rounding | None = None
    wants_bytes = False  # True: `encode` is given the raw bytes of the tile (a numpy uint8 array), not a backend's tile

    def observe(self, backend: Any, tile: Any) -> tuple[Any, bool]:
        """What the first pass learns from one tile (a JSON value), and whether all of it was finite."""
        raise TypeError(f"{type(self).__name__} has one pass")

    def absorb(self, learned: Any) -> None:
        """Merge what `observe` learned from the next tile, in tile order."""
        raise TypeError(f"{type(self).__name__} has one pass")

    @abstractmethod
    def encode(self, backend: Any, tile: Any, begin: int = 0) -> Encoded:
        """The payloads of one tile, which begins at element `begin` of the tensor."""

    def commit(self, encoded: Encoded) -> None:
        """Called once per tile, in tile order, when it has been written: statistics that `finish` needs."""

    def finish(self) -> dict[str, bytes | Fill]:
        """Bytes of the outputs that are final, by suffix; may also replace a streamed output (an all-zero layer)."""
        return {}

    def state(self) -> Any:
        """A JSON value from which `restore` continues after an interruption."""
        return None

    def restore(self, state: Any) -> None:
        """Take up a state saved by `state`."""


@dataclass(frozen=True)
class Format(ABC):
    """A format on disk. Subclasses register themselves by `name` and state only what is their own."""

    name: ClassVar[str]
    # The grid that learned rounding works on (streamquant.kernels.refined.GRIDS), None where there is no such.
    learned_grid: ClassVar[str | None] = None
    registry: ClassVar[dict[str, type[Format]]] = {}

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" in cls.__dict__:
            Format.registry[cls.name] = cls

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored so, or None when it can."""
        return None

    def fallback(self) -> Format | None:
        """The format used instead when the shape does not fit; None means the layer stays as it is."""
        return None

    @abstractmethod
    def outputs(self, shape: tuple[int, ...], dtype: str) -> list[Output]:
        """The tensors written for a weight of `shape` and safetensors `dtype`."""

    @abstractmethod
    def encoder(self, shape: tuple[int, ...], dtype: str) -> Encoder:
        """An encoder for one weight."""

    @abstractmethod
    def decode(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight back in floating point, from the layer's tensors by suffix: what a loader computes with."""

    def comfy_quant(self) -> dict[str, Any] | None:
        """The JSON object that describes the layer to ComfyUI, or None."""
        return None

    def in_quantization_metadata(self) -> bool:
        """Whether the header's `_quantization_metadata` lists the layer (bitsandbytes layers never are)."""
        return self.comfy_quant() is not None

    def granularity(self, shape: tuple[int, ...], dtype: str) -> int:
        """Tile boundaries must be multiples of this many elements."""
        return math.lcm(1, *(out.elements_per_item for out in self.outputs(shape, dtype) if out.streamed))

    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments, for reports and fingerprints."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def json_output(suffix: str, value: dict[str, Any], room: int = 0) -> Output:
    """A U8 tensor holding the UTF-8 bytes of a JSON object, spaced as json.dumps does by default.

    room: bytes it takes at the least; spaces follow the object.
    """
    payload = json.dumps(value).encode().ljust(room)
    return Output(suffix, "U8", (len(payload),), constant=payload)
