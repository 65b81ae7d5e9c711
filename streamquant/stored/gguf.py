"""GGUF files, which are recognised and described from their header, by the `gguf` package; their weights are not decoded."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamquant import errors
from streamquant.checkpoint.header import printable

MAGIC = b"GGUF"
START = 24  # bytes: magic, version, how many tensors, how many entries of metadata
SMALLEST_ENTRY = 12  # bytes that any tensor or entry takes in a header, at the least
LONGEST_TEXT = 300
FILE_TYPE = "general.file_type"


@dataclass(frozen=True)
class GgufType:
    """Tensors of one type."""

    name: str
    tensors: int
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class GgufSummary:
    """What a GGUF file's header says. types: the largest first; empty without the `gguf` package, and `complete` is False
    then. metadata: numbers and short texts; of a list, how many entries.
    """

    path: Path
    nbytes: int
    version: int
    tensors: int
    architecture: str | None = None
    file_type: str | None = None
    types: tuple[GgufType, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @property
    def weights(self) -> int:
        return sum(kind.weights for kind in self.types)


def read_gguf(path: Path) -> GgufSummary | None:
    """Summarise a GGUF file; None when it is not one. Raises HeaderError when its header is damaged or cut short."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(START)
    except OSError as error:
        raise errors.SourceReadError(f"Cannot read {printable(str(path), 300)}: {error.strerror}.") from None
    if start[:4] != MAGIC or start[8:9] == b"{":  # a safetensors header of that very length
        return None
    if len(start) < START:
        raise _damaged(path, "it ends within its first 24 bytes")
    version, tensors, entries = (int.from_bytes(start[a:b], "little") for a, b in ((4, 8), (8, 16), (16, 24)))
    if SMALLEST_ENTRY * (tensors + entries) > size:
        raise _damaged(path, f"it claims {tensors:,} tensors and {entries:,} entries, for which it is too small")
    if importlib.util.find_spec("gguf") is None:
        return GgufSummary(path, size, version, tensors)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {name: _shown(part) for name, part in reader.fields.items() if not name.startswith("GGUF.")}
        counts, weights, nbytes = Counter(), Counter(), Counter()
        for tensor in reader.tensors:
            name = tensor.tensor_type.name
            counts[name] += 1
            weights[name] += int(tensor.n_elements)
            nbytes[name] += int(tensor.n_bytes)
    except Exception as error:  # whatever that package raises on a file, the file is not what it says
        raise _damaged(path, f"the gguf package says: {printable(str(error), 200)}") from None
    architecture = metadata.pop("general.architecture", None)
    types = tuple(GgufType(name, counts[name], weights[name], size_) for name, size_ in nbytes.most_common())
    return GgufSummary(
        path, size, version, tensors, None if architecture is None else str(architecture), _file_type(metadata), types,
        metadata, True,
    )  # fmt: skip


def _shown(part: Any) -> Any:
    """A header entry as a JSON value."""
    value = part.contents()
    if isinstance(value, list):
        return f"{len(value):,} entries"
    return value if not isinstance(value, str) or len(value) <= LONGEST_TEXT else value[:LONGEST_TEXT] + "…"


def _file_type(metadata: dict[str, Any]) -> str | None:
    """The name of the mix of types that the file was made as."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(metadata.pop(FILE_TYPE)).name.removeprefix("MOSTLY_")
    except (KeyError, ValueError):
        return None


def _damaged(path: Path, why: str) -> errors.HeaderError:
    return errors.HeaderError(f"{printable(str(path), 300)} is a GGUF file whose header is damaged: {why}.")
