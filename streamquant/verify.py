"""Is an output what its source should have become? Every byte hashed, every layer decoded and compared, faults named.

Memory is that of a few tiles: both files are read by ranges, whatever their size.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from streamquant.checkpoint.header import printable
from streamquant.checkpoint.reader import Checkpoint, SourceTensor, TileReader
from streamquant.formats.plain import round_to_bf16
from streamquant.judgement import Judge, PairSum, ranges_of, spread
from streamquant.kernels import why_no_jit
from streamquant.options import Options
from streamquant.pairing import Pair, Pairing, pair_up
from streamquant.prefetch import Prefetcher
from streamquant.preflight import is_compiled
from streamquant.stored import Contents, read_contents
from streamquant.stored.adapter import refuse_adapter
from streamquant.stored.contents import refuse_foreign
from streamquant.stored.diagnosis import LOOSE
from streamquant.stored.difference import compare
from streamquant.stored.parallel import in_order, together
from streamquant.verdict import Finding, LayerCheck, Unwatched, Verdict, Watcher

CHUNK = 8 << 20  # bytes hashed or compared at a time
TILES_TOGETHER = 16  # tiles of one piece of work
RELATIVES = 3  # layers that are near and yet wrong, from which it is said of the file
WRONG_WAY_ROUND = "says that it was made of this output: name the original first, and second what was made of it"
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
    before, after = read_contents(source), read_contents(output)
    for contents in (before, after):
        refuse_adapter(contents.checkpoint)
    refuse_foreign(after, before.checkpoint.tensors)  # a copy of them is compared byte for byte
    refuse_foreign(before, after.checkpoint.tensors)
    pairing = pair_up(before, after)
    with (
        TileReader(before.checkpoint, options.effective_io) as reader,
        TileReader(after.checkpoint, options.effective_io) as output_reader,
        Prefetcher(_ranges(pairing, before, after, reader, output_reader) if sample >= 1 else []) as prefetcher,
    ):
        if not why_no_jit() and not is_compiled("difference"):
            watcher.compiling()
        check = _Check(before, after, pairing, reader, output_reader, sample)
        watcher.started(round(sum(pair.source_bytes for pair in pairing.pairs) * sample))
        for pair, nbytes in check.run(options.effective_threads, stop):
            prefetcher.advance(nbytes + nbytes * pair.output_bytes // max(pair.source_bytes, 1))
            watcher.progress(pair.key, nbytes)
        layers = check.layers(options.effective_threads, stop)
        reader.confirm()
        output_reader.confirm()
    return check.verdict(layers, time.monotonic() - started)


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


class _Check:
    """One verification under way."""

    def __init__(
        self, before: Contents, after: Contents, pairing: Pairing, reader: TileReader, output_reader: TileReader, sample: float
    ):
        self.before, self.after, self.pairing, self.sample = before, after, pairing, sample
        self.reader, self.output_reader = reader, output_reader
        self.sums: dict[str, PairSum] = {}
        self.judge = Judge(pairing, after, reader.tile, output_reader.tile, sample, set())
        self.findings = [
            Finding("missing" if "missing" in text else "tensor", key, text) for key, text in pairing.faults.items()
        ]
        self.hashes: dict[str, str] = {}
        for entry in filter(None, after.provenance):
            self.hashes |= entry.hashes
            if entry.fault:
                self.findings.append(Finding("manifest", "", entry.fault))
        self.hashed = [0, 0]

    def run(self, threads: int, stop: threading.Event | None) -> Iterator[tuple[Pair, int]]:
        """Hash and compare everything; yields (pair, source bytes done) as it goes on."""
        current: Pair | None = None
        finished = in_order(together(self._jobs()), threads, stop)
        for kind, owner, result, nbytes in chain.from_iterable(finished):
            if kind == "hash":
                self._take_hash(owner, result)
                continue
            self.sums.setdefault(owner.key, PairSum()).add(result)
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
            self.judge.intact.add(tensor.name)
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
            for number, begin, end in spread(ranges, self.sample):
                yield end - begin, partial(self._compare_bytes, pair, number, begin, end)
            return
        chosen = iter(ranges_of(pair.layout, self.sample))
        compare = self._compare_cast if pair.kind == "cast" else self._compare_weight
        while ranges := list(islice(chosen, TILES_TOGETHER)):
            yield _bytes_of(pair, ranges), partial(compare, pair, ranges)

    def _compare_bytes(self, pair: Pair, number: int, begin: int, end: int) -> tuple[str, Any, Any, int]:
        left = np.frombuffer(self.reader.tile(pair.source[number], begin, end), dtype=np.uint8)
        right = np.frombuffer(self.output_reader.tile(pair.output[number], begin, end), dtype=np.uint8)
        unequal = 0 if np.array_equal(left, right) else int(np.count_nonzero(left != right))
        return "copy", pair, PairSum(unequal=unequal), end - begin

    def _compare_cast(self, pair: Pair, ranges: list[tuple[int, int]]) -> tuple[str, Any, Any, int]:
        """A cast is right when every value is the source's, rounded to nearest."""
        total = PairSum()
        for begin, end in ranges:
            reference = pair.reference.decode(self.reader.tile, begin, end).values
            values = pair.layout.decode(self.output_reader.tile, begin, end).values
            total.unequal += int(np.count_nonzero(~_same_numbers(_cast(reference, pair.output[0].info.dtype), values)))
        return "cast", pair, total, _bytes_of(pair, ranges)

    def _compare_weight(self, pair: Pair, ranges: list[tuple[int, int]]) -> tuple[str, Any, Any, int]:
        total = PairSum()
        for begin, end in ranges:
            found = compare(pair.layout, self.output_reader.tile, pair.reference, self.reader.tile, begin, end)
            share = math.inf if found.nonfinite else found.relative_error
            total.add(PairSum(found, array("d", [share])))
        return "weight", pair, total, _bytes_of(pair, ranges)

    def layers(self, threads: int, stop: threading.Event | None) -> list[LayerCheck]:
        """Judge every pair by what was summed; suspects are diagnosed."""
        checks = []
        weights = [pair for pair in self.pairing.pairs if pair.kind == "weight"]
        for pair in self.pairing.pairs:
            unequal = self.sums.get(pair.key, PairSum()).unequal
            if unequal and pair.kind == "copy":
                self.findings.append(Finding("bytes", pair.key, self._copy_fault(pair, unequal)))
            elif unequal:
                what = f"{pair.source[0].info.dtype} to {pair.output[0].info.dtype}"
                text = f"{unequal:,} of its values are not those of a cast from {what}"
                self.findings.append(Finding("cast", pair.key, text))
        judging = ((pair.source_bytes, partial(self.judge.layer, pair, self.sums.get(pair.key, PairSum()))) for pair in weights)
        for check in chain.from_iterable(in_order(together(judging), threads, stop)):
            checks.append(check)
            if check.cause:
                self.findings.append(Finding("layer", check.key, check.cause))
        self.findings[:0] = self._of_another_model(checks)
        if self.findings and _made_from(self.before, self.after):
            self.findings = [Finding("order", "", f"this source {WRONG_WAY_ROUND}")]
        return checks

    def _copy_fault(self, pair: Pair, unequal: int) -> str:
        """What is wrong with a tensor that should be a copy; a small one is looked for among the others."""
        info = pair.output[0].info
        if len(pair.source) == 1 and info.nbytes <= SMALL:
            other = self._small_copies.get(_content(self.output_reader, pair.output[0]))
            if other is not None:
                return f"it should be a copy, and holds the bytes of {printable(other)}"
        differ = "1 byte differs" if unequal == 1 else f"{unequal:,} bytes differ"
        return f"it is not quantized and should be a copy, but {differ}"

    @cached_property
    def _small_copies(self) -> dict[tuple[str, tuple[int, ...], str], str]:
        """The small tensors of the source that should be copied, by what they are and hold."""
        tensors = ((pair.key, pair.source[0]) for pair in self.pairing.pairs if pair.kind == "copy" and len(pair.source) == 1)
        return {_content(self.reader, tensor): key for key, tensor in tensors if tensor.info.nbytes <= SMALL}

    def _of_another_model(self, layers: list[LayerCheck]) -> Iterator[Finding]:
        """Most layers are near their source and yet not made of it: they were made of a relative."""
        near = [layer for layer in layers if layer.cause == LOOSE]
        if len(near) >= RELATIVES and 2 * len(near) > len(layers):
            yield Finding("source", "", (
                f"{len(near):,} of {len(layers):,} layers resemble the source without being made of it: the output was made of "
                f"another version of the model (a fine-tune, another training step)"
            ))  # fmt: skip

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
            (*_notes(self.before, self.after, self.hashes, not self.findings), *_decoded_note(layers, self.pairing)),
        )


