"""Is an output what its source should have become? Every byte hashed, every layer decoded and compared, faults named.

Memory is that of a few tiles: both files are read by ranges, whatever their size.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from streamquant.checkpoint.reader import Checkpoint, SourceTensor, TileReader, open_checkpoint
from streamquant.formats.plain import round_to_bf16
from streamquant.options import Options
from streamquant.pairing import Pair, Pairing, pair_up
from streamquant.prefetch import Prefetcher
from streamquant.stored import Contents, Layout, Plain, ScaledCodes, read_contents, tiles
from streamquant.stored.diagnosis import Case, diagnose
from streamquant.stored.difference import Difference, measure
from streamquant.stored.expectation import nearest_error
from streamquant.stored.parallel import in_order, together
from streamquant.verdict import Finding, LayerCheck, Unwatched, Verdict, Watcher

# Times the error of rounding to nearest, from which a layer is a suspect. Learned rounding raises the error of the weights
# (it lowers that of the layer's outputs): by a third where it knows the inputs, by three quarters with --objective svd.
OUT_OF_LINE = 2.5
# A sound layer times this comes no nearer to its source: 1, but for a share of the squared error.
FACTOR_TOLERANCE, FACTOR_SHARE = 0.02, 3.0
AS_NEAREST = 1.02  # times that error is still that error; a scale that is off by so much as to be noticed adds more
ALWAYS_SUSPECT = 0.5  # a relative error that needs an explanation where there is nothing to compare it with
CHUNK = 8 << 20  # bytes hashed or compared at a time
TILES_TOGETHER = 16  # tiles of one piece of work
EXAMINED = 4  # tiles that are encoded afresh for comparison, beside the worst
SMALL = 1 << 20  # bytes up to which a tensor is hashed even in a quick look

# How many bytes it goes through, and what does so: (kind of comparison, whom it is about, what it found, bytes done).
_Job = tuple[int, Callable[[], tuple[str, Any, Any, int]]]


def verify(
    source: str | Path | Checkpoint,
    output: str | Path | Checkpoint,
    *,
    sample: float = 1.0,
    options: Options | None = None,
    watcher: Watcher | None = None,
    stop: threading.Event | None = None,
) -> Verdict:
    """Compare `output` with the `source` it was converted from.

    sample: share of each layer to look at (at least a tile); below 1 only small tensors are hashed. Raises a
    CheckpointError when one of the two is malformed, SourceReadError when reading fails, InterruptedRunError when `stop`
    is set. What is unsound is not raised but in the verdict.
    """
    started = time.monotonic()
    options, watcher = options or Options(), watcher or Unwatched()
    before, after = (read_contents(_opened(path)) for path in (source, output))
    pairing = pair_up(before, after)
    with (
        TileReader(before.checkpoint, options.effective_io) as reader,
        TileReader(after.checkpoint, options.effective_io) as output_reader,
        Prefetcher(_ranges(pairing, before, after, reader, output_reader) if sample >= 1 else []) as prefetcher,
    ):
        check = _Check(before, after, pairing, reader, output_reader, sample)
        watcher.started(round(sum(pair.source_bytes for pair in pairing.pairs) * sample))
        for pair, nbytes in check.run(options.effective_threads, stop):
            prefetcher.advance(nbytes + nbytes * pair.output_bytes // max(pair.source_bytes, 1))
            watcher.progress(pair.key, nbytes)
        layers = check.layers(options.effective_threads, stop)
    return check.verdict(layers, time.monotonic() - started)


def _opened(path: str | Path | Checkpoint) -> Checkpoint:
    return path if isinstance(path, Checkpoint) else open_checkpoint(path)


def _ranges(
    pairing: Pairing, before: Contents, after: Contents, reader: TileReader, output_reader: TileReader
) -> list[tuple[int, int, int]]:
    """(descriptor, offset, bytes) in the order in which tensors are read."""
    ranges = []
    for pair in pairing.pairs:
        for contents, tile_reader, tensors in ((before, reader, pair.source), (after, output_reader, pair.output)):
            for tensor in tensors:
                start = contents.checkpoint.files[tensor.file].header.data_start + tensor.info.start
                ranges.append((tile_reader.descriptor(tensor.file), start, tensor.info.nbytes))
    return ranges


@dataclass
class _Sum:
    """What one pair has come to. worst: the range of the largest relative error. absmax: of the source so far."""

    difference: Difference = field(default_factory=Difference)
    worst: tuple[float, int, int] = (-1.0, 0, 0)
    absmax: float = 0.0
    unequal: int = 0

    def add(self, other: _Sum) -> None:
        self.difference.add(other.difference)
        self.worst = max(self.worst, other.worst)
        self.absmax = max(self.absmax, other.absmax)
        self.unequal += other.unequal


class _Check:
    """One verification under way."""

    def __init__(
        self, before: Contents, after: Contents, pairing: Pairing, reader: TileReader, output_reader: TileReader, sample: float
    ):
        self.before, self.after, self.pairing, self.sample = before, after, pairing, sample
        self.reader, self.output_reader = reader, output_reader
        self.sums: dict[str, _Sum] = {}
        self.findings = [
            Finding("missing" if "missing" in text else "tensor", key, text) for key, text in pairing.faults.items()
        ]
        self.hashes: dict[str, str] = {}
        for entry in after.provenance:
            self.hashes |= entry.hashes if entry else {}
        self.hashed = [0, 0]

    def run(self, threads: int, stop: threading.Event | None) -> Iterator[tuple[Pair, int]]:
        """Hash and compare everything; yields (pair, source bytes done) as it goes on."""
        current: Pair | None = None
        finished = in_order(together(self._jobs()), threads, stop)
        for kind, owner, result, nbytes in chain.from_iterable(finished):
            if kind == "hash":
                self._take_hash(owner, result)
                continue
            self.sums.setdefault(owner.key, _Sum()).add(result)
            if current is not None and current is not owner:
                self._release(current)
            current = owner
            yield owner, nbytes

    def _release(self, pair: Pair) -> None:
        """Give the pages of a pair that is done with back."""
        for reader, tensors in ((self.reader, pair.source), (self.output_reader, pair.output)):
            for tensor in tensors:
                reader.release(tensor)

    def _jobs(self) -> Iterator[_Job]:
        paired: set[str] = set()
        for pair in self.pairing.pairs:
            tensors = list(pair.output)
            if pair.layer is not None:
                tensors = list(pair.layer.tensors.values())
            paired |= {tensor.name for tensor in tensors}
            yield from self._hash_jobs(tensors)
            yield from self._compare_jobs(pair)
        rest = [tensor for name, tensor in self.after.checkpoint.tensors.items() if name not in paired]
        yield from self._hash_jobs(rest)

    def _hash_jobs(self, tensors: list[SourceTensor]) -> Iterator[_Job]:
        for tensor in tensors:
            if tensor.name in self.hashes and (self.sample >= 1 or tensor.info.nbytes <= SMALL):
                yield tensor.info.nbytes, partial(self._hash, tensor)

    def _hash(self, tensor: SourceTensor) -> tuple[str, Any, Any, int]:
        hasher = xxhash.xxh3_64()
        for begin in range(0, tensor.info.nbytes, CHUNK):
            hasher.update(self.output_reader.tile(tensor, begin, min(begin + CHUNK, tensor.info.nbytes)))
        return "hash", tensor, hasher.hexdigest(), 0

    def _take_hash(self, tensor: SourceTensor, found: str) -> None:
        if found == self.hashes[tensor.name]:
            self.hashed[0] += 1
            self.hashed[1] += tensor.info.nbytes
        else:
            text = "its bytes are not those that the conversion wrote: the file was damaged or changed afterwards"
            self.findings.append(Finding("hash", tensor.name, text))

    def _compare_jobs(self, pair: Pair) -> Iterator[_Job]:
        if pair.kind == "copy":
            ranges = [
                (number, begin, min(begin + CHUNK, tensor.info.nbytes))
                for number, tensor in enumerate(pair.source)
                for begin in range(0, tensor.info.nbytes, CHUNK)
            ]
            for number, begin, end in _spread(ranges, self.sample):
                yield end - begin, partial(self._compare_bytes, pair, number, begin, end)
            return
        if self.sample < 1:
            chosen = _spread(list(tiles(pair.layout.shape)), self.sample)
        else:
            chosen = tiles(pair.layout.shape)
        chosen = iter(chosen)
        compare = self._compare_cast if pair.kind == "cast" else self._compare_weight
        while ranges := list(islice(chosen, TILES_TOGETHER)):
            yield _bytes_of(pair, ranges), partial(compare, pair, ranges)

    def _compare_bytes(self, pair: Pair, number: int, begin: int, end: int) -> tuple[str, Any, Any, int]:
        left = np.frombuffer(self.reader.tile(pair.source[number], begin, end), dtype=np.uint8)
        right = np.frombuffer(self.output_reader.tile(pair.output[number], begin, end), dtype=np.uint8)
        unequal = 0 if np.array_equal(left, right) else int(np.count_nonzero(left != right))
        return "copy", pair, _Sum(unequal=unequal), end - begin

    def _compare_cast(self, pair: Pair, ranges: list[tuple[int, int]]) -> tuple[str, Any, Any, int]:
        """A cast is right when every value is the source's, rounded to nearest."""
        total = _Sum()
        for begin, end in ranges:
            reference = pair.reference.decode(self.reader.tile, begin, end).values
            values = pair.layout.decode(self.output_reader.tile, begin, end).values
            total.unequal += int(np.count_nonzero(~_same_numbers(_cast(reference, pair.output[0].info.dtype), values)))
        return "cast", pair, total, _bytes_of(pair, ranges)

    def _compare_weight(self, pair: Pair, ranges: list[tuple[int, int]]) -> tuple[str, Any, Any, int]:
        total = _Sum()
        needs_absmax = isinstance(pair.layout, ScaledCodes) and pair.layout.scale is not None
        needs_absmax = needs_absmax and pair.layout.scale.info.elements == 1
        for begin, end in ranges:
            reference = pair.reference.decode(self.reader.tile, begin, end).values
            tile = pair.layout.decode(self.output_reader.tile, begin, end)
            found = measure(tile.values, reference, begin)
            found.saturated = tile.saturated
            absmax = float(np.abs(reference).max(initial=0.0)) if needs_absmax else 0.0
            share = math.inf if found.nonfinite else found.relative_error
            total.add(_Sum(found, (share, begin, end), absmax))
        return "weight", pair, total, _bytes_of(pair, ranges)

    def layers(self, threads: int, stop: threading.Event | None) -> list[LayerCheck]:
        """Judge every pair by what was summed; suspects are diagnosed."""
        checks = []
        weights = [pair for pair in self.pairing.pairs if pair.kind == "weight"]
        for pair in self.pairing.pairs:
            unequal = self.sums.get(pair.key, _Sum()).unequal
            if unequal and pair.kind == "copy":
                text = f"it is not quantized and should be a copy, but {unequal:,} bytes differ"
                self.findings.append(Finding("bytes", pair.key, text))
            elif unequal:
                what = f"{pair.source[0].info.dtype} to {pair.output[0].info.dtype}"
                text = f"{unequal:,} of its values are not those of a cast from {what}"
                self.findings.append(Finding("cast", pair.key, text))
        judgements = ((pair.source_bytes, partial(self._judge, pair)) for pair in weights)
        for check in chain.from_iterable(in_order(together(judgements), threads, stop)):
            checks.append(check)
            if check.cause:
                self.findings.append(Finding("layer", check.key, check.cause))
        return checks

    def _judge(self, pair: Pair) -> LayerCheck:
        found = self.sums.get(pair.key, _Sum())
        difference, layer = found.difference, pair.layer
        faults = list(layer.faults) if layer else []
        expected, measured = self._examine(pair, found)
        if not faults and difference.elements and self._is_suspect(difference, expected, measured):
            faults = [diagnose(self._case(pair, found))]
        return LayerCheck(
            pair.key,
            layer.format if layer else pair.output[0].info.dtype,
            layer.detail if layer else "decoded",
            pair.reference.shape,
            pair.source_bytes,
            pair.output_bytes,
            difference.relative_error,
            difference.signal_to_noise,
            difference.cosine,
            difference.largest,
            difference.largest_at,
            difference.saturated_share,
            expected,
            "; ".join(faults) or None,
        )

    def _examine(self, pair: Pair, found: _Sum) -> tuple[float | None, float]:
        """(error of rounding to nearest, error as it is), over a few tiles and the worst; the pair of the worst ratio."""
        if isinstance(pair.layout, Plain):
            return 0.01, found.difference.relative_error  # decoded back: exact but for one more rounding
        absmax = found.absmax if self.sample >= 1 else None
        worst: tuple[float | None, float] = (None, found.difference.relative_error)
        ratio = -1.0
        for begin, end in _examined(pair.layout, found):
            reference = pair.reference.decode(self.reader.tile, begin, end).values
            expected = nearest_error(pair.layout, reference, absmax)
            if expected is None:
                continue
            values = pair.layout.decode(self.output_reader.tile, begin, end).values
            there = measure(values, reference)
            actual = math.inf if there.nonfinite else there.relative_error
            now = actual / expected if expected else (math.inf if actual else 0.0)
            if now > ratio:
                ratio, worst = now, (expected, actual)
        return worst

    @staticmethod
    def _is_suspect(difference: Difference, expected: float | None, measured: float) -> bool:
        if difference.nonfinite:
            return True
        if expected is None:
            return measured > ALWAYS_SUSPECT
        # Where the error is that of rounding to nearest no scale is wrong, though few different weights may all be rounded one
        # way; and where that error is all there is, nothing need be left of the weights.
        off = 0.0
        if difference.factor is not None and difference.weight and AS_NEAREST * expected < measured and expected < 1:
            off = abs(difference.factor - 1)
        return measured > OUT_OF_LINE * expected or off > FACTOR_TOLERANCE + FACTOR_SHARE * expected**2

    def _case(self, pair: Pair, found: _Sum) -> Case:
        def others() -> Iterator[tuple[str, Layout]]:
            for other in self.pairing.pairs:
                if other.key != pair.key and other.reference is not None and other.reference.shape == pair.reference.shape:
                    yield other.key, other.reference

        absmax = found.absmax if self.sample >= 1 else None
        ranges = tuple(_examined(pair.layout, found))
        return Case(pair.layout, pair.reference, self.output_reader.tile, self.reader.tile, ranges, absmax, others)

    def verdict(self, layers: list[LayerCheck], seconds: float) -> Verdict:
        """Everything together."""
        copies = [pair for pair in self.pairing.pairs if pair.kind == "copy"]
        return Verdict(
            self.before.checkpoint.path,
            self.after.checkpoint.path,
            self.before.architecture.title,
            tuple(layers),
            tuple(self.findings),
            (len(copies), sum(pair.source_bytes for pair in copies)),
            self.pairing.removed,
            (self.hashed[0], self.hashed[1]),
            len(self.hashes),
            len(self.after.checkpoint.tensors),
            self.sample,
            self.before.checkpoint.size,
            self.after.checkpoint.size,
            seconds,
            tuple(_notes(self.before, self.after, self.hashes)),
        )


