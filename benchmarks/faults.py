"""What a kill costs: conversions killed with SIGKILL at several moments, then gone on with until they are complete.

A moment is a share of the bytes that an uninterrupted run writes, so that it is known how much was done; of a converter that
starts again it is a share of its time. All numbers are against an uninterrupted run of the same round, the source evicted from
the page cache before every start, as after a crash.
"""

from __future__ import annotations

import filecmp
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks import ours, results
from benchmarks.cases import Case
from benchmarks.peers import CONVERT_TO_QUANT, PeerError
from benchmarks.process import environment
from benchmarks.race import Contender, lacking_room, shout
from benchmarks.results import OURS, SECONDS, Result
from benchmarks.sources import prepare

BENCHMARK = "faults"
UNINTERRUPTED = "uninterrupted"
METRICS = {
    SECONDS: "of an uninterrupted run; otherwise of the run that goes on after the kill, to its end",
    "recovery seconds": "what going on took beyond the uninterrupted run's time for what was left to write",
    "seconds lost": "both runs together, over the uninterrupted one",
    "share lost": "seconds lost over the seconds spent before the kill: 1 for a tool that starts again",
    "seconds to first write": "from the start of the run that goes on until it has written a MiB",
    "bytes written again": "by both runs together, over the uninterrupted one",
}
FIRST_WRITE_BYTES = 1 << 20
POLL_SECONDS = 0.002


class FaultError(Exception):
    """A run did not do what was expected of it."""


@dataclass(frozen=True)
class Run:
    """One process: its seconds, the bytes it wrote, and when it had written the first MiB, None if it never had."""

    seconds: float
    written: int
    first_write: float | None = None


@dataclass
class Rounds:
    """What was measured of one contender at one moment, by metric."""

    values: dict[str, list[float]] = field(default_factory=dict)
    output_bytes: int | None = None

    def add(self, **measured: float | None) -> None:
        """Keep one round's values; names are metrics with _ for spaces."""
        for name, value in measured.items():
            if value is not None:
                self.values.setdefault(name.replace("_", " "), []).append(value)


def written_bytes(process: int) -> int:
    """Bytes that `process` has handed to the system to write so far, 0 once it is gone."""
    try:
        text = Path(f"/proc/{process}/io").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("wchar")), 0)


def watch(command: Sequence[str], log: Path, stop: Callable[[int, float], bool] | None = None) -> Run:
    """Run `command` to its end, or until `stop(bytes written, seconds)` is true and it is killed.

    Raises FaultError when it fails, or ends before it could be killed.
    """
    with log.open("wb") as printed:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, env=environment(), start_new_session=True
        )
        first, written = None, 0
        try:
            # WNOWAIT: what has ended stays readable until it is waited for.
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                written, seconds = written_bytes(process.pid), time.perf_counter() - began
                if first is None and written >= FIRST_WRITE_BYTES:
                    first = seconds
                if stop is not None and stop(written, seconds):
                    os.killpg(process.pid, signal.SIGKILL)
                    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                    return Run(time.perf_counter() - began, max(written, written_bytes(process.pid)), first)
                time.sleep(POLL_SECONDS)
            written = max(written, written_bytes(process.pid))
            seconds = time.perf_counter() - began
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise FaultError(f"exit code {process.returncode} (see {log})")
    if stop is not None:
        raise FaultError("was done before it could be killed: take a larger file")
    return Run(seconds, written, first)


