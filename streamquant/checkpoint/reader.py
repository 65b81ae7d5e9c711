"""The source of a conversion: one file, a shard set with its index, or a folder holding either.

Opening reads headers only. Data comes through a `TileReader`, memory-mapped or by pread; nothing is ever read whole.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamquant import errors
from streamquant.checkpoint.calls import UNSUPPORTED
from streamquant.checkpoint.header import Header, TensorInfo, printable, read_header
from streamquant.checkpoint.index import check_shard, read_index
from streamquant.checkpoint.kinds import pickles_in, refuse_other_kinds
from streamquant.checkpoint.mapping import Mapping, why_no_mapping
from streamquant.checkpoint.positioned import close_read, read_at

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SourceFile:
    """One safetensors file of a checkpoint, as it was when opened."""

    path: Path
    header: Header
    mtime_ns: int

    def identity(self) -> dict[str, Any]:
        """What must not change while a conversion (or its resume) goes on."""
        return {
            "name": self.path.name,
            "size": self.header.size,
            "mtime_ns": self.mtime_ns,
            "header_sha256": self.header.sha256,
        }


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint and the file it lies in."""

    info: TensorInfo
    file: int

    @property
    def name(self) -> str:
        return self.info.name


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's headers. tensors: by name, in order of file and offset."""

    path: Path
    files: tuple[SourceFile, ...]
    tensors: dict[str, SourceTensor]
    metadata: dict[str, str]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.info.nbytes for tensor in self.tensors.values())

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.header.size for file in self.files)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows [begin:end], as a slice takes them, of a tensor as a torch tensor of its own. A scalar is read whole."""
        import torch

        info = self.tensors[name].info
        dtype = torch_dtype(info.dtype)
        rows = info.shape[0] if info.shape else 1
        begin, end, _ = slice(begin, end).indices(rows) if info.shape else (0, 1, 1)
        count = max(end - begin, 0)
        row_bytes = info.nbytes // rows if rows else 0
        with TileReader(self, "pread") as reader:
            raw = bytearray(reader.tile(self.tensors[name], begin * row_bytes, (begin + count) * row_bytes))
        shape = (count, *info.shape[1:]) if info.shape else ()
        return torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def torch_dtype(tag: str) -> torch.dtype:
    """The torch dtype of a safetensors tag. Raises UnknownDtypeError for those torch does not have."""
    import torch

    names = {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
        "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
        "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    }  # fmt: skip
    if tag not in names:
        raise errors.UnknownDtypeError(f"torch has no dtype for {tag}; such a tensor can be copied but not read.")
    return getattr(torch, names[tag])


def open_checkpoint(source: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """Read the headers of a checkpoint.

    source: a `.safetensors` file, a `*.index.json`, or a folder with one of them; what is opened already is given back.
    Raises a CheckpointError naming the fault when it is absent, another kind of file, malformed, or an index that does not
    agree with its shards.
    """
    if isinstance(source, Checkpoint):
        return source
    path = Path(source)
    try:
        return _opened(path)
    except OSError as error:
        raise errors.SourceReadError(f"Cannot read {printable(str(path), 300)}: {error.strerror or error}.") from None


def _opened(path: Path) -> Checkpoint:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no filesystem takes
        raise errors.SourceMissingError(f"There is no file or folder at {printable(str(path), 300)}: check the path.") from None
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise errors.SourceMissingError(
            f"There is no file or folder at {printable(str(path), 300)} ({error.strerror}): check the path."
        ) from None
    if stat.S_ISDIR(found.st_mode):
        path = _find_in_folder(path)
    if not path.name.endswith(".json"):
        return open_file(path)
    files = []
    for shard, listed in read_index(path).items():
        file = _read_file(shard)
        check_shard(path, shard, file.header, listed)
        files.append(file)
    return _checkpoint(path, files)


def open_file(path: str | os.PathLike[str]) -> Checkpoint:
    """As `open_checkpoint`, of that one safetensors file: an index or a folder is none."""
    path = Path(path)
    return _checkpoint(path, [_read_file(path)])


def _checkpoint(path: Path, files: list[SourceFile]) -> Checkpoint:
    """The files as one; what two of them say in their metadata is as the first says it."""
    tensors, metadata = {}, {}
    for number, file in enumerate(files):
        tensors |= {name: SourceTensor(info, number) for name, info in file.header.tensors.items()}
        metadata |= {key: value for key, value in file.header.metadata.items() if key not in metadata}
    return Checkpoint(path, tuple(files), tensors, metadata)


def _read_file(path: Path) -> SourceFile:
    # The time is taken before the header is read, so that a change while it is read shows when the file is opened again.
    mtime_ns = refuse_other_kinds(path)
    return SourceFile(path, read_header(path), mtime_ns)


def _find_in_folder(folder: Path) -> Path:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    singles = sorted(entry for entry in folder.glob("*.safetensors") if not entry.name.startswith("."))
    if len(indexes) == 1:
        return indexes[0]
    if not indexes and len(singles) == 1:
        return singles[0]
    where = printable(str(folder), 300)
    if not indexes and not singles:
        if (folder / "model_index.json").exists():
            raise errors.SourceMissingError(
                f"{where} is a diffusers pipeline: give the folder of the model itself, {where}/transformer for instance."
            )
        if pickles := pickles_in(folder):
            names = ", ".join(map(printable, pickles[:3]))
            raise errors.NotSafetensorsError(
                f"The folder {where} holds PyTorch files only ({names}), which can run code when they are loaded, so they are "
                f"not opened here: get the model as .safetensors."
            )
        raise errors.SourceMissingError(f"The folder {where} holds no .safetensors file and no shard index.")
    names = ", ".join(printable(entry.name) for entry in (indexes or singles)[:5])
    raise errors.SourceMissingError(f"The folder {where} holds several checkpoints ({names}): name one of them.")


class TileReader:
    """Hands out byte ranges of a checkpoint's tensors; safe to use from several threads.

    io: "pread" reads into memory of its own; "mmap" gives views of the mapped file, where that is safe and possible, else
    it reads too (`notes` says why). Both raise SourceReadError when the source shrinks, vanishes or fails. What a view
    holds may change until it has been used: whoever has used one asks `confirm` before he believes what came of it.
    Leaving the context asks for all files.
    """

    def __init__(self, checkpoint: Checkpoint, io: str = "pread"):
        self.checkpoint = checkpoint
        self.notes: list[str] = []
        self.io = io
        if io == "mmap" and (why := why_no_mapping()):
            self._read_instead(why)
        self._handles = ExitStack()
        self._descriptors: list[int] = []
        self._maps: list[Mapping | None] = []

    def __enter__(self) -> TileReader:
        try:
            for number, file in enumerate(self.checkpoint.files):
                try:
                    descriptor = os.open(file.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                    self._handles.callback(close_read, descriptor)
                    self._descriptors.append(descriptor)
                    self._maps.append(None)
                    self.check(number)
                    if self.io == "mmap":
                        self._maps[number] = self._map(descriptor, file.header.size)
                except OSError as error:
                    raise self._failed(file, error) from None
        except BaseException:
            self._handles.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        damaged = [file for file, mapped in zip(self.checkpoint.files, self._maps, strict=True) if mapped and mapped.damaged]
        self._handles.close()
        if damaged:  # whatever else has failed, has failed for that
            raise self._unreadable(damaged[0])

    def kept(self) -> TileReader:
        """Opened, and closed when nobody holds it any more: for views that outlive a block of code."""
        self.__enter__()
        weakref.finalize(self, self._handles.close)
        return self

    def _map(self, descriptor: int, size: int) -> Mapping | None:
        try:
            mapping = Mapping(descriptor, size)
        except OSError as error:
            if error.errno not in UNSUPPORTED | {errno.ENODEV}:
                raise
            self._read_instead("this filesystem cannot map them")
            return None
        self._handles.callback(mapping.close)
        return mapping

    def _read_instead(self, why: str) -> None:
        self.io = "pread"
        self.notes.append(f"Files are read instead of mapped: {why}.")

    def descriptor(self, file: int) -> int:
        return self._descriptors[file]

    def check(self, number: int) -> None:
        """Raise SourceReadError when the file is no longer the one whose header was read."""
        file = self.checkpoint.files[number]
        try:
            now = os.fstat(self._descriptors[number])
        except OSError as error:
            raise self._failed(file, error) from None
        if (now.st_size, now.st_mtime_ns) != (file.header.size, file.mtime_ns):
            raise errors.SourceReadError(
                f"{printable(str(file.path), 300)} changed while it was being read: start again when nothing writes to it."
            )

    def tile(self, tensor: SourceTensor, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) of the tensor's data."""
        file = self.checkpoint.files[tensor.file]
        start = file.header.data_start + tensor.info.start + begin
        mapped = self._maps[tensor.file]
        if mapped is not None:
            self.check(tensor.file)
            return mapped.view[start : start + end - begin]
        buffer = memoryview(np.empty(end - begin, dtype=np.uint8))
        try:
            count = read_at(self._descriptors[tensor.file], buffer, start)
        except OSError as error:
            raise self._failed(file, error) from None
        self.check(tensor.file)  # afterwards: so what was read was there before any change
        if count < len(buffer):
            raise errors.SourceReadError(f"{printable(str(file.path), 300)} ended early: it was truncated.")
        return buffer

    def confirm(self, number: int | None = None) -> None:
        """Raise SourceReadError when a file (any, where no number is given) has changed or failed since it was opened."""
        for file in range(len(self._maps)) if number is None else [number]:
            mapped = self._maps[file]
            if mapped is not None:
                self.check(file)
                if mapped.damaged:
                    raise self._unreadable(self.checkpoint.files[file])

    def release(self, tensor: SourceTensor) -> None:
        """The tensor is done with: give its mapped pages back (they stay in the page cache)."""
        mapped = self._maps[tensor.file]
        if mapped is not None and tensor.info.nbytes >= mmap.PAGESIZE and hasattr(mmap, "MADV_DONTNEED"):
            start = self.checkpoint.files[tensor.file].header.data_start
            mapped.release(start + tensor.info.start, start + tensor.info.end)

    @staticmethod
    def _unreadable(file: SourceFile) -> errors.SourceReadError:
        return errors.SourceReadError(
            f"Reading {printable(str(file.path), 300)} failed: it was truncated, or its disk fails."
        )

    @staticmethod
    def _failed(file: SourceFile, error: OSError) -> errors.SourceReadError:
        why = error.strerror or error
        return errors.SourceReadError(f"Reading {printable(str(file.path), 300)} failed: {why}; mend the cause and try again.")
