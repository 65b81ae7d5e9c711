"""The shim of `shim.c` as Python sees it: compiled, and its orders as a structure."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")

KINDS = (
    "open", "create", "opendir", "stat", "read", "mmap", "fadvise", "flock", "close", "write", "pwrite", "fsync",
    "fdatasync", "ftruncate", "fallocate", "rename", "link", "unlink",
)  # fmt: skip
HOW = ("fail", "late", "short", "end", "kill before", "kill after", "kill half")
FOLDERS = ("source", "destination")


class Orders(ctypes.Structure):
    """struct orders"""

    _fields_ = [
        ("armed", ctypes.c_int32),
        ("how", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("sticky", ctypes.c_int32),
        ("at", ctypes.c_int64),
        ("calls", ctypes.c_uint32 * 2),
        ("counted", ctypes.c_int64),
        ("struck", ctypes.c_int64),
        ("struck_kind", ctypes.c_int32),
        ("struck_folder", ctypes.c_int32),
        ("struck_path", ctypes.c_char * 512),
        ("log", ctypes.c_int32),
        ("folders", (ctypes.c_char * 1024) * 2),
        ("kinds", (ctypes.c_int64 * len(KINDS)) * 2),
    ]


def why_no_shim() -> str:
    """Why calls cannot be intercepted here, or ""."""
    if not sys.platform.startswith("linux"):
        return "needs Linux: calls are intercepted by LD_PRELOAD"
    if compiler() is None:
        return "needs a C compiler (cc, gcc or clang) to build tests/faults/shim.c"
    return ""


def compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build() -> Path:
    """The shim as a shared library, compiled once per content."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"streamquant-shim-{digest}.so"
    if not library.exists():
        with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so", delete=False) as made:
            command = [compiler(), "-shared", "-fPIC", "-O1", "-o", made.name, str(SOURCE), "-ldl", "-lpthread"]
            done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        Path(made.name).replace(library)
    return library


def the_orders() -> Orders:
    """The page that this process, started with the shim, shares with its children."""
    function = ctypes.CDLL(None).shim_orders
    function.restype = ctypes.POINTER(Orders)
    return function().contents
