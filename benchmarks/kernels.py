"""Throughput of NF4 quantization alone: one weight in memory, no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from benchmarks import results
from benchmarks.machine import installed
from benchmarks.race import shout
from benchmarks.results import Result

BENCHMARK = "kernels"
BLOCK = 64

Quantize = Callable[[torch.Tensor], object]


def contenders() -> list[tuple[str, Callable[[], Quantize]]]:
    """Return the implementations by name, each behind a function that imports it: the first is what ratios are to."""
    return [(f"bitsandbytes {installed('bitsandbytes')}", _bitsandbytes)]


def _bitsandbytes() -> Quantize:
    from bitsandbytes.functional import quantize_4bit

    return lambda weight: quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")


def run(
    shape: tuple[int, int],
    runs: int,
    threads: int | None,
    console: Console,
    entries: Sequence[tuple[str, Callable[[], Quantize]]] | None = None,
    record: Callable[[Sequence[Result]], None] = results.append,
) -> list[Result]:
    """Time every contender on a BF16 weight of `shape`, alternating; record the rows and return them."""
    if threads:
        torch.set_num_threads(threads)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).mul_(0.02)
    weight = weight.to(torch.bfloat16)
    ready: dict[str, Quantize] = {}
    failures: dict[str, str] = {}
    entries = contenders() if entries is None else entries
    for name, load in entries:
        try:
            ready[name] = load()
            # Once unmeasured: the first call pays for imports and fresh memory.
            ready[name](weight[:BLOCK])
        except (ImportError, RuntimeError) as error:
            ready.pop(name, None)
            failures[name] = f"{type(error).__name__}: {error}"
            shout(console, f"{name} DOES NOT TAKE PART: {failures[name]}")
    seconds: dict[str, list[float]] = {name: [] for name, _ in entries}
    for _ in range(runs):
        for name, quantize in ready.items():
            began = time.perf_counter()
            quantize(weight)
            seconds[name].append(time.perf_counter() - began)
    first = entries[0][0]
    rows = [
        results.result(
            BENCHMARK,
            f"nf4 {shape[0]}x{shape[1]} bf16, {torch.get_num_threads()} threads",
            name,
            seconds[name],
            size_bytes=weight.nbytes,
            ratio_to=(first, seconds[first]) if name != first else None,
            note=failures.get(name, ""),
        )
        for name, _ in entries
    ]
    record(rows)
    console.print(results.table(rows))
    return rows
