"""Read-only mappings of files that may be truncated, or fail, while they are read.

Touching a mapped page that the file has no longer, or that the disk does not give, raises SIGBUS, which kills the process.
While a mapping is open, a native handler (compiled by numba: no Python runs in it) puts a page of zeros where the fault
was and marks the mapping as damaged. Whoever has read from it asks `damaged` before he believes what he read. Faults
elsewhere are not ours: the handler then restores what was there before it and lets the fault happen again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import mmap
import platform
import signal
import struct
import sys
import threading
import weakref

import numpy as np

SLOTS = 1024  # mappings that can be open at once
SA_SIGINFO, SA_ONSTACK = 4, 0x08000000
ADDRESS = 2  # of the fault, in siginfo_t, counted in 8 bytes
MAP_FIXED = 0x10

_lock = threading.RLock()  # the collector may unguard a mapping while its thread guards another
# begin, end (0 where the slot is free), whether damaged. One page of memory that the handler reads without a lock.
_table = np.zeros((SLOTS, 3), dtype=np.int64)
_handler = None  # kept alive for ever: the kernel holds its address
_open = 0
_previous = None


def why_no_mapping() -> str:
    """Why files are not mapped here, or ""."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "aarch64"):
        return "a file that is truncated while it is mapped would kill the process on this system"
    if importlib.util.find_spec("numba") is None:
        return "a file that is truncated while it is mapped would kill the process without numba"
    return ""


class Mapping:
    """One file mapped for reading, guarded. Raises OSError when it cannot be mapped."""

    def __init__(self, descriptor: int, size: int):
        self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        self.view = memoryview(self._map)
        begin = np.frombuffer(self._map, dtype=np.uint8).ctypes.data
        self._slot = _guard(begin, begin + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._unguard = weakref.finalize(self._map, _unguard, self._slot)
        self._unguard.atexit = False

    @property
    def damaged(self) -> bool:
        """Whether a page could not be read: what was read from it since is not to be believed."""
        return bool(_table[self._slot, 2])

    def release(self, begin: int, end: int) -> None:
        """Give back the pages that lie wholly in bytes [begin, end): they stay in the page cache."""
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (end - first) // mmap.PAGESIZE * mmap.PAGESIZE
        # Not once it is damaged: a page of zeros given back would be followed by another.
        if length > 0 and not self.damaged:
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Unmap. Where a failed piece of work still holds a view, the mapping and its guard go with the last of them."""
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()
            self._unguard()


def _guard(begin: int, end: int) -> int:
    global _handler, _open, _previous
    with _lock:
        if _handler is None:
            _handler, _previous = _compile()
        free = np.flatnonzero(_table[:, 1] == 0)
        if not free.size:
            raise OSError(errno.EMFILE, "too many files are mapped at once")
        slot = int(free[0])
        _table[slot] = begin, 0, 0
        _table[slot, 1] = end
        _open += 1
        if _open == 1:
            _exchange(_action(_handler.address), _previous)
        return slot


def _unguard(slot: int) -> None:
    global _open
    with _lock:
        _table[slot, 1] = 0
        _open -= 1
        if _open:
            return
        ours = ctypes.create_string_buffer(len(_previous))
        _exchange(None, ours)
        # Another handler that was put over ours since may call it: then ours stays, and hands on all that it is given.
        if struct.unpack_from("P", ours)[0] == _handler.address:
            _exchange(_previous, None)


def _action(address: int) -> ctypes.Array:
    """struct sigaction of Linux' C libraries: the handler, a mask of 128 bytes, the flags, a restorer."""
    return ctypes.create_string_buffer(struct.pack("P128xi4xP", address, SA_SIGINFO | SA_ONSTACK, 0))


def _exchange(new: ctypes.Array | None, old: ctypes.Array | None) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.sigaction(int(signal.SIGBUS), new, old):
        raise OSError(ctypes.get_errno(), "the handler of SIGBUS cannot be set")


def _compile():
    """The handler, and where it finds the disposition before it."""
    import numba
    from numba import types
    from numba.extending import intrinsic

    library = ctypes.CDLL(None)
    map_page, exchange = library.mmap, library.sigaction
    map_page.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    map_page.restype = ctypes.c_int64
    exchange.argtypes, exchange.restype = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64], ctypes.c_int
    previous = _action(0)
    table, before = _table.ctypes.data, ctypes.addressof(previous)
    slots, page, number = SLOTS, mmap.PAGESIZE, int(signal.SIGBUS)
    protection, flags = mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    integers = types.CPointer(types.int64)

    @intrinsic
    def pointer(context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(integers))

        return integers(types.int64), generate

    @numba.cfunc(types.void(types.int32, integers, types.intp), nopython=True)
    def handle(_, information, __):
        address = information[ADDRESS]
        entries = pointer(table)
        for slot in range(slots):
            if entries[3 * slot] <= address < entries[3 * slot + 1]:
                entries[3 * slot + 2] = 1
                if map_page(address & -page, page, protection, flags, -1, 0) != -1:
                    return
        exchange(number, before, 0)

    return handle, previous
