"""A fault at the Nth call: which calls can fail how, and what must follow."""

from __future__ import annotations

import errno
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from faults.scenarios import Ordeal
from faults.server import Result
from faults.shim import KINDS

LOOKS = ("open", "opendir", "stat", "read", "mmap")
CHANGES = ("create", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "fallocate", "rename", "link", "unlink")
TAKES_ROOM = ("create", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "fallocate", "rename", "link", "close")
ROUGH = ("open", "create", "read", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "fallocate", "rename", "link",
         "unlink", "close", "flock")  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One way to fail: how, with which errno, of which calls in the source's and the destination's folder."""

    how: str
    error: int = 0
    source: tuple[str, ...] = ()
    destination: tuple[str, ...] = ()
    sticky: bool = False
    survived: bool = False  # the conversion must not even notice

    def orders(self, at: int) -> dict:
        calls = {"source": self.source, "destination": self.destination}
        return {"at": at, "how": self.how, "error": self.error, "sticky": self.sticky, "calls": calls}


FAULTS = {
    "ENOSPC": Fault("fail", errno.ENOSPC, destination=TAKES_ROOM),
    "ENOSPC from then on": Fault("fail", errno.ENOSPC, destination=TAKES_ROOM, sticky=True),
    "EDQUOT": Fault("fail", errno.EDQUOT, destination=TAKES_ROOM),
    "EFBIG": Fault("fail", errno.EFBIG, destination=("write", "pwrite", "ftruncate", "fallocate")),
    "EROFS": Fault("fail", errno.EROFS, destination=CHANGES),
    "EROFS from then on": Fault("fail", errno.EROFS, destination=CHANGES, sticky=True),
    "EIO": Fault("fail", errno.EIO, source=KINDS, destination=KINDS),
    "EIO from then on": Fault("fail", errno.EIO, destination=KINDS, sticky=True),
    "EIO, though it was done": Fault("late", errno.EIO, destination=("create", "fsync", "rename", "link", "unlink", "close")),
    "ESTALE": Fault("fail", errno.ESTALE, source=LOOKS, destination=(*LOOKS, *CHANGES)),
    "EMFILE": Fault("fail", errno.EMFILE, source=("open", "opendir"), destination=("open", "create", "opendir")),
    "ENOMEM": Fault("fail", errno.ENOMEM, source=("open", "mmap"), destination=("open", "create", "link", "rename")),
    "the source ends": Fault("end", source=("read",)),
    "EINTR": Fault("fail", errno.EINTR, source=ROUGH, destination=ROUGH, survived=True),
    "short": Fault("short", source=("read",), destination=("read", "write", "pwrite"), survived=True),
    "no advice": Fault("fail", errno.EINVAL, source=("fadvise",), survived=True),
}


def struck_calls(ordeal: Ordeal, name: str) -> int:
    """How many calls of an untouched run a fault can strike."""
    fault = FAULTS[name]
    chosen = {"source": fault.source, "destination": fault.destination}
    return sum(count for folder, kinds in ordeal.kinds.items() for kind, count in kinds.items() if kind in chosen[folder])


def survive(ordeal: Ordeal, name: str, at: int) -> bool:
    """One attack and its resume. Returns whether there was an Nth call to strike."""
    fault = FAULTS[name]
    folder = ordeal.make(f"{name}, {at}".replace(" ", "-"))
    result = ordeal.run(folder, *ordeal.begin(folder), orders=fault.orders(at))
    trail = f"{ordeal.name}: {name} at call {at} ({result.kind} in the {result.folder}, {result.path})\n{result.err}"
    ordeal.check_names(folder, trail)
    excused = fault.survived or (_courtesy(ordeal, folder, result) and not (fault.sticky and result.exit))
    if result.struck and not excused:
        _check_told(fault, result, trail)
        resumed = _go_on(ordeal, folder, result)
        trail += f"resumed: {resumed.err}"
        assert resumed.exit == 0, trail
    else:
        assert result.exit == 0, trail
    ordeal.check_done(folder, trail)
    shutil.rmtree(folder)
    return result.struck > 0


def _courtesy(ordeal: Ordeal, folder: Path, result: Result) -> bool:
    """Calls whose failure is of no consequence: what was read is read; and Python's own looks at what it opens."""
    read = result.folder == "source" or result.path == str(folder)
    read |= ordeal.scenario.begun and result.path.endswith(".journal") and result.exit == 0  # a resume reads it first
    return result.kind == "fadvise" or (result.kind == "close" and read) or (result.kind in LOOKS and result.exit == 0)


def _check_told(fault: Fault, result: Result, trail: str) -> None:
    """The exit code says whose fault it was, and one sentence what happened."""
    if result.folder == "source":
        # A file that ends too early, a header cut short: then the source itself is unsound.
        allowed = {6, 5, 10} if fault.how == "end" else {6, 10}
    else:
        allowed = {7, 4} if result.kind in LOOKS else {7}
    assert result.exit in allowed, trail
    assert "Traceback" not in result.err, trail
    said = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].endswith("."), trail
    assert not re.search(r"\bNone\b|Errno|\bErrno\b", said[0]), trail


def _go_on(ordeal: Ordeal, folder, result: Result) -> Result:
    """Run the command that was printed; where none was, the same one with --resume."""
    printed = [line for line in result.err.splitlines() if line.startswith("go on with: ")]
    if not printed:
        return ordeal.run(folder, "--resume")
    words = shlex.split(printed[0].removeprefix("go on with: "))
    assert words == ["streamquant", *ordeal.arguments(folder, "--resume")], printed
    return ordeal.run(folder, "--resume")
