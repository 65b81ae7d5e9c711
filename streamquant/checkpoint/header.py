"""The safetensors header: parsed strictly, and built byte for byte as `safetensors` 0.8.0 writes it.

What this module accepts, the Rust reader accepts; it also refuses what that reader lets pass: a key given twice, an
extra field, a `__metadata__` of null, white space other than spaces after the header, any before it. Every way a
header can be wrong is a class of its own in `streamquant.errors`, and every message is one sentence.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from streamquant import errors
from streamquant.checkpoint.json_text import bracket_bomb
from streamquant.checkpoint.positioned import close_read, read_whole

MAX_HEADER_LENGTH = 100_000_000

# Bits per element, in the order in which `safetensors` lays out the types of a file (its Dtype enum, from the last
# to the first). The order is not purely by width: BOOL comes after the sub-byte types.
DTYPE_BITS: dict[str, int] = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8,
    "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}  # fmt: skip

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_U64_MAX = 2**64 - 1
_WRITE_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}
_OFFSETS = attrgetter("start", "end")
_ODD_INTEGER = re.compile(r"-0|[0-9]{41}")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header; `start` and `end` are byte offsets inside the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        """How many elements the shape holds; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A whole header, with its tensors in offset order."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]  # {} when the file has none
    data_start: int  # file offset of the data section, in bytes
    size: int  # of the whole file, in bytes
    sha256: str  # hex digest of the header without its 8 length bytes


def printable(name: str, limit: int = 120) -> str:
    """`name` made safe to show: control and invisible characters escaped, cut after `limit` characters."""
    shown = name[:limit]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
    return shown if len(name) <= limit else f"{shown}... ({len(name):,} characters)"


def printable_lines(text: str, limit: int = 1 << 16) -> str:
    """As `printable`, of a text whose line ends are meant: of a message, say."""
    return "\n".join(printable(line, limit) for line in text.split("\n"))


@contextmanager
def _explained(where: str, advice: str) -> Iterator[None]:
    """Make a sentence of a fault raised inside, which says only what is wrong: add where it is and what to do."""
    try:
        yield
    except errors.HeaderError as fault:
        raise type(fault)(f"{printable(where, limit=4096)}: {fault}; {advice}.") from None


_reading = partial(_explained, advice="the file is damaged, cut short or badly written, so download it again")
_writing = partial(_explained, "the header to write", "no safetensors file can hold this, so change the tensors")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the file at `path`.

    Raises SourceMissingError when there is none, SourceReadError when it cannot be read, or a HeaderError.
    """
    name = os.fspath(path)
    shown = printable(name, limit=4096)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for ever
            raise errors.SourceReadError(f"{shown}: this is not a regular file; give the path of a safetensors file.")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            file_size = os.fstat(descriptor).st_size
            length = parse_length(read_whole(descriptor, 8), file_size, name)
            raw = read_whole(descriptor, length, 8)
        finally:
            close_read(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        raise errors.SourceMissingError(f"{shown}: there is no such file; check the path.") from None
    except OSError as error:
        raise errors.SourceReadError(f"{shown}: cannot be read ({error.strerror}); check its disk.") from error
    if len(raw) != length:
        raise errors.SourceReadError(f"{shown}: shrank while it was read; start again when nothing writes to it.")
    return parse_header(raw, file_size, name)


def parse_length(first8: bytes, file_size: int, path: str) -> int:
    """The header's length in bytes, or a FileTooShortError, HeaderLengthError or HeaderPastEndError."""
    with _reading(path):
        if min(len(first8), file_size) < 8:
            raise errors.FileTooShortError("the file has fewer than the 8 bytes of a header length")
        length = int.from_bytes(first8[:8], "little")
        if not 0 < length <= MAX_HEADER_LENGTH:
            raise errors.HeaderLengthError(f"the header length is {length:,}, not between 1 and {MAX_HEADER_LENGTH:,}")
        if 8 + length > file_size:
            raise errors.HeaderPastEndError(f"the header takes {length:,} bytes, but only {file_size - 8:,} follow")
        return length


