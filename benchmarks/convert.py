"""Whole conversions against `cp` and against the peer: wall time, memory, and the ratio to copying the file.

`cp` followed by an fsync is the floor: a conversion reads the same bytes and writes fewer. All contenders of a case run
alternately in one session, from a source that is not in the page cache to an output that is on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks import ours, peers, results
from benchmarks.cases import Case
from benchmarks.peers import CONVERT_TO_QUANT
from benchmarks.race import Contender, Outcome, race
from benchmarks.results import Result
from benchmarks.sources import SPARSE, prepare
from benchmarks.units import parse_size

BENCHMARK = "convert"
PEER_RUNS = 1


@dataclass(frozen=True)
class Settings:
    """What a session of conversions is to do, as its flags say.

    sizes: names of sources (`benchmarks.sources`). peer_largest: the peer holds its output in memory, so that it is asked for
    no larger file than this.
    """

    workdir: Path
    sizes: Sequence[str] = ("4GB",)
    runs: int = 3
    memory_budget: str = "1GiB"
    threads: int | None = None
    peer: bool = True
    keep: bool = False
    peer_largest: str = "4GB"


def copy(source: Path, destination: Path) -> list[str]:
    """Return the command of an honest copy, which neither shares blocks with its source nor leaves holes."""
    return ["cp", "--reflink=never", "--sparse=never", str(source), str(destination)]


def run(
    cases: Sequence[Case],
    settings: Settings,
    chill: Callable[[Path], str],
    console: Console,
    make_ours: Callable[[Case, str, int | None], Contender] = ours.contender,
    record: Callable[[Sequence[Result]], None] = results.append,
) -> list[Result]:
    """Run every case on every size, record each case's rows as soon as it is done, and return all of them."""
    scratch = settings.workdir / "out"
    idle = ours.baseline(scratch, console)
    rows = []
    for size in settings.sizes:
        checkpoint = prepare(settings.workdir, size, console)
        for case in cases:
            console.rule(f"{case.name}, {size}")
            contender = make_ours(case, settings.memory_budget, settings.threads)
            case_rows = _case(case, contender, size, checkpoint, scratch / case.name, settings, chill, console, idle)
            record(case_rows)
            console.print(results.table(case_rows))
            rows += case_rows
    return rows


def _case(
    case: Case,
    contender: Contender,
    source: str,
    checkpoint: Path,
    scratch: Path,
    settings: Settings,
    chill: Callable[[Path], str],
    console: Console,
    idle: int | None,
) -> list[Result]:
    """Race one case; return a row per contender, the failed ones included."""

    def start(contenders: Sequence[Contender], runs: int) -> list[Outcome]:
        return race(contenders, checkpoint, scratch, runs, chill, console, settings.keep)

    if source.endswith(SPARSE):
        # A copy would read a hole and write it out: nothing that a conversion could be held against.
        copied = Outcome("cp", failure="not run: the source is sparse")
        (converted,) = start([contender], settings.runs)
    else:
        copied, converted = start([Contender("cp", copy), contender], settings.runs)
    outcomes = [(copied, None), (converted, copied)]
    if settings.peer and checkpoint.stat().st_size <= 1.05 * parse_size(settings.peer_largest):
        # It runs once, being many times slower than the differences between its runs.
        peer = peers.converted(
            lambda: CONVERT_TO_QUANT.contender(case, settings.workdir), lambda one: start([one], PEER_RUNS)[0], console
        )
        outcomes.append((peer, converted))
    threads = f"{settings.threads} threads" if settings.threads else ""
    return [
        results.result(
            BENCHMARK,
            case.name,
            outcome.contender,
            outcome.seconds,
            source=source,
            size_bytes=checkpoint.stat().st_size,
            output_bytes=outcome.output_bytes,
            ratio_to=(other.contender, other.seconds) if other is not None else None,
            peak_anonymous_bytes=outcome.peak_anonymous_bytes,
            baseline_anonymous_bytes=idle if outcome is converted else None,
            budget_bytes=parse_size(settings.memory_budget) if outcome is converted else None,
            cache=outcome.cache,
            note=outcome.failure or (threads if outcome is converted else ""),
        )
        for outcome, other in outcomes
    ]
