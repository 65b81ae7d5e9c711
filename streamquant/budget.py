"""How large a tile may be: from the memory budget to elements, and what a process holds now."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from streamquant.checkpoint.header import printable
from streamquant.errors import BudgetError
from streamquant.plan import Plan, Unit

MEBIBYTE = 1 << 20
TARGET_TILE_BYTES = 8 * MEBIBYTE  # of source data: large enough to forget the overheads, small enough for the cache
BATCHES_PER_TILE = 32  # small units are done together up to that part of a tile
LEARNED_ELEMENTS = 1 << 21  # of a tile whose codes are learned: its arithmetic is long, and its float32 form is kept
LEARNED_ELEMENTS_ON_DEVICE = 1 << 25  # there time grows with the columns and hardly with the rows: many at once
LEARNED_BYTES = 4 + 4 + 1  # per element of such a tile, beyond the others: rotated, as a matrix, and its codes
DECODED_BYTES = 4 + 4 + 4 + 2  # per element of a quantized source: its float32 form, two steps on the way there, its codes
STRIP_BYTES = 4 * 32  # per column and thread: the errors of a strip of rows, for sweeps and a dense H


@dataclass(frozen=True)
class LearnedNeeds:
    """What learning a layer's codes takes: bytes while its converter is made, bytes while it is used, and of how many
    rows its tiles must be a multiple."""

    preparing: int
    prepared: int
    rows: int = 1

# What the process takes beyond tiles: compiled kernels or torch, thread stacks, buffers of the allocator. Measured
# (`python -m benchmarks memory`), rounded up.
OVERHEAD = {"numba": 128 * MEBIBYTE, "torch": 160 * MEBIBYTE}


@dataclass(frozen=True)
class TileSizes:
    """Elements per tile for each unit; how many tiles exist at once; bytes of memory to expect, and allowed.

    batch_bytes: of source data, up to which small units share a task, which counts as a tile.
    """

    elements: tuple[int, ...]
    batch_bytes: int
    in_flight: int
    peak_bytes: int
    memory_budget: int


def tiles_in_flight(threads: int) -> int:
    """Tiles that exist at once: one being computed per thread, and as many waiting to be committed."""
    return 2 * threads


def bytes_per_element(unit: Unit, io: str, backend: str) -> float:
    """Anonymous bytes a tile takes per source element, from reading to commit."""
    read = unit.element_bytes if io == "pread" else 0
    if unit.decoded is not None:
        read = DECODED_BYTES
    if unit.format.name == "copy":
        return read  # written from where it was read
    written = sum(output.item_bytes / output.elements_per_item for output in unit.outputs if output.streamed)
    if unit.format.name == "cast":
        return read + written + 12  # float32, its bits, and the error
    decoded = 0 if unit.dtype in ("BF16", "F32") else 4
    return read + decoded + written + (4 + unit.element_bytes if backend == "torch" else 0)


def tile_sizes(
    plan: Plan, memory_budget: int, threads: int, io: str, backend: str, vram_budget: int | None,
    learned: Mapping[int, LearnedNeeds] = MappingProxyType({}),
) -> TileSizes:  # fmt: skip
    """The tile of every unit under a budget in bytes of anonymous memory.

    learned: by unit, for those whose codes are learned. The next layer's converter is made while one is used.

    Raises BudgetError naming the layer that needs most where the smallest tiles (a row, a row of blocks, a run of nested
    blocks) do not fit, with the budget it needs.
    """
    in_flight = tiles_in_flight(threads)
    needs = learned.values()
    fixed = OVERHEAD[backend]
    fixed += max((need.preparing for need in needs), default=0) + max((need.prepared for need in needs), default=0)
    elements, peak, worst, worst_device = [], 0, None, None
    widest, most_overhead = 1.0, fixed
    for unit in plan.units:
        per_element = max(bytes_per_element(unit, io, backend), 0.125)
        granularity, target, overhead = unit.granularity, TARGET_TILE_BYTES // unit.element_bytes, fixed
        if unit.index in learned:
            per_element += LEARNED_BYTES if vram_budget is None else 1
            granularity = math.lcm(granularity, unit.shape[1] * learned[unit.index].rows)
            overhead += threads * STRIP_BYTES * unit.shape[1]
            target = LEARNED_ELEMENTS if vram_budget is None else LEARNED_ELEMENTS_ON_DEVICE
        widest = max(widest, per_element / unit.element_bytes)
        most_overhead = max(most_overhead, overhead)
        memory_limit = limit = (memory_budget - overhead) / in_flight / per_element
        # On the device: the tile, its float32 form, its codes and one temporary, per worker.
        on_device = threads * (unit.element_bytes + 16)
        if vram_budget is not None:
            limit = min(limit, vram_budget / on_device)
        granules = max(min(target, limit) // granularity, 1)
        size = int(min(granules * granularity, max(unit.elements, 1)))
        need = overhead + math.ceil(size * per_element) * in_flight
        if size > memory_limit and (worst is None or need > worst[0]):
            worst = need, unit
        if vram_budget is not None and size * on_device > max(vram_budget, worst_device[0] if worst_device else 0):
            worst_device = size * on_device, unit
        elements.append(size)
        peak = max(peak, need)
    if worst:
        raise _too_large(*worst, memory_budget, "--memory-budget")
    if worst_device:
        raise _too_large(*worst_device, vram_budget, "--vram-budget")
    # The outputs of a batch exist twice for a moment, while they are put together to be written.
    batch_bytes = min(TARGET_TILE_BYTES / BATCHES_PER_TILE, (memory_budget - most_overhead) / in_flight / widest / 2)
    return TileSizes(tuple(elements), int(batch_bytes), in_flight, max(peak, fixed), memory_budget)


def _too_large(need: int, unit: Unit, budget: int, option: str) -> BudgetError:
    given = f"{budget // MEBIBYTE} MiB" if budget >= MEBIBYTE else f"{budget:,} bytes"
    return BudgetError(
        f"{printable(unit.key)} ({' x '.join(map(str, unit.shape))}) cannot be cut into tiles small enough for a budget of "
        f"{given}: give {option} {math.ceil(need / MEBIBYTE)}MiB, or fewer --threads."
    )


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process: what a budget counts. Mapped files are not in it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            _, resident, shared = map(int, statm.read().split()[:3])
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import psutil  # not Linux: this is the nearest thing

        return psutil.Process(os.getpid()).memory_info().rss
