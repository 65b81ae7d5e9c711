"""Peak memory against what it must not depend on: the size of the file and the size of its largest layer.

The peer, whose memory does depend on them, converts the files that it can hold, once each in the first case it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import cache, ours, peers, results
from benchmarks.cases import Case
from benchmarks.peers import CONVERT_TO_QUANT
from benchmarks.race import Contender, Outcome, race, shout
from benchmarks.results import OURS, Result
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
    rows: list[Result] = []

    def keep(row: Result) -> None:
        record([row])
        rows.append(row)
        console.print(results.table([row]))

    for file in files:
        try:
            checkpoint = prepare(workdir, file, console)
        except OSError as error:
            shout(console, f"{file} LEFT OUT: {error}")
            keep(results.result(BENCHMARK, "all", OURS, (), source=file, note=str(error)))
            continue

        def start(contender: Contender, case: Case, checkpoint: Path = checkpoint) -> Outcome:
            return race([contender], checkpoint, scratch / case.name, 1, cache.keep, console)[0]

        for case in cases:
            for budget in budgets:
                keep(_row(case.name, file, start(make_ours(case, budget), case), checkpoint, parse_size(budget), idle))
        if file in peer_files:
            for case in [case for case in cases if case.peer is not None][:1]:
                outcome = peers.converted(partial(find_peer, case, workdir), partial(start, case=case), console)
                keep(_row(case.name, file, outcome, checkpoint))
    return rows


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
