"""Calls that change files: repeated when a signal interrupts them, their failures told in one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamquant import errors
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.positioned import close_read

UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}  # what a filesystem says that cannot do it
RESUME = "what was written is kept, mend the cause and go on with --resume"


class writing:
    """Turns an OSError into a DestinationWriteError that names the file and what to do, in the words of `advice`."""

    def __init__(self, path: Path, advice: str = RESUME):
        self.path, self.advice = path, advice

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            where = printable(str(self.path), 300)
            raise errors.DestinationWriteError(
                f"Writing {where} failed: {error.strerror or error}; {self.advice}."
            ) from None


def repeated(call: Callable[..., Any], *arguments: Any) -> Any:
    """The call's result, made again for as long as a signal interrupts it: Python itself repeats some calls, not all."""
    while True:
        try:
            return call(*arguments)
        except InterruptedError:
            continue


def close(descriptor: int) -> None:
    """Close what was written to. Raises OSError; not for an interruption, after which the descriptor is gone all the same."""
    with contextlib.suppress(InterruptedError):
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, if it is there. Raises DestinationWriteError."""
    with writing(path), contextlib.suppress(FileNotFoundError):
        repeated(os.unlink, path)


def sync_folder(folder: Path) -> bool:
    """Make the names in a folder durable. Returns False where the system cannot (as Windows, some network drives).

    Raises OSError.
    """
    if os.name != "posix":
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    finally:
        close_read(descriptor)
    return True
