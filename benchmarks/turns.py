"""Functions timed in turn, round after round, so that what slows the machine down slows all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from rich.console import Console

from benchmarks import results
from benchmarks.peers import PeerError
from benchmarks.race import shout
from benchmarks.results import Result

Timed = TypeVar("Timed")


def take_turns(
    benchmark: str,
    case: str,
    entries: Sequence[tuple[str, Callable[[], Timed]]],
    try_out: Callable[[Timed], object],
    seconds: Callable[[Timed], float],
    runs: int,
    console: Console,
    *,
    size_bytes: int | None,
    device: str = "cpu",
) -> list[Result]:
    """Return the rows of one case, a contender each; ratios are to the first.

    entries: names, each with what imports and prepares the contender. try_out: one go that is not measured, which pays for
    imports, compilation and fresh memory, and may raise when the contender is wrong. Who fails before it is timed has a row
    that says why.
    """
    ready: dict[str, Timed] = {}
    failures: dict[str, str] = {}
    for name, prepare in entries:
        try:
            contender = prepare()
            try_out(contender)
            ready[name] = contender
        except (ImportError, RuntimeError, PeerError) as error:
            failures[name] = f"{type(error).__name__}: {error}"
            shout(console, f"{name} DOES NOT TAKE PART in {case}: {failures[name]}")
    taken: dict[str, list[float]] = {name: [] for name, _ in entries}
    for _ in range(runs):
        for name, contender in ready.items():
            taken[name].append(seconds(contender))
    first = entries[0][0]
    return [
        results.result(
            benchmark,
            case,
            name,
            taken[name],
            size_bytes=size_bytes,
            ratio_to=(first, taken[first]) if name != first else None,
            device=device,
            note=failures.get(name, ""),
        )
        for name, _ in entries
    ]
