"""GGUF files, which are recognised and described from their header; their weights are not decoded.

The header is walked here, by calls and within bounds. The `gguf` package's reader believes the length that a list claims,
takes text that is cut short for whole, and keeps an object for every entry of a list. Its tables of types are used, where it
is installed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from streamquant import errors
from streamquant.checkpoint.header import MAX_HEADER_LENGTH, printable
from streamquant.checkpoint.positioned import opened

MAGIC = b"GGUF"
START = 24  # bytes: magic, version, how many tensors, how many entries of metadata
VERSIONS = (2, 3)  # the first had counts of 32 bits
SMALLEST_ENTRY = 12  # bytes that any tensor or entry takes in a header, at the least
MOST_ENTRIES = 100_000  # of metadata, each of which is kept
MOST_DIMENSIONS, MOST_WEIGHTS = 32, 1 << 60  # of a tensor, even of one that a dimension of 0 makes empty
LONGEST_NAME = (1 << 16) - 1  # bytes of a key, by the specification
LONGEST_TEXT = 300
DEEPEST_LIST = 8  # lists within lists
# Kinds of values by their number; of numbers, as `struct` spells them.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
ARCHITECTURE, FILE_TYPE, ALIGNMENT = "general.architecture", "general.file_type", "general.alignment"
ALIGNED_TO = 32  # bytes, where the metadata does not say


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


class _Damaged(Exception):
    """Why a header is none."""


class _Entry(NamedTuple):
    """A tensor as the header lists it. type: its number. offset: in bytes, inside the data section."""

    name: str
    elements: int
    row: int
    type: int
    offset: int


def read_gguf(path: Path) -> GgufSummary | None:
    """Summarise a GGUF file; None when it is not one. Raises HeaderError when its header is damaged or cut short."""
    try:
        with opened(path) as file:
            if file.read(len(MAGIC)) != MAGIC:  # as a length, it is more than a safetensors header may have
                return None
            return _summary(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise errors.SourceReadError(f"Cannot read {printable(str(path), 300)}: {error.strerror}.") from None
    except _Damaged as damage:
        raise errors.HeaderError(f"{printable(str(path), 300)} is a GGUF file whose header is damaged: {damage}.") from None


def _summary(path: Path, file: BinaryIO, size: int) -> GgufSummary:
    if size < START:
        raise _Damaged(f"it ends within its first {START} bytes")
    header = _Header(file, size)
    tensors, entries = header.number("Q"), header.number("Q")
    if SMALLEST_ENTRY * (tensors + entries) > size:
        raise _Damaged(f"it claims {tensors:,} tensors and {entries:,} entries, for which it is too small")
    if entries > MOST_ENTRIES:
        raise _Damaged(f"it has {entries:,} entries of metadata, more than any model")
    metadata: dict[str, Any] = {}
    alignment = ALIGNED_TO
    for _ in range(entries):
        name, kind = header.name(), header.number("I")
        if name in metadata:
            raise _Damaged(f"its entry {printable(name)} is there twice")
        metadata[name] = value = header.value(kind)
        if name == ALIGNMENT:
            if NUMBERS.get(kind) != "I" or value.bit_count() != 1:
                raise _Damaged(f"{ALIGNMENT} is not a power of two")
            alignment = value
    listed = list(header.tensors(tensors))
    room = size - -(-header.position // alignment) * alignment if listed else 0
    known = importlib.util.find_spec("gguf") is not None
    architecture = metadata.pop(ARCHITECTURE, None)
    return GgufSummary(
        path, size, header.version, tensors, None if architecture is None else str(architecture),
        _file_type(metadata) if known else None, _types(listed, room) if known else (), metadata, known,
    )  # fmt: skip


class _Header:
    """The rest of a header, from its version on, in its own byte order. Nothing is read that its file does not have."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.position, self._order = len(MAGIC), "<"
        version = self._take(4)
        # A small number whose lower half is empty was written in the other order.
        self._order = "<" if version[:2] != b"\0\0" else ">"
        self.version = int.from_bytes(version, "little" if self._order == "<" else "big")
        if self.version not in VERSIONS:
            raise _Damaged(f"it is of version {self.version}, and only {' and '.join(map(str, VERSIONS))} are read")

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > self._size:
            raise _Damaged("the file ends before it does")
        if self.position > MAX_HEADER_LENGTH:
            raise _Damaged(f"it is longer than {MAX_HEADER_LENGTH:,} bytes")

    def _take(self, count: int) -> bytes:
        self._advance(count)
        data = self._file.read(count)
        if len(data) < count:
            raise _Damaged("the file became shorter while it was read")
        return data

    def _skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(self.position)

    def number(self, code: str) -> Any:
        """One number; code: as `struct` spells it."""
        code = self._order + code
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def name(self) -> str:
        """A key, or the name of a tensor."""
        length = self.number("Q")
        if length > LONGEST_NAME:
            raise _Damaged(f"a name in it has {length:,} bytes")
        return _decoded(self._take(length))

    def _text(self) -> str:
        """The beginning of a text."""
        length = self.number("Q")
        first = min(length, 4 * LONGEST_TEXT + 4)  # a character takes at most 4 bytes
        data = self._take(first)
        self._skip(length - first)
        text = _decoded(data, whole=first == length)
        return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"

    def value(self, kind: int) -> Any:
        """One value of metadata; of a list, how many entries."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self._text()
        if kind == LIST:
            return f"{self._list():,} entries"
        raise _Damaged(f"a value in it is of kind {kind}, which there is not")

    def _list(self, depth: int = 1) -> int:
        if depth > DEEPEST_LIST:
            raise _Damaged(f"it has lists within lists, more than {DEEPEST_LIST} deep")
        kind, count = self.number("I"), self.number("Q")
        if kind in NUMBERS:
            self._skip(count * struct.calcsize(f"<{NUMBERS[kind]}"))
        elif kind == TEXT:
            for _ in range(count):
                self._skip(self.number("Q"))
        elif kind == LIST:
            for _ in range(count):
                self._list(depth + 1)
        else:
            raise _Damaged(f"a list in it is of kind {kind}, which there is not")
        return count

    def tensors(self, count: int) -> Iterator[_Entry]:
        """What is listed of each tensor."""
        names = set()
        for _ in range(count):
            name = self.name()
            if name in names:
                raise _Damaged(f"its tensor {printable(name)} is there twice")
            names.add(name)
            dimensions = self.number("I")
            if dimensions > MOST_DIMENSIONS:
                raise _Damaged(f"its tensor {printable(name)} has {dimensions:,} dimensions")
            shape = [self.number("Q") for _ in range(dimensions)]  # the row's length first
            if math.prod(dimension or 1 for dimension in shape) >= MOST_WEIGHTS:
                raise _Damaged(f"its tensor {printable(name)} is larger than any file")
            yield _Entry(name, math.prod(shape), shape[0] if shape else 1, self.number("I"), self.number("Q"))


def _decoded(data: bytes, whole: bool = True) -> str:
    """Text; not whole: its last character may be cut."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if not whole and error.start > len(data) - 4:
            return data[: error.start].decode()
        raise _Damaged("a text in it is not UTF-8") from None


