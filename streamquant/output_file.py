"""A planned output, and each file of it: its tensors at their offsets, its header's bytes, and where their hashes will go."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from streamquant import __version__
from streamquant.checkpoint.header import TensorInfo, build_header, layout
from streamquant.checkpoint.reader import Checkpoint

HASH_DIGITS = 16  # of an xxh3_64, in hex
PROVENANCE_KEY = "streamquant"
QUANTIZATION_KEY = "_quantization_metadata"


@dataclass(frozen=True)
class PlannedFile:
    """One output file. header: its first bytes, with zeros where the tensor hashes go. hash_offset: where that is."""

    name: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    hash_offset: int

    @property
    def size(self) -> int:
        return len(self.header) + (self.tensors[-1].end if self.tensors else 0)


@dataclass(frozen=True, kw_only=True)
class PlannedOutput:
    """What will be written of a checkpoint, complete. index_name: of the shard index, where there are several files."""

    checkpoint: Checkpoint
    files: tuple[PlannedFile, ...]
    index_name: str | None = None

    @property
    def output_size(self) -> int:
        """Bytes of all output files."""
        return sum(file.size for file in self.files)


def planned_file(
    name: str,
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    checkpoint: Checkpoint,
    provenance: dict[str, Any],
    quantization: str | None = None,
) -> PlannedFile:
    """Lay out (name, dtype, shape) tensors, and build the header.

    The source's metadata is kept, but for what it says of its layers and of its own making. provenance: what is recorded
    beside tool, version and source. quantization: ComfyUI's list of the layers, as JSON.
    """
    placed = layout(tensors)
    metadata = {key: text for key, text in checkpoint.metadata.items() if key not in (QUANTIZATION_KEY, PROVENANCE_KEY)}
    metadata.setdefault("format", "pt")
    if quantization is not None:
        metadata[QUANTIZATION_KEY] = quantization
    entry = {
        "tool": "streamquant",
        "version": __version__,
        **provenance,
        "source": [{"name": file.path.name, "header_sha256": file.header.sha256} for file in checkpoint.files],
    }
    # The tensors' hashes are known last but their length is known now: zeros keep their place at the very end.
    opening = json.dumps(entry)[:-1] + ', "tensor_xxh3_64": "'
    metadata[PROVENANCE_KEY] = opening + "0" * HASH_DIGITS * len(placed) + '"}'
    header = build_header(placed, metadata)
    marker = json.dumps(opening, ensure_ascii=False)[1:-1].encode()
    return PlannedFile(name, header, tuple(placed), header.index(marker) + len(marker))
