"""Learned rounding of one INT8 layer, whole commands: ours with a calibration against the peer's optimiser.

Both start a process, read the same BF16 file and write a file. The peer's learned mode is what it does when nothing else
is asked for; ours is given a calibration file of synthetic inputs (low rank plus noise, channels of different size).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks import cache, peers, results
from benchmarks.checkpoints import write_checkpoint
from benchmarks.peers import CONVERT_TO_QUANT
from benchmarks.race import Contender, Outcome, race
from benchmarks.results import Result
from streamquant.calibration import Calibration, LayerStatistics
from streamquant.calibration.sketch import DEFAULT_RANK, OVERSAMPLING, probe

BENCHMARK = "learned"
LAYER = "blocks.0.mlp"
INPUTS, LOUD_DIRECTIONS = 2048, 16


def statistics(columns: int, seed: int = 0) -> LayerStatistics:
    """The moments of synthetic inputs [INPUTS, columns]."""
    random = np.random.default_rng(seed)
    loud = random.standard_normal((INPUTS, LOUD_DIRECTIONS)) @ random.standard_normal((LOUD_DIRECTIONS, columns))
    inputs = ((loud + random.standard_normal((INPUTS, columns))) * np.exp(random.standard_normal(columns))).astype(np.float32)
    sketch = inputs.T @ (inputs @ probe(columns, min(DEFAULT_RANK + OVERSAMPLING, columns), 0)) / INPUTS
    return LayerStatistics(INPUTS, inputs.mean(axis=0), np.square(inputs).mean(axis=0), sketch=sketch)


def ours(calibration: Path) -> Contender:
    """Our command line with a calibration."""

    def command(source: Path, destination: Path) -> list[str]:
        convert = [sys.executable, "-m", "streamquant", "convert", str(source), "-o", str(destination), "--force", "--quiet"]
        return [*convert, "--int8", "--preset", "none", "--calibration", str(calibration)]

    return Contender("streamquant --calibration", command)


def peer(workdir: Path) -> Contender:
    """The peer's, learning as it does by default. Raises PeerError when it cannot be installed."""
    program = str(CONVERT_TO_QUANT.install(workdir))

    def command(source: Path, destination: Path) -> list[str]:
        convert = [program, "-i", str(source), "-o", str(destination), "--comfy_quant", "--device", "cpu"]
        return [*convert, "--int8", "--scaling_mode", "row", "--manual_seed", "0"]

    return Contender(CONVERT_TO_QUANT.name, command)


def run(
    rows: int,
    columns: int,
    runs: int,
    workdir: Path,
    console: Console,
    find_peer: Callable[[Path], Contender] = peer,
    record: Callable[[Sequence[Result]], None] = results.append,
) -> list[Result]:
    """Race both on a layer [rows, columns]; record a row each and return them. The peer runs once."""
    folder = workdir / "learned"
    source, calibration = folder / f"{rows}x{columns}.safetensors", folder / f"{columns}.calibration.safetensors"
    write_checkpoint(source, [(f"{LAYER}.weight", "BF16", (rows, columns))])
    Calibration({LAYER: statistics(columns)}).save(calibration)

    def start(contender: Contender, times: int) -> Outcome:
        return race([contender], source, folder, times, cache.keep, console)[0]

    mine = ours(calibration)
    start(mine, 1)  # compiled code is made once on a machine, not once a conversion
    outcomes = [start(mine, runs), peers.converted(lambda: find_peer(workdir), lambda one: start(one, 1), console)]
    measured = [
        results.result(
            BENCHMARK,
            f"int8-row learned {rows}x{columns} bf16",
            outcome.contender,
            outcome.seconds,
            size_bytes=source.stat().st_size,
            output_bytes=outcome.output_bytes,
            ratio_to=(outcomes[0].contender, outcomes[0].seconds) if outcome is not outcomes[0] else None,
            peak_anonymous_bytes=outcome.peak_anonymous_bytes,
            note=outcome.failure,
        )
        for outcome in outcomes
    ]
    record(measured)
    console.print(results.table(measured))
    return measured