def _notes(before: Contents, after: Contents, hashes: dict[str, str], sound: bool) -> Iterator[str]:
    if hashes and len(hashes) < len(after.checkpoint.tensors):
        without = len(after.checkpoint.tensors) - len(hashes)
        yield f"{without:,} tensors of the output carry no hash: they lie in files without manifest."
    if not hashes:
        yield "The output carries no manifest of hashes: another tool wrote it, and only its weights can be compared."
    if sound and _made_from(before, after):
        yield f"The source {WRONG_WAY_ROUND}."
    if not after.decoded and _made_from(after, before) is False:
        yield "The output says that it was made from another file than this source (their headers differ)."


def _made_from(made: Contents, original: Contents) -> bool | None:
    """Whether one says that it was made from the other; None when it does not say from what."""
    recorded = {part.get("header_sha256") for entry in made.provenance if entry for part in entry.source}
    return bool(recorded & {file.header.sha256 for file in original.checkpoint.files}) if recorded else None


def _decoded_note(layers: list[LayerCheck], pairing: Pairing) -> Iterator[str]:
    """What is said of an output that was decoded back, and is compared with what its quantized form was made from."""
    formats = {pair.key: pair.decoded_from for pair in pairing.pairs if pair.decoded_from is not None}
    found = [layer.relative_error for layer in layers if layer.key in formats]
    if not found:
        return
    names = ", ".join(printable(name, 40) for name in dict.fromkeys(formats.values()))
    mean = math.fsum(found) / len(found) if all(map(math.isfinite, found)) else math.inf
    holds = "holds no quantized layer" if not any(pair.layer for pair in pairing.pairs) else "holds decoded layers"
    yield (
        f"The output {holds}: {len(found):,} of its weights were decoded from {names}, and are compared as weights. They are "
        f"within {mean:.2%} of the source on average, {max(found):.2%} at worst."
    )


def _content(reader: TileReader, tensor: SourceTensor) -> tuple[str, tuple[int, ...], str]:
    """dtype, shape and a hash of the bytes of a small tensor."""
    info = tensor.info
    return info.dtype, info.shape, xxhash.xxh3_128_hexdigest(reader.tile(tensor, 0, info.nbytes))


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
