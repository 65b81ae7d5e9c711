"""Runs the command line again and again in forked children, each under orders of the shim; milliseconds a run.

Started with the shim preloaded, it reads one job per line from its standard input (JSON) and writes one result per line.
A job is {"arguments": of the command line, "source", "destination": folders whose calls count, "tile_bytes",
"sync_bytes", "orders": {...} or null, "log": a file for the changes or null}; orders are {"at", "how", "error", "sticky",
"calls": {folder: [kinds]}}. With "warm_up" it runs in the server itself, so that children find everything compiled.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAULTS = Path(__file__).resolve().parent
REPOSITORY = FAULTS.parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(FAULTS.parent), str(REPOSITORY)]

from faults import shim  # noqa: E402


@dataclass
class Result:
    """How one run of the command line ended. exit: its code; None when it was killed. struck: what the shim did to."""

    exit: int | None
    signal: int
    out: str
    err: str
    counted: int
    struck: int
    kind: str
    folder: str
    path: str
    kinds: dict[str, dict[str, int]] = field(repr=False)

    @property
    def killed(self) -> bool:
        return self.signal == signal.SIGKILL


def command_line(job: dict[str, Any]) -> int:
    """Run `streamquant` with these arguments, as the shell would, and return its exit code."""
    from streamquant import budget, pour
    from streamquant.cli import main

    budget.TARGET_TILE_BYTES, pour.SYNC_BYTES = job["tile_bytes"], job["sync_bytes"]
    sys.argv = ["streamquant", *job["arguments"]]
    try:
        main(prog_name="streamquant")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def give(orders: shim.Orders, job: dict[str, Any], log: int) -> None:
    """Fill the shared page with a job's orders."""
    wanted = job["orders"] or {}
    orders.armed, orders.log = 0, log
    orders.at, orders.error = wanted.get("at", 0), wanted.get("error", 0)
    orders.how, orders.sticky = shim.HOW.index(wanted.get("how", "fail")), wanted.get("sticky", False)
    orders.counted = orders.struck = 0
    orders.struck_path = b""
    for number, folder in enumerate(shim.FOLDERS):
        orders.folders[number].value = os.fsencode(job[folder])
        kinds = wanted.get("calls", {}).get(folder, [])
        orders.calls[number] = sum(1 << shim.KINDS.index(kind) for kind in kinds)
        for kind in range(len(shim.KINDS)):
            orders.kinds[number][kind] = 0


def run_job(job: dict[str, Any], orders: shim.Orders) -> dict[str, Any]:
    out, err = os.memfd_create("out"), os.memfd_create("err")
    log = os.open(job["log"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND) if job.get("log") else -1
    give(orders, job, log)
    child = os.fork()
    if child == 0:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin.close()
        orders.armed = 1
        code = command_line(job)
        orders.armed = 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    orders.armed = 0
    kinds = {
        folder: {kind: orders.kinds[n][k] for k, kind in enumerate(shim.KINDS) if orders.kinds[n][k]}
        for n, folder in enumerate(shim.FOLDERS)
    }
    result = Result(
        os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        *(os.pread(descriptor, 1 << 20, 0).decode() for descriptor in (out, err)),
        orders.counted,
        orders.struck,
        shim.KINDS[orders.struck_kind] if orders.struck else "",
        shim.FOLDERS[orders.struck_folder] if orders.struck else "",
        os.fsdecode(orders.struck_path),
        kinds,
    )
    for descriptor in (out, err, *([log] if log >= 0 else [])):
        os.close(descriptor)
    return vars(result)


def serve() -> None:
    orders = shim.the_orders()
    for line in sys.stdin:
        job = json.loads(line)
        if job.get("warm_up"):
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
                code = command_line(job)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            answer = {"exit": code, "err": err.getvalue()}
        else:
            answer = run_job(job, orders)
        print(json.dumps(answer), file=sys.__stdout__, flush=True)


class Server:
    """The server as a test sees it."""

    def __init__(self) -> None:
        environment = os.environ | {"LD_PRELOAD": str(shim.build()), "COLUMNS": "200", "PYTHONUTF8": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
            env=environment, encoding="utf-8",
        )  # fmt: skip

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the server broke down"
        return json.loads(answer)

    def run(self, **job: Any) -> Result:
        return Result(**self._ask({"orders": None} | job))

    def warm_up(self, **job: Any) -> None:
        answer = self._ask(job | {"warm_up": True})
        assert answer["exit"] == 0, answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    serve()
