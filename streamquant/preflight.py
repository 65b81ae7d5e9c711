"""Refuses at once, before anything is read or written, what cannot succeed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal

from streamquant import errors
from streamquant.checkpoint.header import printable
from streamquant.kernels import why_no_jit
from streamquant.output_file import PlannedOutput

JOURNAL_ALLOWANCE = 16 << 20  # the journal and the shard index are small; leave them room


def resolve_device(device: str) -> str:
    """"auto", "cpu", "cuda" or "cuda:N" -> the device that will compute.

    Rounding to nearest is bound by the disk on any machine, so "auto" takes the compiled CPU path where it runs, which
    starts without torch; else a CUDA device if torch sees one. Raises DeviceError for a device that is not here.
    """
    if device == "cpu" or (device == "auto" and why_no_jit() is None):
        return "cpu"
    if device != "auto" and device != "cuda" and not (device.startswith("cuda:") and device[5:].isdigit()):
        raise errors.UsageError(f"There is no device {device!r}: take auto, cpu, cuda or cuda:N.")
    if importlib.util.find_spec("torch") is None:
        raise errors.DeviceError("torch is not installed, which this device needs: pip install torch.")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda:0" if count else "cpu"
    number = int(device[5:] or 0) if ":" in device else 0
    if number >= count:
        seen = f"only {count} of them" if count else "none (is this torch a CPU build?)"
        raise errors.DeviceError(f"There is no CUDA device {number}: torch sees {seen}; use --device cpu.")
    return f"cuda:{number}"


def is_compiled(kernels: str = "*") -> bool:
    """Whether numba has kept any kernel (or one of a module of them) from an earlier run, for these very sources; numba is
    here."""
    from streamquant.kernels.jit import absmax

    return any(Path(absmax.group_absmax.stats.cache_path).glob(f"{kernels}.*.nbi"))


def device_class(device: str) -> str:
    """What two devices must share to give equal bytes: "cpu", or CUDA with its compute capability."""
    if device == "cpu":
        return "cpu"
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda sm_{major}{minor}"


@contextmanager
def _looking_at(folder: Path) -> Iterator[None]:
    """Turns an OSError into a PreflightError."""
    try:
        yield
    except OSError as error:
        raise errors.PreflightError(
            f"Looking at {printable(str(folder), 300)} failed: {error.strerror or error}; mend the cause, or choose another "
            f"folder with -o."
        ) from None


def check_destination(plan: PlannedOutput, destination: Path, force: bool) -> None:
    """Raises a PreflightError when the destination's folder is absent, or a final name is taken or is the source."""
    with _looking_at(destination.parent):
        _check_destination(plan, destination, force)


def _check_destination(plan: PlannedOutput, destination: Path, force: bool) -> None:
    folder = destination.parent
    if not os.path.isdir(folder):
        raise errors.PreflightError(f"The folder {printable(str(folder), 300)} does not exist: create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise errors.PreflightError(f"The folder {printable(str(folder), 300)} cannot be written to: choose another.")
    names = [file.name for file in plan.files] + ([plan.index_name] if plan.index_name else [])
    for name in names:
        target = folder / name
        if not os.path.lexists(target):
            continue
        if target.is_dir():
            raise errors.PreflightError(f"{printable(str(target), 300)} is a folder: give a file name.")
        sources = [file.path for file in plan.checkpoint.files] + [plan.checkpoint.path]
        if target.exists() and any(_same_file(target, source) for source in sources):
            raise errors.OutputIsInputError(
                f"The output {printable(str(target), 300)} is the source itself: give another name with -o."
            )
        if not force:
            raise errors.OutputExistsError(
                f"The output {printable(str(target), 300)} exists: --force replaces it when the new one is complete."
            )


def _same_file(target: Path, source: Path) -> bool:
    """Whether two paths lead to one file. Raises SourceReadError when the source cannot be looked at."""
    try:
        status = os.stat(source)
    except OSError as error:
        raise errors.SourceReadError(f"Cannot read {printable(str(source), 300)}: {error.strerror}.") from None
    return os.path.samestat(os.stat(target), status)


def check_disk(plan: PlannedOutput, folder: Path) -> None:
    """Raises DiskSpaceError when the planned files do not fit."""
    needed = plan.output_size + JOURNAL_ALLOWANCE
    free = free_disk(folder)
    if needed > free:
        raise errors.DiskSpaceError(
            f"The output needs {decimal(needed)} and {printable(str(folder), 300)} has {decimal(free)} free: make room, or "
            f"choose another disk with -o."
        )


def free_disk(folder: Path) -> int:
    """Bytes a new file may take on the disk of `folder`."""
    with _looking_at(folder):
        return shutil.disk_usage(folder).free