def _notes(before: Contents, after: Contents, hashes: dict[str, str]) -> Iterator[str]:
    if hashes and len(hashes) < len(after.checkpoint.tensors):
        without = len(after.checkpoint.tensors) - len(hashes)
        yield f"{without:,} tensors of the output carry no hash: they lie in files without manifest."
    if not hashes:
        yield "The output carries no manifest of hashes: another tool wrote it, and only its weights can be compared."
    recorded = {part.get("header_sha256") for entry in after.provenance if entry for part in entry.source}
    if recorded and not recorded & {file.header.sha256 for file in before.checkpoint.files}:
        yield "The output says that it was made from another file than this source (their headers differ)."


def _examined(layout: Layout, found: _Sum) -> list[tuple[int, int]]:
    """A few tiles from all over the layer, and the worst one, in order."""
    ranges = set(_spread(list(tiles(layout.shape)), 0.0, EXAMINED))
    if found.worst[2]:
        ranges.add(found.worst[1:])
    return sorted(ranges)


def _spread(ranges: list, share: float, at_least: int = 1) -> list:
    """About that share of the ranges, evenly spread."""
    count = min(max(math.ceil(share * len(ranges)), at_least), len(ranges))
    return [ranges[index] for index in np.linspace(0, len(ranges) - 1, count).round().astype(int)] if count else []


def _bytes_of(pair: Pair, ranges: list[tuple[int, int]]) -> int:
    """Bytes of the source's weight in these ranges."""
    total = max(math.prod(pair.reference.shape), 1)
    return round(pair.source_bytes * sum(end - begin for begin, end in ranges) / total)


def _cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to a floating dtype, as float32."""
    if dtype == "BF16":
        return (round_to_bf16(values).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32) if dtype == "F16" else values


def _same_numbers(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left == right) | (np.isnan(left) & np.isnan(right))
