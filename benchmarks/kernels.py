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
from benchmarks.results import OURS, Result
from benchmarks.rivals import Crew, Remote
from benchmarks.turns import take_turns
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
        (OURS, lambda: _encode(layout, _jit, threads)),
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
            case = f"{operation} {shape[0]}x{shape[1]} bf16, {threads} threads"
            found = take_turns(
                BENCHMARK, case, [*find(operation, threads), *others], lambda quantize: quantize(weight),
                lambda quantize: _seconds(quantize, weight), runs, console, size_bytes=weight.nbytes,
            )  # fmt: skip
            record(found)
            rows += found
    console.print(results.table(rows))
    return rows


def _seconds(quantize: Quantize | Remote, weight: torch.Tensor) -> float:
    if isinstance(quantize, Remote):
        return quantize.seconds()
    began = time.perf_counter()
    quantize(weight)
    return time.perf_counter() - began
