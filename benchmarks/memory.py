"""Peak memory against what it must not depend on: the size of the file and the size of its largest layer.

The peer, whose memory does depend on them, converts the files that it can hold, once each in the first case it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import cache, ours, results
from benchmarks.cases import Case
from benchmarks.peers import CONVERT_TO_QUANT, PeerError
from benchmarks.race import Contender, Outcome, race, shout
from benchmarks.results import Result
from benchmarks.sources import prepare
from benchmarks.units import parse_size

BENCHMARK = "memory"


def run(
    cases: Sequence[Case],
    files: Sequence[str],
    budgets: Sequence[str],
    workdir: Path,
    console: Console,
    make_ours: Callable[[Case, str], Contender] = ours.contender,
    record: Callable[[Sequence[Result]], None] = results.append,
    peer_files: Sequence[str] = (),
    find_peer: Callable[[Case, Path], Contender] = CONVERT_TO_QUANT.contender,
) -> list[Result]:
    """Convert every file in every case within every budget, once each; record each row as soon as it is there.

    peer_files: those of the files that the peer converts too.

    The cache is left as it is, for it does not count as anonymous memory, and dropping it would only cost time.
    """
    scratch = workdir / "out"
    idle = ours.baseline(scratch, console)
    rows = []
    for file in files:
        try:
            checkpoint = prepare(workdir, file, console)
        except OSError as error:
            shout(console, f"{file} LEFT OUT: {error}")
            row = results.result(BENCHMARK, "all", ours.NAME, (), source=file, note=str(error))
            record([row])
            rows.append(row)
            continue
        for case in cases:
            for budget in budgets:
                contender = make_ours(case, budget)
                outcome = race([contender], checkpoint, scratch / case.name, 1, cache.keep, console)[0]
                row = _row(case.name, file, outcome, checkpoint, parse_size(budget), idle)
                record([row])
                rows.append(row)
                console.print(results.table([row]))
        if file in peer_files:
            for case in [case for case in cases if case.peer is not None][:1]:
                row = _row(case.name, file, _peer(case, checkpoint, scratch, workdir, find_peer, console), checkpoint)
                record([row])
                rows.append(row)
                console.print(results.table([row]))
    return rows


def _peer(
    case: Case,
    checkpoint: Path,
    scratch: Path,
    workdir: Path,
    find_peer: Callable[[Case, Path], Contender],
    console: Console,
) -> Outcome:
    try:
        return race([find_peer(case, workdir)], checkpoint, scratch / case.name, 1, cache.keep, console)[0]
    except PeerError as error:
        shout(console, f"{CONVERT_TO_QUANT.name} DOES NOT TAKE PART: {error}")
        return Outcome(CONVERT_TO_QUANT.name, failure=str(error))


def _row(
    case: str, source: str, outcome: Outcome, checkpoint: Path, budget: int | None = None, idle: int | None = None
) -> Result:
    return results.result(
        BENCHMARK,
        case,
        outcome.contender,
        outcome.seconds,
        source=source,
        size_bytes=checkpoint.stat().st_size,
        output_bytes=outcome.output_bytes,
        peak_anonymous_bytes=outcome.peak_anonymous_bytes,
        baseline_anonymous_bytes=idle,
        budget_bytes=budget,
        cache=outcome.cache,
        note=outcome.failure,
    )
