"""Peak memory against what it must not depend on: the size of the file and the size of its largest layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import cache, ours, results
from benchmarks.cases import Case
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
) -> list[Result]:
    """Convert every file in every case within every budget, once each; record each row as soon as it is there.

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
            row = results.result(BENCHMARK, file, ours.NAME, (), note=str(error))
            record([row])
            rows.append(row)
            continue
        for case in cases:
            for budget in budgets:
                contender = make_ours(case, budget)
                outcome = race([contender], checkpoint, scratch / case.name, 1, cache.keep, console)[0]
                row = _row(f"{case.name} {file}", outcome, checkpoint, budget, idle)
                record([row])
                rows.append(row)
                console.print(results.table([row]))
    return rows


def _row(case: str, outcome: Outcome, checkpoint: Path, budget: str, idle: int | None) -> Result:
    return results.result(
        BENCHMARK,
        case,
        outcome.contender,
        outcome.seconds,
        size_bytes=checkpoint.stat().st_size,
        output_bytes=outcome.output_bytes,
        peak_anonymous_bytes=outcome.peak_anonymous_bytes,
        baseline_anonymous_bytes=idle,
        budget_bytes=parse_size(budget),
        cache=outcome.cache,
        note=outcome.failure,
    )
