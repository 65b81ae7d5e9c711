"""Commands run as subprocesses: how long they take, and how much anonymous memory they and their children hold.

Anonymous memory is what a process cannot give back: its heap, not the file pages it has mapped, which the kernel drops
when memory is short. Resident size counts both and so says little of a program that maps a checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.01
_KERNEL_LISTS_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children").exists()


@dataclass(frozen=True)
class Measurement:
    """What a command took, with its output to read up on in `log`."""

    seconds: float
    exit_code: int
    peak_anonymous_bytes: int
    log: Path


def measure(command: Sequence[str], log: Path, output: Path | None = None) -> Measurement:
    """Run `command` to its end, what it prints going to the file `log`.

    The time includes making the file `output` durable, where the command has made it: a contender that leaves that to
    the kernel must not look faster than one that does not. The exit code is 127 when there is no such program, as in a
    shell.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as printed:
        began = time.perf_counter()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, env=environment(), start_new_session=True
            )
        except OSError as error:
            printed.write(f"{error}\n".encode())
            return Measurement(0.0, 127, 0, log)
        peak = _watch(process)
        if output is not None and output.exists():
            _make_durable(output)
        return Measurement(time.perf_counter() - began, process.returncode, peak, log)


def environment() -> dict[str, str]:
    """Of a program that is measured. Whoever installs one keeps its bytecode: else compiling every module would be measured."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Wait for `process` to end; return the peak of its anonymous memory."""
    sampler = Sampler(process.pid)
    sampler.start()
    try:
        process.wait()
    finally:
        peak = sampler.stop()
        if process.poll() is None:
            # Interrupted: a converter left running would spoil whatever is measured next.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return peak


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Sampler(threading.Thread):
    """Watches the anonymous memory of a process and its children until stopped."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._peak = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            self._peak = max(self._peak, sum(anonymous_bytes(one) for one in family(self._process)))
            self._stopped.wait(SAMPLE_SECONDS)

    def stop(self) -> int:
        """Stop watching and return the highest sum seen."""
        self._stopped.set()
        self.join()
        return self._peak


def anonymous_bytes(process: int) -> int:
    """Return the anonymous memory that `process` holds, 0 once it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_bytes()
    except OSError:
        return 0
    _, found, rest = status.partition(b"RssAnon:")
    return int(rest.split(maxsplit=1)[0]) * 1024 if found else 0


def family(process: int) -> Iterator[int]:
    """Yield `process` and all its descendants.

    The kernel's own list of children is asked for where there is one: psutil looks at every process of the machine,
    which every few milliseconds would slow down what is being measured.
    """
    yield process
    if not _KERNEL_LISTS_CHILDREN:
        try:
            yield from (child.pid for child in psutil.Process(process).children(recursive=True))
        except psutil.NoSuchProcess:
            pass
        return
    for child in _children(process):
        yield from family(child)


def _children(process: int) -> Iterator[int]:
    """Yield the children that any thread of `process` started; processes and threads may end at any moment."""
    try:
        threads = os.listdir(f"/proc/{process}/task")
    except OSError:
        return
    for thread in threads:
        try:
            children = Path(f"/proc/{process}/task/{thread}/children").read_text()
        except OSError:
            continue
        yield from map(int, children.split())