def parse_header(raw: bytes, file_size: int, path: str) -> Header:
    """Parse and check `raw`, the header after the length bytes, of a file of `file_size` bytes, or a HeaderError."""
    data_start = 8 + len(raw)
    collects = gc.isenabled()
    gc.disable()  # a million tensors are millions of containers without a cycle: looking for one doubles the time
    try:
        with _reading(path):
            document = _load_json(raw)
            metadata = _take_metadata(document)
            found = [_parse_tensor(name, entry) for name, entry in document.items()]
            found.sort(key=_OFFSETS)  # stable, so empty tensors that share an offset stay in file order
            _check_coverage(found, file_size - data_start)
    finally:
        if collects:
            gc.enable()
    tensors = {tensor.name: tensor for tensor in found}
    return Header(tensors, metadata, data_start, file_size, hashlib.sha256(raw).hexdigest())


@_writing()
def element_bytes(dtype: str, elements: int) -> int:
    """Bytes that `elements` take, or an UnknownDtypeError, ShapeError or SizeMismatchError (part of a byte)."""
    return _data_bytes(f"of {elements:,} elements", dtype, (elements,))


@_writing()
def layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[TensorInfo]:
    """Give each (name, dtype, shape) its place, in the order `safetensors` writes: by dtype, then by name.

    The offsets start at 0 and leave no gap. Raises UnknownDtypeError, ShapeError or SizeMismatchError.
    """
    placed: list[TensorInfo] = []
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (_WRITE_RANK.get(tensor[1], -1), tensor[0])):
        start, end = end, end + _data_bytes(name, dtype, shape)
        placed.append(TensorInfo(name, dtype, tuple(shape), start, end))
    return placed


@_writing()
def build_header(tensors: list[TensorInfo], metadata: dict[str, str]) -> bytes:
    """The first bytes of a file: 8 length bytes, then JSON padded with spaces to a multiple of 8.

    Raises HeaderLengthError above the format's limit, DuplicateKeyError for a name given twice, MetadataError for
    metadata other than strings, HeaderNotUtf8Error for text that UTF-8 cannot hold.
    """
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise errors.MetadataError("the metadata does not map strings to strings")
    document: dict[str, object] = {_METADATA: metadata} if metadata else {}
    for tensor in sorted(tensors, key=_OFFSETS):
        if tensor.name in document or tensor.name == _METADATA:
            raise errors.DuplicateKeyError(f'the key "{printable(tensor.name)}" is taken twice')
        document[tensor.name] = dict(dtype=tensor.dtype, shape=tensor.shape, data_offsets=(tensor.start, tensor.end))
    try:
        raw = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode(document).encode("utf-8")
    except UnicodeEncodeError as error:
        text = printable(error.object[: error.end][-40:])
        raise errors.HeaderNotUtf8Error(f'the text that ends in "{text}" has no UTF-8 form') from None
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_LENGTH:
        raise errors.HeaderLengthError(f"names and metadata take {len(raw):,} bytes, above {MAX_HEADER_LENGTH:,}")
    return len(raw).to_bytes(8, "little") + raw


