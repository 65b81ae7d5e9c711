"""A quantized checkpoint back to a plain one: every layer decoded, everything else copied, scales and markers left out.

As in a conversion the output is planned to the byte, poured tile by tile in constant memory, hashed, and given its name
only when it is complete.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from streamquant import errors
from streamquant.budget import anonymous_bytes
from streamquant.checkpoint.calls import remove
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.reader import Checkpoint, SourceTensor, TileReader, open_checkpoint
from streamquant.checkpoint.writer import Names, PartialFile
from streamquant.formats.plain import round_to_bf16
from streamquant.options import Options
from streamquant.output_file import PlannedOutput, planned_file
from streamquant.preflight import check_destination, check_disk
from streamquant.stored import Contents, Layout, StoredLayer, read_contents, tiles
from streamquant.stored.adapter import refuse_adapter
from streamquant.stored.contents import decodable, is_legacy_marker, refuse_foreign
from streamquant.stored.parallel import in_order
from streamquant.verdict import Unwatched, Watcher

DTYPES = ("BF16", "F16", "F32")
CHUNK = 8 << 20  # bytes copied at a time
AGAIN = "nothing is left behind, mend the cause and start again from the beginning"


@dataclass(frozen=True)
class Piece:
    """One tensor of the output: decoded by `layout`, or a copy of `source`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: SourceTensor
    layout: Layout | None


@dataclass(frozen=True, kw_only=True)
class DequantizePlan(PlannedOutput):
    """One file. pieces: its tensors, by name. left_out: tensors of the source that have no place in a plain checkpoint.
    layers: those that are decoded.
    """

    pieces: dict[str, Piece]
    left_out: tuple[str, ...]
    layers: tuple[StoredLayer, ...]


@dataclass(frozen=True)
class Dequantized:
    """A finished run. formats: format -> decoded layers. seconds: wall time."""

    source: Path
    output: Path
    formats: dict[str, int]
    copied: int
    left_out: int
    source_bytes: int
    output_bytes: int
    seconds: float
    peak_anonymous_bytes: int


def plan_dequantize(contents: Contents, name: str, dtype: str | None = None) -> DequantizePlan:
    """Plan from headers and markers alone.

    name: the output's file name. dtype: "BF16", "F16" or "F32" for the decoded layers; None takes for each layer the dtype
    that it was made from where the file says so, else BF16. Raises CheckpointError for a layer that cannot be decoded,
    NothingToConvertError when no layer is quantized.
    """
    where = printable(str(contents.checkpoint.path), 300)
    refuse_adapter(contents.checkpoint)
    refuse_foreign(contents)
    decodable(contents.layers.values())
    if not contents.layers:
        raise errors.NothingToConvertError(f"No layer of {where} is quantized: it is a plain checkpoint already.")
    pieces = {}
    for layer in contents.layers.values():
        pieces[layer.key] = Piece(
            layer.key, dtype or layer.origin or "BF16", layer.shape, layer.tensors["weight"], layer.layout
        )
    for name_, tensor in contents.plain.items():
        if not is_legacy_marker(name_):
            pieces[name_] = Piece(name_, tensor.info.dtype, tensor.info.shape, tensor, None)
    left_out = tuple(key for key in contents.checkpoint.tensors if key not in pieces)
    tensors = ((piece.name, piece.dtype, piece.shape) for piece in pieces.values())
    decoded: dict[str, list[str]] = {}
    for layer in contents.layers.values():
        decoded.setdefault(layer.format, []).append(layer.key)
    file = planned_file(name, tensors, contents.checkpoint, {"dequantized": True, "decoded": decoded})
    return DequantizePlan(
        checkpoint=contents.checkpoint, files=(file,), pieces=pieces, left_out=left_out, layers=tuple(contents.layers.values())
    )