def run(
    cases: Sequence[Case],
    size: str,
    moments: Sequence[float],
    runs: int,
    workdir: Path,
    chill: Callable[[Path], str],
    console: Console,
    peer: bool = True,
    make_ours: Callable[[Case, str], Contender] = ours.contender,
    find_peer: Callable[[Case, Path], Contender] = CONVERT_TO_QUANT.contender,
    record: Callable[[Sequence[Result]], None] = results.append,
) -> list[Result]:
    """Kill and go on with every case at every moment, a share between 0 and 1; record the rows and return them.

    The peer, which starts again, is killed once, at the middle of the first case it has a format for.
    """
    scratch = workdir / "faults"
    scratch.mkdir(parents=True, exist_ok=True)
    checkpoint = prepare(workdir, size, console)
    rows: list[Result] = []
    to_do = [(case, OURS, moments, runs) for case in cases]
    with_peer = [case for case in cases if case.peer is not None][:1] if peer else []
    to_do += [(case, CONVERT_TO_QUANT.name, (0.5,), 1) for case in with_peer]
    for case, name, when, times in to_do:
        console.rule(f"{case.name}, {size}, {name}")
        found, cache, note = {}, "", ""
        try:
            goes_on = name == OURS
            contender = make_ours(case, "1GiB") if goes_on else find_peer(case, workdir)
            if reason := lacking_room(scratch, int(2.2 * checkpoint.stat().st_size * contender.output_share)):
                raise FaultError(reason)
            found, cache = _rounds(contender, checkpoint, scratch / case.name, when, times, chill, goes_on)
        except (FaultError, PeerError) as error:
            note = str(error)
            shout(console, f"{name} FAILED in {case.name}: {note}")
        case_rows = _rows(case.name, name, size, checkpoint, found, cache, note)
        record(case_rows)
        console.print(results.table(case_rows))
        rows += case_rows
    return rows


def _rounds(
    contender: Contender,
    checkpoint: Path,
    folder: Path,
    moments: Sequence[float],
    runs: int,
    chill: Callable[[Path], str],
    goes_on: bool,
) -> tuple[dict[str, Rounds], str]:
    """Round after round: an uninterrupted run, then a kill at each moment. Returned by moment, with the cache's state."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Rounds] = {UNINTERRUPTED: Rounds()}
    cache = ""
    for _ in range(runs):
        _clear(folder)
        whole, log = folder / "whole.safetensors", folder / "log.txt"
        cache = chill(checkpoint)
        full = watch(contender.command(checkpoint, whole), log)
        if not whole.exists():
            raise FaultError(f"no output file (see {log})")
        found[UNINTERRUPTED].add(seconds=full.seconds)
        found[UNINTERRUPTED].output_bytes = whole.stat().st_size
        for share in moments:
            killed = folder / "killed.safetensors"
            for left in folder.glob("*killed.safetensors*"):
                left.unlink()
            command = contender.command(checkpoint, killed)
            chill(checkpoint)
            before = watch(command, log, _reached(share * full.written) if goes_on else _after(share * full.seconds))
            chill(checkpoint)
            after = watch([*command, "--resume"] if goes_on else command, log)
            # The peer's files differ from run to run even without a kill.
            if goes_on and not filecmp.cmp(whole, killed, shallow=False):
                raise FaultError("the output of the run that went on differs from the uninterrupted one's")
            done = before.written / full.written if goes_on else before.seconds / full.seconds
            lost = before.seconds + after.seconds - full.seconds
            rounds = found.setdefault(f"killed at {share:.0%}", Rounds(output_bytes=killed.stat().st_size))
            rounds.add(
                seconds=after.seconds,
                recovery_seconds=after.seconds - (1 - done) * full.seconds,
                seconds_lost=lost,
                share_lost=lost / before.seconds,
                seconds_to_first_write=after.first_write,
                bytes_written_again=before.written + after.written - full.written,
            )
    _clear(folder)
    return found, cache


def _reached(written: float) -> Callable[[int, float], bool]:
    return lambda so_far, _: so_far >= written


def _after(limit: float) -> Callable[[int, float], bool]:
    return lambda _, seconds: seconds >= limit


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _rows(case: str, name: str, size: str, checkpoint: Path, found: dict[str, Rounds], cache: str, note: str) -> list[Result]:
    common = {"source": size, "size_bytes": checkpoint.stat().st_size, "cache": cache, "note": note}
    if note:
        return [results.result(BENCHMARK, case, name, (), **common)]
    return [
        results.result(BENCHMARK, case, name, values, metric=metric, detail=moment, output_bytes=rounds.output_bytes, **common)
        for moment, rounds in found.items()
        for metric, values in rounds.values.items()
    ]