def _load_json(raw: bytes) -> dict[str, object]:
    """The header's object. Python's JSON reader takes NaN and Infinity, on which int() is a ValueError."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.HeaderNotUtf8Error(f"byte {error.start:,} of the header is not UTF-8") from None
    if not text.startswith("{"):
        raise errors.HeaderStartError(f'the header starts with "{printable(text[:1])}" instead of "{{"')
    if bracket_bomb(text):
        raise errors.TensorEntryError("the header holds hardly anything but brackets, and no tensors")
    integer = _integer if _ODD_INTEGER.search(text) else int  # the decoder reads ints itself, some ten times as fast
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=integer, parse_constant=int)
    try:
        document, end = decoder.raw_decode(text)
        if _SURROGATE_ESCAPE.search(text):  # rare, and only the parsed text tells a pair from a lone half
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise errors.HeaderNotJsonError(f"the header is not JSON ({error})") from None
    if text.count(" ", end) != len(text) - end:
        raise errors.HeaderNotJsonError(f"more than spaces follows the header's object, from its character {end:,} on")
    return document


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict, which would silently keep the last of two values under one key."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise errors.DuplicateKeyError(f'the header has the key "{printable(twice)}" twice in one object')
    return entries


def _integer(digits: str) -> int | float:
    """As in Rust, "-0" is a float; and 40 digits are out of range like 4,000, on which int() would be slow or fail."""
    return int(digits[:40]) if digits != "-0" else -0.0


def _take_metadata(document: dict[str, object]) -> dict[str, str]:
    """Take `__metadata__` out of the document, leaving the tensors."""
    metadata = document.pop(_METADATA, {})
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise errors.MetadataError(f'"{_METADATA}" is not an object that maps strings to strings')
    return metadata


def _parse_tensor(name: str, entry: object) -> TensorInfo:
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise _tensor_fault(errors.TensorEntryError, name, "is not an object of just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or type(shape) is not list or not _is_offsets(offsets):
        raise _tensor_fault(
            errors.TensorEntryError, name, "needs a string dtype, a list shape, two integer data_offsets"
        )
    start, end = offsets
    if end < start:
        raise _tensor_fault(errors.OffsetsReversedError, name, f"starts at data byte {start:,} and ends at {end:,}")
    needed = _data_bytes(name, dtype, shape)
    if needed != end - start:
        problem = f"goes from data byte {start:,} to {end:,}, but its {dtype} of shape {printable(str(shape[:40]))} needs"
        raise _tensor_fault(errors.SizeMismatchError, name, f"{problem} {needed:,} bytes")
    return TensorInfo(name, sys.intern(dtype), tuple(shape), start, end)


def _is_offsets(value: object) -> bool:
    """Whether `value` is a list of two integers of 64 bits; True and False are ints to Python, hence type()."""
    return type(value) is list and [*map(type, value)] == [int, int] and min(value) >= 0 and max(value) <= _U64_MAX


def _data_bytes(name: str, dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor takes; dimensions multiply in order as in Rust, where [2**63, 2, 0] overflows."""
    if dtype not in DTYPE_BITS:
        raise _tensor_fault(errors.UnknownDtypeError, name, f'has the unknown dtype "{printable(dtype)}"')
    count = 1
    for dimension in shape:
        if type(dimension) is not int or not 0 <= dimension <= _U64_MAX:
            raise _tensor_fault(errors.ShapeError, name, "has a dimension that is not an integer from 0 to 2^64 - 1")
        count *= dimension
        if count > _U64_MAX:
            break  # the product of a million dimensions would take hours
    bits = count * DTYPE_BITS[dtype]
    if bits > _U64_MAX:
        raise _tensor_fault(errors.ShapeError, name, "has a shape whose size in bits overflows 64 bits")
    if bits % 8:
        raise _tensor_fault(errors.SizeMismatchError, name, f"takes {bits:,} bits, not a whole number of bytes")
    return bits // 8


def _check_coverage(tensors: list[TensorInfo], data_size: int) -> None:
    """Check that the tensors, in offset order, fill the data section of `data_size` bytes without gap or overlap."""
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            kind = errors.OffsetsGapError if tensor.start > end else errors.OffsetsOverlapError
            raise _tensor_fault(kind, tensor.name, f"starts at data byte {tensor.start:,} where {end:,} comes next")
        end = tensor.end
    if end > data_size:
        raise errors.TruncatedFileError(f"the tensors need {end:,} bytes of data, but {data_size:,} are there")
    if end < data_size:
        raise errors.TrailingBytesError(f"{data_size - end:,} bytes follow the tensors' {end:,} bytes of data")


def _tensor_fault(kind: type[errors.HeaderError], name: str, problem: str) -> errors.HeaderError:
    return kind(f'tensor "{printable(name)}" {problem}')