def dequantize(
    source: str | Path | Checkpoint,
    destination: str | Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    options: Options | None = None,
    watcher: Watcher | None = None,
    stop: threading.Event | None = None,
) -> Dequantized:
    """Decode `source` (one file, or shards) into the single file `destination`.

    Arithmetic is in float32, rounded once to the dtype. Raises a StreamquantError for everything that can go wrong, as
    NonFiniteError when a layer decodes to NaN or infinity; nothing is left behind then.
    """
    if dtype not in (None, *DTYPES):
        raise errors.UsageError(f"Cannot write {dtype!r}: take BF16, F16 or F32.")
    started = time.monotonic()
    options, watcher, destination = options or Options(), watcher or Unwatched(), Path(destination)
    checkpoint = open_checkpoint(source)
    plan = plan_dequantize(read_contents(checkpoint), destination.name, dtype)
    check_destination(plan, destination, force)
    check_disk(plan, destination.parent)
    names, planned = Names.fresh(destination), plan.files[0]
    file = PartialFile(names.partial(planned.name), names.final(planned.name), planned.size, AGAIN)
    try:
        file.create(planned.header)
        with TileReader(checkpoint, options.effective_io) as reader:
            peak = _pour(plan, file, reader, allow_nonfinite, options.effective_threads, watcher, stop)
            reader.confirm()
        _publish(file, force)
    except BaseException as failure:
        file.abandon()
        with contextlib.suppress(errors.DestinationWriteError):  # the first failure is the one to be told
            remove(file.partial)
        if isinstance(failure, errors.InterruptedRunError):
            raise errors.InterruptedRunError(
                "Interrupted; nothing is left behind, and the same command starts again from the beginning."
            ) from None
        raise
    formats: dict[str, int] = {}
    for layer in plan.layers:
        formats[layer.format] = formats.get(layer.format, 0) + 1
    copied = len(plan.pieces) - len(plan.layers)
    return Dequantized(
        checkpoint.path, destination, formats, copied, len(plan.left_out), checkpoint.size, plan.output_size,
        time.monotonic() - started, peak,
    )  # fmt: skip


def _publish(file: PartialFile, force: bool) -> None:
    try:
        file.publish(force)
    except errors.OutputExistsError:
        raise errors.OutputExistsError(
            f"{printable(str(file.final), 300)} appeared meanwhile: move it away, or use --force to replace it."
        ) from None


def _pour(
    plan: DequantizePlan,
    file: PartialFile,
    reader: TileReader,
    allow_nonfinite: bool,
    threads: int,
    watcher: Watcher,
    stop: threading.Event | None,
) -> int:
    """Write every tensor in file order, and the hashes last. Returns the peak of anonymous memory in bytes."""
    planned = plan.files[0]
    watcher.started(sum(tensor.nbytes for tensor in planned.tensors))
    hashers = {tensor.name: xxhash.xxh3_64() for tensor in planned.tensors}
    offsets = {tensor.name: len(planned.header) + tensor.start for tensor in planned.tensors}
    peak, current = anonymous_bytes(), None
    for piece, payload in in_order(_jobs(plan, reader, allow_nonfinite), threads, stop):
        file.write(offsets[piece.name], payload)
        hashers[piece.name].update(payload)
        offsets[piece.name] += len(payload)
        peak = max(peak, anonymous_bytes())
        watcher.progress(piece.name, len(payload))
        if current is not None and current is not piece:
            reader.release(current.source)
        current = piece
    digits = "".join(hashers[tensor.name].hexdigest() for tensor in planned.tensors)
    file.write(planned.hash_offset, memoryview(digits.encode()))
    return peak


def _jobs(plan: DequantizePlan, reader: TileReader, allow_nonfinite: bool) -> Iterator[Callable[[], tuple[Piece, memoryview]]]:
    for tensor in plan.files[0].tensors:
        piece = plan.pieces[tensor.name]
        if piece.layout is None:
            for begin in range(0, tensor.nbytes, CHUNK):
                yield partial(_copy, piece, reader, begin, min(begin + CHUNK, tensor.nbytes))
        else:
            for begin, end in tiles(piece.shape):
                yield partial(_decode, piece, reader, begin, end, allow_nonfinite)


def _copy(piece: Piece, reader: TileReader, begin: int, end: int) -> tuple[Piece, memoryview]:
    # A copy of its own: given to the system from a mapping, a page that cannot be read would seem a fault in writing.
    return piece, memoryview(np.array(reader.tile(piece.source, begin, end)))


def _decode(piece: Piece, reader: TileReader, begin: int, end: int, allow_nonfinite: bool) -> tuple[Piece, memoryview]:
    values = piece.layout.decode(reader.tile, begin, end).values
    rounded = _rounded(values, piece.dtype)
    if not allow_nonfinite:
        # Only the largest values can overflow, so the rounded ones tell everything.
        finite = np.isfinite(rounded) if rounded.dtype != np.uint16 else (rounded & 0x7F80) != 0x7F80
        if not finite.all():
            first = begin + int(np.argmin(finite))
            index = ", ".join(str(int(part)) for part in np.unravel_index(first, piece.shape))
            raise errors.NonFiniteError(
                f"{printable(piece.name)}[{index}] decodes to {values[first - begin]}, which {piece.dtype} holds as NaN or "
                f"infinity: the file is damaged there, or needs --dtype fp32; --allow-nonfinite writes it all the same."
            )
    return piece, memoryview(np.ascontiguousarray(rounded).reshape(-1).view(np.uint8))


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in a floating dtype, to nearest even: uint16 bits for BF16."""
    if dtype == "BF16":
        return round_to_bf16(values)
    with np.errstate(over="ignore"):
        return values.astype(np.float16) if dtype == "F16" else values
