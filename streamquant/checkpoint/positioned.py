"""Reading and writing at an offset, whole: the calls may do less than asked, and some systems lack them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import BinaryIO

_lock = threading.Lock()  # where there is no positioned call, seek and transfer must not be interleaved


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` (bytes) from `offset`; returns how many bytes there were. Raises OSError."""
    done = 0
    while done < len(buffer):
        count = _read_some(descriptor, buffer[done:], offset + done)
        if count == 0:
            break
        done += count
    return done


def read_whole(descriptor: int, nbytes: int, offset: int = 0) -> bytes:
    """Bytes from `offset`; fewer than asked for where the file ends. Raises OSError."""
    buffer = bytearray(nbytes)
    return bytes(buffer[: read_at(descriptor, memoryview(buffer), offset)])


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to be read, closed as `close_read` does. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        close_read(descriptor)


def close_read(descriptor: int) -> None:
    """Close what was only read: whatever that says, all was read."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` (bytes) at `offset`. Raises OSError."""
    done = 0
    while done < len(data):
        done += _write_some(descriptor, data[done:], offset + done)


def _read_some(descriptor: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    with _lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def _write_some(descriptor: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)
