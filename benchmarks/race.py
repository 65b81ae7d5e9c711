"""Contenders that turn the same source into a file, one after the other and round after round.

They alternate because a disk, a neighbour or a clock frequency that changes during the run then changes for all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks.process import Measurement, measure


@dataclass(frozen=True)
class Contender:
    """A name and the command that turns a source into a destination.

    `output_share` is the disk its output needs at most, as a part of the source's size.
    """

    name: str
    command: Callable[[Path, Path], list[str]]
    output_share: float = 1.0


@dataclass
class Outcome:
    """What became of one contender: its timings, or why it has none."""

    contender: str
    measurements: list[Measurement] = field(default_factory=list)
    output_bytes: int | None = None
    cache: str = ""
    failure: str = ""

    @property
    def seconds(self) -> list[float]:
        return [one.seconds for one in self.measurements]

    @property
    def peak_anonymous_bytes(self) -> int | None:
        return max((one.peak_anonymous_bytes for one in self.measurements), default=None)


def race(
    contenders: Sequence[Contender],
    source: Path,
    folder: Path,
    runs: int,
    chill: Callable[[Path], str],
    console: Console,
    keep: bool = False,
) -> list[Outcome]:
    """Run every contender `runs` times, alternating; return their outcomes in the same order.

    Outputs and the logs of failures go to `folder`; outputs are removed after each run unless `keep` is set. `chill`
    makes the cache cold before each run and names what it could do. A contender that fails is reported at once and
    not run again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = {contender.name: Outcome(contender.name) for contender in contenders}
    for _ in range(runs):
        for contender in contenders:
            outcome = outcomes[contender.name]
            if not outcome.failure:
                _run(contender, outcome, source, folder, chill, keep)
                if outcome.failure:
                    shout(console, f"{contender.name} FAILED: {outcome.failure}")
    return list(outcomes.values())


def _run(
    contender: Contender, outcome: Outcome, source: Path, folder: Path, chill: Callable[[Path], str], keep: bool
) -> None:
    destination = folder / f"{_file_name(contender.name)}.safetensors"
    destination.unlink(missing_ok=True)
    outcome.failure = lacking_room(folder, int(source.stat().st_size * contender.output_share))
    if outcome.failure:
        return
    outcome.cache = chill(source)
    log = folder / f"{_file_name(contender.name)}.log"
    measurement = measure(contender.command(source, destination), log, destination)
    # A converter that says it succeeded and wrote nothing has failed: one of the peers exits 0 on nearly every error.
    if measurement.exit_code or not destination.exists():
        what = f"exit code {measurement.exit_code}" if measurement.exit_code else "no output file"
        outcome.failure = f"{what}: {_last_line(log)} (see {log.name})"
        outcome.measurements.clear()
    else:
        log.unlink()
        outcome.measurements.append(measurement)
        outcome.output_bytes = destination.stat().st_size
    if not keep:
        destination.unlink(missing_ok=True)


def lacking_room(folder: Path, needed: int) -> str:
    """Return why `needed` bytes do not fit into `folder`, or nothing when they do."""
    free = shutil.disk_usage(folder).free
    return "" if free > needed else f"not run: needs {needed} bytes of disk, {free} are free"


def shout(console: Console, text: str) -> None:
    """Say what must not be overlooked: that somebody is missing from a comparison."""
    console.print(text, style="bold red", markup=False)


def _file_name(contender: str) -> str:
    return contender.replace(" ", "-")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no message"