def _types(listed: list[_Entry], room: int) -> tuple[GgufType, ...]:
    """Totals by type. room: bytes of the data section."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    counts, weights, nbytes = Counter(), Counter(), Counter()
    for tensor in listed:
        shown = f"its tensor {printable(tensor.name)}"
        try:
            kind = GGMLQuantizationType(tensor.type)
        except ValueError:
            unknown = f"{shown} is of type {tensor.type}, which the gguf package does not know; if it is new, update that"
            raise _Damaged(unknown) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if tensor.row % block:
            raise _Damaged(f"{shown} has rows of {tensor.row:,} weights, and {kind.name} has blocks of {block}")
        size = tensor.elements // block * block_bytes
        if tensor.offset + size > room:
            raise _Damaged(f"{shown} lies outside the file")
        counts[kind.name] += 1
        weights[kind.name] += tensor.elements
        nbytes[kind.name] += size
    if nbytes.total() > room:
        raise _Damaged("its tensors lie over each other")
    return tuple(GgufType(name, counts[name], weights[name], size) for name, size in nbytes.most_common())


def _file_type(metadata: dict[str, Any]) -> str | None:
    """The name of the mix of types that the file was made as, which is taken from its metadata where it has one."""
    from gguf import LlamaFileType

    try:
        name = LlamaFileType(metadata.get(FILE_TYPE)).name.removeprefix("MOSTLY_")
    except ValueError:
        return None
    del metadata[FILE_TYPE]
    return name
