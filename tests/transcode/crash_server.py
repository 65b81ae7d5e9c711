"""Converts in child processes that kill themselves at a chosen system call, as `kill -9` or a power cut would.

Run as a program, it reads one job per line from its standard input (JSON), forks, and writes one result per line. The
parent has imported and compiled everything, so that a crash costs milliseconds and hundreds of them can be had.

A job is {"source", "destination", "recipe" (a name of EVERY_FORMAT), "options", "tile_bytes", "sync_bytes", "crash"};
the crash {"at": n, "how": "before" | "after" | "half", "power": seed | null} strikes at the n-th call that changes the
disk. With `power` the child also undoes what no fsync has made durable: page by page, or not, by chance.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
PAGE = 64  # much smaller than a real one: the files here are small
CALLS = ("open", "write", "pwrite", "fsync", "fdatasync", "link", "unlink", "replace", "rename", "ftruncate")


class Disk:
    """Stands between the process and the disk: counts the calls that change it, strikes, knows what is durable."""

    def __init__(self, folder: Path, crash: dict[str, Any] | None):
        self.folder, self.crash = folder, crash
        self.calls = 0
        # inode -> content when it was last synced. A process that dies leaves this to the next, as a disk does.
        self.legacy = folder.with_suffix(".durable")
        self.durable, self.unsynced_names = self._contents(), set()
        if self.legacy.exists():
            self.durable, self.unsynced_names = pickle.loads(self.legacy.read_bytes())
        self.lock = threading.RLock()
        self.real = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self._watched(name))

    def _watched(self, name: str):
        real = self.real[name]

        def call(*arguments: Any, **keywords: Any) -> Any:
            changes = name != "open" or arguments[1] & os.O_CREAT
            if not changes:
                return real(*arguments, **keywords)
            with self.lock:
                self.calls += 1
                strikes = self.crash is not None and self.calls == self.crash["at"]
                if strikes and self.crash["how"] == "before":
                    self._die()
                if strikes and self.crash["how"] == "half" and name in ("write", "pwrite"):
                    arguments = (arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], *arguments[2:])
                result = real(*arguments, **keywords)
                self._note(name, arguments, result)
                if strikes:
                    self._die()
                return result

        return call

    def _note(self, name: str, arguments: tuple, result: Any) -> None:
        if name in ("fsync", "fdatasync"):
            status = os.fstat(arguments[0])
            if stat.S_ISDIR(status.st_mode):
                self.unsynced_names.clear()
            else:
                self.durable[status.st_ino] = Path(f"/proc/self/fd/{arguments[0]}").read_bytes()
        elif name == "open":
            self.unsynced_names.add(os.path.basename(arguments[0]))

    def _files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_file()]

    def _contents(self) -> dict[int, bytes]:
        return {path.stat().st_ino: path.read_bytes() for path in self._files()}

    def _die(self) -> None:
        if self.crash["power"] is not None:
            self._cut_power(random.Random(self.crash["power"]))
            self.durable, self.unsynced_names = self._contents(), set()
        self.legacy.write_bytes(pickle.dumps((self.durable, self.unsynced_names)))
        os.kill(os.getpid(), signal.SIGKILL)

    def _cut_power(self, dice: random.Random) -> None:
        for path in self._files():
            if path.name in self.unsynced_names and dice.random() < 0.5:
                self.real["unlink"](path)
                continue
            now = path.read_bytes()
            durable = self.durable.get(path.stat().st_ino, b"")
            size = dice.choice([len(now), len(durable)])
            parts = [
                (now if dice.random() < 0.5 else durable)[at : at + PAGE].ljust(PAGE, b"\0")
                for at in range(0, size, PAGE)
            ]
            with open(path, "r+b") as file:  # in place: a hard link must go on being one
                file.write(b"".join(parts)[:size])
                file.truncate(size)


def convert(job: dict[str, Any], disk: Disk | None = None) -> dict[str, Any]:
    """Run one job to its end or its crash."""
    from small_checkpoints import EVERY_FORMAT

    from streamquant import budget, errors, options, pour, transcode

    budget.TARGET_TILE_BYTES = job["tile_bytes"]
    pour.SYNC_BYTES = job["sync_bytes"]
    notes = []
    observer = options.Silent()
    observer.note = notes.append
    try:
        report = transcode.convert(
            job["source"], job["destination"], EVERY_FORMAT[job["recipe"]], observer=observer, **job["options"]
        )
    except errors.StreamquantError as error:
        return {"error": f"{type(error).__name__}: {error}", "calls": disk.calls if disk else 0, "notes": notes}
    return {"error": None, "calls": disk.calls if disk else 0, "notes": notes, "resumed": report.resumed}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Fork, run, and say how it ended; a child that was killed gives {"killed": true}."""
    outgoing, incoming = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(outgoing)
        try:
            result = convert(job, disk := Disk(Path(job["destination"]).parent, job["crash"]))
            disk.real["write"](incoming, json.dumps(result).encode())
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    os.close(incoming)
    with os.fdopen(outgoing, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"killed": True}
    return json.loads(answer) | {"killed": False} if answer else {"killed": False, "error": "the child broke down"}


def serve() -> None:
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    for line in sys.stdin:
        job = json.loads(line)
        result = convert(job) if job.pop("warm_up", False) else run_job(job)
        print(json.dumps(result), flush=True)


class CrashServer:
    """The server as a test sees it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent
        )

    def run(self, **job: Any) -> dict[str, Any]:
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    serve()
