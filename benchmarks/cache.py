"""The page cache: a file that was just written is read from memory, and no disk is that fast.

What could be done is part of the result, in its `cache` column:

- `cold`: the whole system's cache was dropped, so programs and their libraries load from disk too.
- `cold file`: only the source was evicted; programs stay loaded. All that can be done without root.
- `warm`: nothing was done.
"""

from __future__ import annotations

import os
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def drop_everything(source: Path) -> str:
    """Drop the page cache of the whole system, or only `source`'s where that is not allowed."""
    os.sync()
    try:
        DROP_CACHES.write_text("1")
    except OSError:
        return drop_file(source)
    return "cold"


def drop_file(source: Path) -> str:
    """Evict the pages of `source`. Dirty pages cannot be evicted, hence the sync before."""
    descriptor = os.open(source, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return "cold file"


def keep(source: Path) -> str:
    """Leave the cache as it is."""
    del source
    return "warm"


CHILLS = {"system": drop_everything, "file": drop_file, "none": keep}
