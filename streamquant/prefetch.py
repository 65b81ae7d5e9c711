"""Asks the system to read ahead of the work, in the order of the work, by a bounded distance."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

DISTANCE = 1 << 30  # page cache, not memory of ours: the system takes it back whenever it likes
STEP = 512 << 10  # one request; systems cut longer ones silently to what the disk takes at once


class Prefetcher:
    """A thread that keeps the page cache `DISTANCE` bytes ahead of `advance`. Where the system cannot, it does nothing.

    ranges: (descriptor, offset, bytes) in the order in which they will first be read.
    """

    def __init__(self, ranges: Sequence[tuple[int, int, int]]):
        self._ranges = ranges
        self._consumed = 0
        self._stopped = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        if hasattr(os, "posix_fadvise"):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    def advance(self, nbytes: int) -> None:
        """The work has taken `nbytes` more of the ranges."""
        with self._condition:
            self._consumed += nbytes
            self._condition.notify()

    def _run(self) -> None:
        requested = 0
        for descriptor, start, length in self._ranges:
            for offset in range(start, start + length, STEP):
                count = min(STEP, start + length - offset)
                with self._condition:
                    while not self._stopped and requested - self._consumed >= DISTANCE:
                        self._condition.wait()
                    if self._stopped:
                        return
                    behind = requested + count <= self._consumed  # done by an earlier run
                requested += count
                if behind:
                    continue
                try:
                    os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_WILLNEED)
                except OSError:
                    return  # reading ahead is a courtesy; the read itself reports what is wrong
