"""Two outputs side by side: how their weights differ, and, given the source, which is nearer to it and for how many bytes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from streamquant import errors
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.reader import Checkpoint, TileReader
from streamquant.options import Options
from streamquant.stored import Contents, Layout, read_contents, tiles
from streamquant.stored.adapter import refuse_adapter
from streamquant.stored.contents import refuse_foreign
from streamquant.stored.difference import Difference
from streamquant.stored.difference import compare as difference
from streamquant.stored.parallel import in_order
from streamquant.verdict import Unwatched, Watcher, finite

TILES_TOGETHER = 16  # tiles of one piece of work
EQUAL = 0.01  # errors within 1 % of each other are a draw


@dataclass(frozen=True)
class Side:
    """A layer in one of the two files. relative_error: against the source, None without one."""

    format: str
    detail: str
    nbytes: int
    relative_error: float | None


@dataclass(frozen=True)
class Compared:
    """One weight in both. difference: ||a - b|| / ||a||."""

    key: str
    shape: tuple[int, ...]
    a: Side
    b: Side
    difference: float

    @property
    def better(self) -> str | None:
        """ "a" or "b", whichever is nearer to the source; "=" for a draw, None without a source."""
        if self.a.relative_error is None or self.b.relative_error is None:
            return None
        first, second = self.a.relative_error, self.b.relative_error
        if abs(first - second) <= EQUAL * max(first, second):
            return "="
        return "a" if first < second else "b"


@dataclass(frozen=True)
class Comparison:
    """Two files. layers: weights that are quantized in at least one. only_in_a, only_in_b: tensors without a counterpart.
    alike: other tensors that both have. unreadable: weight -> why it could not be compared.
    """

    a: Path
    b: Path
    source: Path | None
    layers: tuple[Compared, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    alike: int
    bytes_a: int
    bytes_b: int
    seconds: float
    unreadable: dict[str, str] = field(default_factory=dict)

    def count(self, better: str) -> int:
        """How many layers one side wins."""
        return sum(layer.better == better for layer in self.layers)

    def as_json(self) -> dict[str, Any]:
        """JSON values; numbers that JSON does not have (an infinite ratio) become null."""
        document = asdict(self) | {"a": str(self.a), "b": str(self.b), "source": self.source and str(self.source)}
        for entry, layer in zip(document["layers"], self.layers, strict=True):
            entry["better"] = layer.better
        return finite(document)


def compare(
    a: str | Path | Checkpoint,
    b: str | Path | Checkpoint,
    source: str | Path | Checkpoint | None = None,
    *,
    options: Options | None = None,
    watcher: Watcher | None = None,
    stop: threading.Event | None = None,
) -> Comparison:
    """Decode the weights that are quantized in `a` or `b` by tiles and compare them, with the source's where it is given.

    Raises a CheckpointError when a file is malformed, has nothing in common with the other, or lacks what the source has.
    """
    started = time.monotonic()
    options, watcher = options or Options(), watcher or Unwatched()
    contents = [read_contents(part) for part in (a, b, source) if part is not None]
    for part in contents:
        refuse_adapter(part.checkpoint)
    keys, unreadable = _common(contents)
    with ExitStack() as stack:
        readers = [stack.enter_context(TileReader(part.checkpoint, options.effective_io)) for part in contents]
        watcher.started(sum(contents[0].checkpoint.tensors[key].info.nbytes for key in keys))
        sums: dict[str, tuple[Difference, ...]] = {}
        for key, found, share in in_order(_jobs(keys, contents, readers), options.effective_threads, stop):
            for total, part in zip(sums.setdefault(key, (Difference(), Difference(), Difference())), found, strict=True):
                total.add(part)
            watcher.progress(key, round(share * contents[0].checkpoint.tensors[key].info.nbytes))
        for reader in readers:
            reader.confirm()
    layers = tuple(_compared(key, contents, sums.get(key, (Difference(),) * 3)) for key in keys)
    first, second = (set(part.plain) | {layer.key for layer in part.layers.values()} for part in contents[:2])
    return Comparison(
        contents[0].checkpoint.path,
        contents[1].checkpoint.path,
        contents[2].checkpoint.path if source is not None else None,
        layers,
        tuple(sorted(first - second)),
        tuple(sorted(second - first)),
        len((first & second) - set(keys) - set(unreadable)),
        contents[0].checkpoint.size,
        contents[1].checkpoint.size,
        time.monotonic() - started,
        unreadable,
    )


def _common(contents: list[Contents]) -> tuple[list[str], dict[str, str]]:
    """The weights to compare: quantized in one of the two, and readable in all files, in the first's order; and why others
    cannot be compared. Raises CheckpointError when there are none.
    """
    a, b = contents[:2]
    quantized = {layer.key for part in (a, b) for layer in part.layers.values()}
    shared = [key for key in a.checkpoint.tensors if key in quantized and key in b.checkpoint.tensors]
    unreadable = {key: reason for key in shared if (reason := _why_not(key, contents))}
    keys = [key for key in shared if key not in unreadable]
    where = " and ".join(printable(str(part.checkpoint.path), 300) for part in (a, b))
    if not keys and unreadable:
        key, reason = next(iter(unreadable.items()))
        raise errors.CheckpointError(f"No weight of {where} can be compared: {printable(key)} {reason}.")
    if not keys:
        for part in contents:
            refuse_foreign(part)
        raise errors.CheckpointError(
            f"{where} have no quantized weight in common: they are different models, or neither is quantized."
        )
    return keys, unreadable


def _why_not(key: str, contents: list[Contents]) -> str | None:
    """Why a weight cannot be compared, as a clause."""
    shapes = []
    for word, part in zip(("A", "B", "the source"), contents, strict=False):
        layout, layer = part.weight(key), part.layers.get(key.removesuffix(".weight"))
        if layout is None and layer is not None:
            return f"cannot be decoded in {word}: {'; '.join(layer.faults)}"
        if layout is None:
            return f"is missing from {word}" if key not in part.checkpoint.tensors else f"holds no weights in {word}"
        shapes.append(layout.shape)
    if len(set(shapes)) > 1:
        return f"has different shapes: {' and '.join(str(list(shape)) for shape in shapes)}"
    return None


def _jobs(
    keys: list[str], contents: list[Contents], readers: list[TileReader]
) -> Iterator[Callable[[], tuple[str, list[Difference], float]]]:
    for key in keys:
        layouts = [part.weight(key) for part in contents]
        chosen = iter(tiles(layouts[0].shape))
        while together := list(islice(chosen, TILES_TOGETHER)):
            yield partial(_measure, key, layouts, readers, together)


def _measure(
    key: str, layouts: list[Layout], readers: list[TileReader], ranges: list[tuple[int, int]]
) -> tuple[str, list[Difference], float]:
    """(a against b, source against a, source against b) over some ranges, and their share of the weight."""
    totals = [Difference(), Difference(), Difference()]
    (a, b), (read_a, read_b) = layouts[:2], (reader.tile for reader in readers[:2])
    for begin, end in ranges:
        totals[0].add(difference(b, read_b, a, read_a, begin, end))
        if len(layouts) == 3:
            source, read_source = layouts[2], readers[2].tile
            totals[1].add(difference(a, read_a, source, read_source, begin, end))
            totals[2].add(difference(b, read_b, source, read_source, begin, end))
    share = sum(end - begin for begin, end in ranges) / math.prod(layouts[0].shape)
    return key, totals, share


def _compared(key: str, contents: list[Contents], sums: tuple[Difference, ...]) -> Compared:
    sides = []
    for part, against_source in zip(contents[:2], sums[1:], strict=True):
        layer = part.layers.get(key.removesuffix(".weight"))
        info = part.checkpoint.tensors[key].info
        error = against_source.relative_error if len(contents) == 3 else None
        if layer is None:
            sides.append(Side(info.dtype, "not quantized", info.nbytes, error))
        else:
            sides.append(Side(layer.format, layer.detail, layer.nbytes, error))
    return Compared(key, contents[0].weight(key).shape, *sides, sums[0].relative_error)
