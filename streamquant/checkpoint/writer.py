"""The destination: partial files at their full planned size, written at offsets, published by an atomic rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from streamquant import errors
from streamquant.checkpoint.calls import RESUME, UNSUPPORTED, close, remove, repeated, sync_folder, writing
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.positioned import close_read, read_whole, write_at


@dataclass(frozen=True)
class Names:
    """File names of one run. destination: the name the user gave; run: this run's own tag."""

    destination: Path
    run: str

    @classmethod
    def fresh(cls, destination: Path) -> Names:
        return cls(destination, secrets.token_hex(4))

    @property
    def journal(self) -> Path:
        return self.destination.with_name(f".{self.destination.name}.{self.run}.journal")

    def partial(self, file_name: str) -> Path:
        """Where an output file lies until it is complete."""
        return self.destination.with_name(f".{file_name}.{self.run}.partial")

    def final(self, file_name: str) -> Path:
        return self.destination.with_name(file_name)


def find_journals(destination: Path) -> list[Names]:
    """Runs that left a journal for this destination, newest first."""
    prefix, suffix = f".{destination.name}.", ".journal"
    found = []
    for entry in destination.parent.iterdir() if destination.parent.is_dir() else ():
        if entry.name.startswith(prefix) and entry.name.endswith(suffix):
            run = entry.name[len(prefix) : -len(suffix)]
            if len(run) == 8 and all(digit in "0123456789abcdef" for digit in run):
                with contextlib.suppress(FileNotFoundError):  # its run ends at this very moment
                    found.append((entry.stat().st_mtime_ns, Names(destination, run)))
    return [names for _, names in sorted(found, key=lambda pair: pair[0], reverse=True)]


class PartialFile:
    """One output file being written. Safe to write from several threads. advice: what a failure says is to be done."""

    def __init__(self, partial: Path, final: Path, size: int, advice: str = RESUME):
        self.partial, self.final, self.size, self.advice = partial, final, size, advice
        self.preallocated = False
        self._descriptor = -1

    def create(self, header: bytes) -> None:
        """A new file of the full size, its header in place; it survives a power loss once its folder is synced."""
        with writing(self.partial, self.advice):
            self._descriptor = os.open(self.partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
            self.preallocated = _reserve(self._descriptor, self.size)
            write_at(self._descriptor, memoryview(header), 0)
            os.fsync(self._descriptor)

    def reopen(self, header: bytes) -> None:
        """Go on with a file left by an interrupted run, its header put back as planned.

        Raises ResumeError when it is not the file planned.
        """
        with writing(self.partial, self.advice):
            try:
                self._descriptor = os.open(self.partial, os.O_RDWR | getattr(os, "O_BINARY", 0))
            except FileNotFoundError:
                raise errors.ResumeError(
                    f"The partial file {printable(str(self.partial), 300)} is gone: delete its journal and convert from the "
                    f"start."
                ) from None
            size = os.fstat(self._descriptor).st_size
        if size != self.size:
            raise errors.ResumeError(
                f"The partial file {printable(str(self.partial), 300)} does not have the planned size of {self.size:,} bytes: "
                f"delete it and its journal, and convert from the start."
            )
        self.write(0, memoryview(header))

    def write(self, offset: int, data: memoryview) -> None:
        with writing(self.partial, self.advice):
            write_at(self._descriptor, data, offset)

    def read(self, offset: int, nbytes: int) -> bytes:
        with writing(self.partial, self.advice):
            return read_whole(self._descriptor, nbytes, offset)

    def sync(self) -> None:
        """Make all that was written so far survive a power loss."""
        with writing(self.partial, self.advice):
            _data_sync(self._descriptor)

    def publish(self, replace: bool) -> bool:
        """fsync, give the file its final name, fsync the folder. Raises OutputExistsError unless `replace`.

        Returns whether the filesystem can give a name without ever replacing another file.
        """
        with writing(self.partial, self.advice):
            os.fsync(self._descriptor)
        self.close()
        with writing(self.final, self.advice):
            if not replace:
                return rename_new(self.partial, self.final)
            repeated(os.replace, self.partial, self.final)
            sync_folder(self.final.parent)
        return True

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with writing(self.partial, self.advice):
                close(descriptor)

    def abandon(self) -> None:
        """Close on the way out of a failure, which is the one to be told."""
        with contextlib.suppress(errors.DestinationWriteError):
            self.close()


def rename_new(source: Path, target: Path) -> bool:
    """Rename without ever replacing: a hard link refuses an existing target atomically, a rename does not. Durable.

    Returns False where the filesystem has no hard links: there the look and the rename are two steps.
    """
    linked = True
    try:
        repeated(os.link, source, target)
    except FileExistsError:
        if not _same_file(source, target):  # else the link was made, and only its success went unheard
            raise _appeared(source, target) from None
    except OSError as error:
        # Filesystems without hard links say so, each in its own way.
        if error.errno not in UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV}:
            raise
        linked = False
    if not linked:
        if os.path.lexists(target):
            raise _appeared(source, target)
        repeated(os.rename, source, target)
        sync_folder(target.parent)
        return False
    sync_folder(target.parent)  # the new name must not be lost when the old one is
    repeated(os.unlink, source)
    return True


def _same_file(one: Path, other: Path) -> bool:
    """Whether two names are those of one file, itself and not by a symbolic link."""
    return os.path.samestat(os.lstat(one), os.lstat(other))


def _appeared(source: Path, target: Path) -> errors.OutputExistsError:
    return errors.OutputExistsError(
        f"{printable(str(target), 300)} appeared while the conversion ran; the complete result is kept as "
        f"{printable(source.name)}: move the other file away and use --resume, or --resume --force."
    )


def write_file(path: Path, parts: Iterable[bytes], run: str, advice: str = RESUME) -> None:
    """A file written from its beginning, complete or not there: beside its name, synced, renamed, the name durable.

    parts: its bytes in order; what they raise is raised, and the file is as it was. advice: as of a `PartialFile`.
    """
    partial = path.with_name(f".{path.name}.{run}.partial")
    with writing(path, advice):
        descriptor = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
        try:
            try:
                offset = 0
                for part in parts:
                    write_at(descriptor, memoryview(part), offset)
                    offset += len(part)
                os.fsync(descriptor)
            except BaseException:
                close_read(descriptor)
                raise
            close(descriptor)
            repeated(os.replace, partial, path)
        except BaseException:
            with contextlib.suppress(errors.DestinationWriteError):  # the first failure is the one to be told
                remove(partial)
            raise
        sync_folder(path.parent)


def _libc_function(name: str, *argument_types: type):
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = argument_types
    return function


# Not os.posix_fallocate: that lets glibc write a byte into every block where a filesystem cannot reserve.
_fallocate = _libc_function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _reserve(descriptor: int, size: int) -> bool:
    """Give the file its size, with its blocks reserved where the filesystem can. Returns whether they are."""
    if _fallocate is not None and size:
        while _fallocate(descriptor, 0, 0, size) != 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code not in UNSUPPORTED:
                raise OSError(code, os.strerror(code))
            break
        else:
            return True
    os.ftruncate(descriptor, size)
    return False


def _data_sync(descriptor: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)
