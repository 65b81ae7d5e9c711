"""A conversion from end to end: plan, check, pour, publish, report."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from streamquant import errors
from streamquant.budget import TileSizes, anonymous_bytes, tile_sizes
from streamquant.checkpoint.reader import Checkpoint, TileReader, open_checkpoint
from streamquant.checkpoint.writer import write_file
from streamquant.kernels import why_no_jit
from streamquant.options import Observer, Options, Silent
from streamquant.plan import Plan
from streamquant.plan import plan as make_plan
from streamquant.pour import Pour
from streamquant.prefetch import Prefetcher
from streamquant.preflight import check_destination, device_class, free_disk, is_compiled, resolve_device
from streamquant.recipe import Recipe
from streamquant.report import LayerResult, Report, layer_result
from streamquant.rounding.hadamard import unrotated_layers
from streamquant.rounding.knowledge import LayerKnowledge
from streamquant.session import open_session


def convert(
    source: str | Path | Checkpoint,
    destination: str | Path,
    recipe: Recipe | None = None,
    *,
    options: Options | None = None,
    observer: Observer | None = None,
    stop: threading.Event | None = None,
    **named: Any,
) -> Report:
    """Convert a checkpoint into one file (or shards) at `destination`.

    named: fields of `Options`, which they override. stop: when set, the conversion ends at the next tile with
    InterruptedRunError. Raises a StreamquantError for everything that can go wrong. What was written is kept for
    `resume=True`, except after a refusal before the start or a NonFiniteError, which leave nothing behind.
    """
    options = replace(options or Options(), **named)
    observer = observer or Silent()
    destination = Path(destination)
    started = time.monotonic()
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, recipe, name=destination.name, shard_size=options.shard_size)
    # Reading ahead begins here: the disk then works while the kernels are still being loaded. What learned rounding
    # factorizes must not depend on how many cores there are, hence one thread for each product; there are workers enough.
    with (
        threadpool_limits(1, "blas"),
        TileReader(checkpoint, options.effective_io) as reader,
        Prefetcher(_source_ranges(plan, reader)) as prefetcher,
    ):
        device = resolve_device(options.device)
        if device == "cpu" and not why_no_jit() and not is_compiled():
            observer.compiling()
        plan, knowledge = _learn(plan, reader, options)
        tiles = plan_tiles(plan, options, device, knowledge)
        for note in (*plan.notes, *knowledge.notes(), *reader.notes):
            observer.note(note)
        fingerprint = plan.fingerprint() | {"device": device_class(device)}
        session = open_session(
            plan, destination, fingerprint, resume=options.resume, force=options.force, note=observer.note
        )
        outputs = [destination.with_name(file.name) for file in plan.files]
        if plan.index_name:
            outputs.append(destination.with_name(plan.index_name))
        if session is None:
            observer.note("The output is complete already: nothing to do.")
            return _report(plan, knowledge, outputs, {}, {}, time.monotonic() - started, True, anonymous_bytes())
        stop = stop or threading.Event()
        pour = Pour(plan, session, reader, prefetcher, options, device, tiles, knowledge, observer, stop)
        try:
            pour.run()
            if plan.index_name:
                write_file(destination.with_name(plan.index_name), [plan.index_json()], session.names.run)
        except errors.NonFiniteError:
            session.discard()  # no resume could get past that weight with this recipe
            raise
        except BaseException:
            session.abandon()
            raise
        session.finish()
    seconds = time.monotonic() - started
    return _report(plan, knowledge, outputs, pour.results, session.done, seconds, session.resumed, pour.peak)


def _learn(plan: Plan, reader: TileReader, options: Options) -> tuple[Plan, LayerKnowledge]:
    """What is known of the layers' inputs, and the plan once it is decided which rows of INT8 are rotated."""
    knowledge = LayerKnowledge(plan, reader)
    if unrotated := unrotated_layers(plan, reader, knowledge.hessian):
        name = plan.name
        plan = make_plan(plan.checkpoint, plan.recipe, name=name, shard_size=options.shard_size, unrotated=unrotated)
        knowledge.plan = plan
    return plan, knowledge


def _source_ranges(plan: Plan, reader: TileReader) -> list[tuple[int, int, int]]:
    """(descriptor, offset, bytes) of every unit's source, in the order in which they are read."""
    ranges = []
    for tensor in (tensor for unit in plan.units for tensor in unit.sources):
        start = plan.checkpoint.files[tensor.file].header.data_start + tensor.info.start
        ranges.append((reader.descriptor(tensor.file), start, tensor.info.nbytes))
    return ranges


def dry_run(
    source: str | Path | Checkpoint, destination: str | Path, recipe: Recipe | None = None, options: Options | None = None
) -> tuple[Plan, TileSizes, int]:
    """The plan, the tile sizes and the free disk (bytes) of a conversion that is not run.

    Refuses what `convert` would refuse, except for lack of disk space, which the numbers show.
    """
    options, destination = options or Options(), Path(destination)
    plan = make_plan(source, recipe, name=destination.name, shard_size=options.shard_size)
    check_destination(plan, destination, options.force or options.resume)
    with TileReader(plan.checkpoint, options.effective_io) as reader:
        knowledge = LayerKnowledge(plan, reader, look=False)
        tiles = plan_tiles(plan, options, resolve_device(options.device), knowledge)
    plan = replace(plan, notes=(*plan.notes, *knowledge.notes()))
    return plan, tiles, free_disk(destination.parent)


def plan_tiles(plan: Plan, options: Options, device: str, knowledge: LayerKnowledge | None = None) -> TileSizes:
    """Tile sizes under the options' budgets. Raises BudgetError when a layer cannot be cut small enough."""
    backend = "torch" if device != "cpu" or why_no_jit() else "numba"
    vram = None if device == "cpu" else options.vram_budget or (2 << 30)
    learned = {unit.index: needs for unit in plan.units if knowledge and (needs := knowledge.needs(unit))}
    budget, threads = options.memory_budget, options.effective_threads
    io = knowledge.reader.io if knowledge else options.effective_io
    return tile_sizes(plan, budget, threads, io, backend, vram, learned)


def _report(
    plan: Plan, knowledge: LayerKnowledge, outputs: list[Path], results: dict[int, LayerResult],
    done: dict[int, dict[str, Any]], seconds: float, resumed: bool, peak: int,
) -> Report:  # fmt: skip
    """results: of the units that this run did. done: the last journal record of these and of what it took over."""
    layers = [
        results.get(unit.index) or layer_result(plan, unit, knowledge.origin(unit), done.get(unit.index, {}))
        for unit in plan.units
    ]
    notes = (*plan.notes, *knowledge.notes())
    source_bytes = plan.checkpoint.size
    return Report(
        outputs, plan.architecture, layers, plan.removed, source_bytes, plan.output_size, seconds, resumed, peak, notes
    )
