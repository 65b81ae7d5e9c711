"""Throughput of each quantization alone: one weight in memory, no files. The first contender is what ratios are to.

Other libraries do it in processes of their own, in turn with us (`benchmarks.rivals`).

A plain copy of the weight (a read and a write of it) runs beside them: the bound that memory sets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks import results
from benchmarks.peers import PeerError
from benchmarks.race import shout
from benchmarks.results import Result
from benchmarks.rivals import Crew, Remote
from streamquant.formats import Format, bnb4, fp8, int8
from streamquant.kernels import JitBackend, TorchBackend, why_no_jit

BENCHMARK = "kernels"
TILE_ELEMENTS = 1 << 22  # what a conversion hands to a worker at a time

Quantize = Callable[[torch.Tensor], object]
Entry = tuple[str, Callable[[], Quantize]]

FORMATS: dict[str, Format] = {
    "nf4": bnb4.BnbNF4(),
    "fp4": bnb4.BnbFP4(),
    "nf4-double": bnb4.BnbNF4(double_quant=True),
    "fp8-tensor": fp8.Float8TensorWise(),
    "fp8-row": fp8.Float8RowWise(),
    "fp8-block": fp8.Float8BlockWise(),
    "int8-row": int8.Int8TensorWise(),
    "int8-block": int8.Int8BlockWise(),
}


def contenders(operation: str, threads: int) -> list[Entry]:
    """Who does an operation, by name, each behind a function that imports it."""
    if operation == "copy":
        return [("numpy copy", lambda: _parallel_copy(threads))]
    layout = FORMATS[operation]
    return [
        ("plain torch", lambda: _encode(layout, TorchBackend, threads)),
        ("streamquant", lambda: _encode(layout, _jit, threads)),
    ]


def _jit() -> JitBackend:
    if reason := why_no_jit():
        raise ImportError(reason)
    return JitBackend()


def _encode(layout: Format, make_backend: Callable[[], object], threads: int) -> Quantize:
    """All passes of a format over a BF16 weight, tile by tile, in as many threads as a conversion would use."""
    backend = make_backend()
    pool = ThreadPoolExecutor(threads)

    def run(weight: torch.Tensor) -> None:
        raw = weight.view(torch.uint8).numpy().reshape(-1)
        shape = tuple(weight.shape)
        encoder = layout.encoder(shape, "BF16")
        granularity = layout.granularity(shape, "BF16")
        size = max(TILE_ELEMENTS // granularity, 1) * granularity
        tiles = [backend.load(raw[2 * begin : 2 * (begin + size)], "BF16") for begin in range(0, weight.numel(), size)]
        if encoder.passes == 2:
            for learned, _ in pool.map(lambda tile: encoder.observe(backend, tile), tiles):
                encoder.absorb(learned)
        for encoded in pool.map(lambda tile: encoder.encode(backend, tile), tiles):
            encoder.commit(encoded)
        encoder.finish()

    return run


def _parallel_copy(threads: int) -> Quantize:
    pool = ThreadPoolExecutor(threads)
    targets: dict[int, np.ndarray] = {}

    def run(weight: torch.Tensor) -> None:
        source = weight.view(torch.uint8).numpy().reshape(-1)
        # Once: it is the copy that is timed, not the system finding fresh pages for it.
        if source.size not in targets:
            targets[source.size] = np.ones_like(source)
        target = targets[source.size]
        size = 2 * TILE_ELEMENTS
        list(pool.map(lambda at: np.copyto(target[at : at + size], source[at : at + size]), range(0, source.size, size)))

    return run


def run(
    shape: tuple[int, int],
    runs: int,
    threads: int,
    console: Console,
    operations: Sequence[str] = ("copy", *FORMATS),
    find: Callable[[str, int], Sequence[Entry]] = contenders,
    record: Callable[[Sequence[Result]], None] = results.append,
    workdir: Path | None = None,
) -> list[Result]:
    """Time every contender of every operation on a BF16 weight of `shape`; record the rows and return them.

    workdir: where the other libraries' environments are; None leaves them out.
    """
    # Workers are our own threads, each on a tile of its own; torch's would fight them.
    torch.set_num_threads(1)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).mul_(0.02)
    weight = weight.to(torch.bfloat16)
    rows = []
    with Crew(weight, workdir or Path(), threads) as crew:
        for operation in operations:
            others = crew.entries(operation, decodes=False) if workdir is not None else []
            operation_rows = _race(operation, [*find(operation, threads), *others], weight, runs, threads, console)
            record(operation_rows)
            rows += operation_rows
    console.print(results.table(rows))
    return rows


def _race(
    operation: str, entries: Sequence[Entry], weight: torch.Tensor, runs: int, threads: int, console: Console
) -> list[Result]:
    ready: dict[str, Quantize] = {}
    failures: dict[str, str] = {}
    for name, load in entries:
        try:
            ready[name] = load()
            # Once unmeasured: the first call pays for imports, compilation and fresh memory.
            ready[name](weight[:128])
        except (ImportError, RuntimeError, PeerError) as error:
            ready.pop(name, None)
            failures[name] = f"{type(error).__name__}: {error}"
            shout(console, f"{name} DOES NOT TAKE PART: {failures[name]}")
    seconds: dict[str, list[float]] = {name: [] for name, _ in entries}
    for _ in range(runs):
        for name, quantize in ready.items():
            seconds[name].append(_seconds(quantize, weight))
    first = entries[0][0]
    return [
        results.result(
            BENCHMARK,
            f"{operation} {weight.shape[0]}x{weight.shape[1]} bf16, {threads} threads",
            name,
            seconds[name],
            size_bytes=weight.nbytes,
            ratio_to=(first, seconds[first]) if name != first else None,
            note=failures.get(name, ""),
        )
        for name, _ in entries
    ]


def _seconds(quantize: Quantize | Remote, weight: torch.Tensor) -> float:
    if isinstance(quantize, Remote):
        return quantize.seconds()
    began = time.perf_counter()
    quantize(weight)
    return time.perf_counter() - began
