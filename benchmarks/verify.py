"""`streamquant verify` against the roofline of what it must do: read both files once and hash the output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks import ours, results
from benchmarks.cases import Case
from benchmarks.process import Measurement, measure
from benchmarks.race import shout
from benchmarks.results import OURS, Result
from benchmarks.sources import prepare

BENCHMARK = "verify"
ROOFLINE = "read both and xxh3"
# Two threads, one file each, as verify has two: the source is only read, the output is hashed.
READ = """
import sys, threading, xxhash
def go(path, hashed):
    hasher, buffer = xxhash.xxh3_64(), bytearray(8 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(memoryview(buffer)[:count]) if hashed else max(memoryview(buffer)[:count:4096])
threads = [threading.Thread(target=go, args=part) for part in ((sys.argv[1], False), (sys.argv[2], True))]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


class Failed(Exception):
    """A command that did not end well."""


def run(
    cases: Sequence[Case],
    size: str,
    runs: int,
    sample: str | None,
    workdir: Path,
    console: Console,
    record: Callable[[Sequence[Result]], None] = results.append,
) -> list[Result]:
    """Convert once a case, then verify and read in turn, `runs` times each, with the cache warm. Rows are recorded as soon as
    they are there; a note gives the processor's seconds (user and system) for a GB of source, which a busy machine disturbs
    less than it disturbs the wall clock.
    """
    source = prepare(workdir, size, console)
    gigabytes = source.stat().st_size / 1e9
    rows: list[Result] = []
    for case in cases:
        output = workdir / "out" / f"verify-{case.name}.safetensors"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)
        log = workdir / "out" / "verify.log"
        commands = {
            ROOFLINE: [sys.executable, "-c", READ, str(source), str(output)],
            OURS: [sys.executable, "-m", "streamquant", "verify", str(source), str(output), "--quiet"],
        }
        if sample:
            commands[f"{OURS} --sample {sample}"] = [*commands[OURS], "--sample", sample]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        spent: dict[str, list[float]] = {name: [] for name in commands}
        peaks: dict[str, int] = dict.fromkeys(commands, 0)
        failure = ""
        try:
            _checked(ours.contender(case, "1GiB").command(source, output), log)
            for _ in range(runs):
                for name, command in commands.items():
                    before = _processor_seconds()
                    found = _checked(command, log)
                    seconds[name].append(found.seconds)
                    spent[name].append(_processor_seconds() - before)
                    peaks[name] = max(peaks[name], found.peak_anonymous_bytes)
        except Failed as error:
            failure = str(error)
            shout(console, f"{case.name} FAILED: {failure}")
        made = [
            results.result(
                BENCHMARK,
                f"{case.name} {size}",
                name,
                [] if failure else seconds[name],
                size_bytes=source.stat().st_size,
                output_bytes=output.stat().st_size if output.exists() else None,
                ratio_to=None if name == ROOFLINE else (ROOFLINE, seconds[ROOFLINE]),
                peak_anonymous_bytes=peaks[name] or None,
                note=failure or f"{min(spent[name]) / gigabytes:.2f} processor seconds a GB of source, start-up included",
            )
            for name in commands
        ]
        output.unlink(missing_ok=True)
        record(made)
        rows += made
        console.print(results.table(made))
    return rows


def _checked(command: list[str], log: Path) -> Measurement:
    found = measure(command, log)
    if found.exit_code:
        raise Failed(f"exit code {found.exit_code}: {log.read_text(errors='replace').strip()[-200:]}")
    return found


def _processor_seconds() -> float:
    """User and system time of all children that ended."""
    times = psutil.Process().cpu_times()
    return times.children_user + times.children_system
