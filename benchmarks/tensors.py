"""Time against the number of tensors: what a conversion costs beside its bytes, which here are next to none."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks import results
from benchmarks.checkpoints import write_checkpoint
from benchmarks.results import Result
from benchmarks.shapes import TensorShape
from streamquant import FormatChoice, Recipe
from streamquant.checkpoint.reader import open_checkpoint
from streamquant.inspect import inspect
from streamquant.plan import plan
from streamquant.transcode import convert
from streamquant.verify import verify

BENCHMARK = "tensors"
REFERENCE = "safetensors load and save"
RECIPE = Recipe(FormatChoice("nf4", rounding="rtn"))


def tiny_tensors(count: int) -> list[TensorShape]:
    """Half of them linear weights of 16 x 16, half their biases."""
    return [
        TensorShape(f"blocks.{number // 2}.linear.{kind}", "BF16", shape)
        for number in range(0, count, 2)
        for kind, shape in (("weight", (16, 16)), ("bias", (16,)))
    ]


def run(
    counts: Sequence[int], runs: int, workdir: Path, console: Console,
    record: Callable[[Sequence[Result]], None] = results.append,
) -> list[Result]:  # fmt: skip
    """Time every step on a checkpoint of each number of tensors, `runs` times, and the plainest rewriting beside them."""
    folder = workdir / "tensors"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Result] = []
    for step in _steps(folder, 100)[1].values():  # loads and compiles
        step()
    _clear(folder, 100)
    for count in counts:
        source, steps = _steps(folder, count)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(runs):
            for name, step in steps.items():
                gc.collect()
                began = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - began)
        size = source.stat().st_size
        there = (REFERENCE, seconds[REFERENCE])
        found = [
            results.result(
                BENCHMARK, f"{count} tensors", name, taken, size_bytes=size, ratio_to=None if name == REFERENCE else there,
                note=f"{results.quantiles(taken)[1] / count * 1e6:.0f} us a tensor",
            )
            for name, taken in seconds.items()
        ]  # fmt: skip
        record(found)
        rows += found
        _clear(folder, count)
    console.print(results.table(rows, "time against the number of tensors"))
    return rows


def _clear(folder: Path, count: int) -> None:
    for path in folder.glob(f"*-{count}.safetensors"):
        path.unlink()


def _steps(folder: Path, count: int) -> tuple[Path, dict[str, Callable[[], object]]]:
    """A checkpoint of so many tensors, and what is timed on it, in order: verify and inspect look at what convert wrote."""
    source, output, copy = (folder / f"{name}-{count}.safetensors" for name in ("source", "output", "copy"))
    write_checkpoint(source, tiny_tensors(count))
    return source, {
        REFERENCE: lambda: save_file(load_file(source), copy),
        "open": lambda: open_checkpoint(source),
        "plan": lambda: plan(source, RECIPE),
        "convert": lambda: convert(source, output, RECIPE, force=True),
        "verify": lambda: verify(source, output),
        "inspect": lambda: inspect(output),
    }
