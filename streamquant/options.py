"""How a conversion runs, and who watches it: what the caller of the pipeline hands in besides a recipe."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from streamquant.budget import TileSizes
from streamquant.plan import Plan, Unit
from streamquant.report import LayerResult


@dataclass(frozen=True)
class Options:
    """How a conversion runs; none of it changes a byte of the output (but for the shards it is cut into).

    memory_budget, vram_budget, shard_size: bytes. threads: None takes the processors this process may use.
    device: "auto", "cpu", "cuda" or "cuda:N". io: "auto", "mmap" or "pread".
    """

    memory_budget: int = 1 << 30
    vram_budget: int | None = None
    device: str = "auto"
    io: str = "auto"
    threads: int | None = None
    resume: bool = False
    force: bool = False
    shard_size: int | None = None

    @property
    def effective_threads(self) -> int:
        """Worker threads."""
        if self.threads is not None:
            return max(self.threads, 1)
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @property
    def effective_io(self) -> str:
        """"auto" is "pread": within a few percent as fast as a mapping, and safe wherever the file lies."""
        return "pread" if self.io == "auto" else self.io


class Observer(Protocol):
    """Whoever watches a conversion. Called from the thread that called `convert`."""

    def note(self, text: str) -> None:
        """A sentence a person should read."""

    def compiling(self) -> None:
        """Kernels will be compiled, once on a machine, before the first tile is done: for seconds nothing moves."""

    def started(self, plan: Plan, tiles: TileSizes, done_bytes: int) -> None:
        """Work begins; `done_bytes` of the source were done by an earlier run."""

    def progress(self, unit: Unit, source_bytes: int) -> None:
        """`source_bytes` more of the source have become output; `unit` is in hand."""

    def finished(self, layer: LayerResult) -> None:
        """A source tensor is done."""


class Silent:
    """An observer that looks away."""

    def note(self, text: str) -> None: ...

    def compiling(self) -> None: ...

    def started(self, plan: Plan, tiles: TileSizes, done_bytes: int) -> None: ...

    def progress(self, unit: Unit, source_bytes: int) -> None: ...

    def finished(self, layer: LayerResult) -> None: ...
