"""Forgets what numba has kept of compiled functions when any source they are made of has changed.

numba looks at the one file that a function stands in. What the function calls, and the constants it was compiled with, stand
in other files too: after an update in place (`git pull`) it would go on running their old code.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from numba import njit

STAMP = "kernels.stamp"
SOURCES = Path(__file__).resolve().parent.parent


@njit(cache=True)
def _nothing():
    """Never called: it knows the folder where numba keeps the functions of this one."""


def forget_stale() -> None:
    """Remove numba's index files beside `STAMP` unless the sources are those that it was written for.

    Raises RuntimeError, as numba does, when there is no folder to keep compiled code in, and OSError.
    """
    kept, stamp = Path(_nothing.stats.cache_path), _stamp()
    with contextlib.suppress(FileNotFoundError):
        if (kept / STAMP).read_text() == stamp:
            return
    for index in kept.glob("*.nbi"):  # the code itself is written over when it is compiled again
        index.unlink(missing_ok=True)
    kept.mkdir(parents=True, exist_ok=True)
    temporary = kept / f"{STAMP}.{os.getpid()}"
    temporary.write_text(stamp)
    temporary.replace(kept / STAMP)


def _stamp() -> str:
    """A digest of names, sizes and times of all sources of kernels."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.py"), *SOURCES.glob("jit/*.py")]):
        found = path.stat()
        digest.update(f"{path.relative_to(SOURCES)}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()
