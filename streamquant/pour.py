"""The loop: tiles are read, computed and written by worker threads, and committed in order, inside a memory budget.

The main thread hands out tiles and commits them strictly in the order of the plan (hash, journal, statistics). So the
journal is always a prefix of the work, whatever order the workers finish in, and a tensor's hash is a running hash. A
format that needs the whole tensor first has its first pass scheduled one unit ahead, so that no worker waits for it. A
unit of one tile is finished by its worker, small ones many to a task (`streamquant.batch`).
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import numpy as np
import xxhash

from streamquant import errors
from streamquant.batch import Batch, Pieces, bytes_of, finish_unit, sums_record
from streamquant.budget import TileSizes, anonymous_bytes
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.reader import TileReader
from streamquant.formats import Encoded, Encoder, Fill
from streamquant.formats.plain import to_float32
from streamquant.kernels import select
from streamquant.options import Observer, Options
from streamquant.plan import Plan, Unit
from streamquant.prefetch import Prefetcher
from streamquant.report import LayerResult, layer_result
from streamquant.rounding.knowledge import LayerKnowledge
from streamquant.session import Session
from streamquant.work import Tile, Work

SYNC_BYTES = 128 << 20  # how much may be written before it is made durable; costs nothing, the disk is busy anyway
FILL_CHUNK = 1 << 20


class Pour:
    """One run of the loop over all units that are not done yet."""

    def __init__(self, plan: Plan, session: Session, reader: TileReader, prefetcher: Prefetcher, options: Options,
                 device: str, tiles: TileSizes, knowledge: LayerKnowledge, observer: Observer,
                 stop: threading.Event):  # fmt: skip
        self.plan, self.session, self.options, self.device = plan, session, options, device
        self.knowledge = knowledge
        self.reader, self.prefetcher = reader, prefetcher
        self.tiles, self.observer, self.stop = tiles, observer, stop
        self.peak = anonymous_bytes()
        self._local = threading.local()
        self.results: dict[int, LayerResult] = {}
        self._in_flight: deque[Tile | Batch] = deque()
        self._batch = Batch(0)
        self._unsynced = 0
        self._warned = False
        self._sync: tuple[Future, int] | None = None

    def run(self) -> None:
        """Convert every unit that is not done, publish every file. Raises a StreamquantError."""
        todo = [unit for unit in self.plan.units if unit.index not in self.session.done]
        done_bytes = sum(self.plan.units[index].source_bytes for index in self.session.done)
        self.observer.started(self.plan, self.tiles, done_bytes)
        begun = [(self.plan.units[index], record["end"]) for index, record in self.session.begun.items()]
        begun_bytes = sum(unit.source_bytes_of(0, end) for unit, end in begun)
        self.prefetcher.advance(done_bytes + begun_bytes)
        with contextlib.ExitStack() as stack:
            self.pool = ThreadPoolExecutor(self.options.effective_threads, "tile")
            stack.callback(self.pool.shutdown, wait=True, cancel_futures=True)
            self.syncer = ThreadPoolExecutor(1, "sync")
            stack.callback(self.syncer.shutdown, wait=True)
            self._publish_complete()
            for work, observing in self._schedule(todo):
                if isinstance(work, Unit):
                    self._join_batch(work)
                else:
                    self._hand_out(work, observing)
            self._hand_out_batch()
            while self._in_flight:
                self._commit_next()
            self._publish_complete()

    def _schedule(self, todo: list[Unit]) -> Iterator[tuple[Work | Unit, bool]]:
        """(work, whether to observe it): first passes one unit ahead of the encoding. A unit is done at once."""
        waiting: Work | Unit | None = None
        for unit in todo:
            if self._done_at_once(unit):
                if waiting is not None:
                    yield waiting, False
                waiting = unit
                continue
            work = Work(unit)
            if record := self.session.begun.get(unit.index):
                work.take_up(record, self.session)
                self.observer.progress(unit, unit.source_bytes_of(0, work.begin))
            elif work.observes and unit.index in self.session.learned:
                work.skip_first_pass(self.session.learned[unit.index])
            if self.knowledge.origin(unit):
                work.preparation = self.pool.submit(self.knowledge.converter, unit)
            if work.observes:
                yield work, True
            if waiting is not None:
                yield waiting, False
            waiting = work
        if waiting is not None:
            yield waiting, False

    def _done_at_once(self, unit: Unit) -> bool:
        """Whether one tile holds the unit, and nothing of it needs to be prepared or taken up."""
        if unit.elements > self.tiles.elements[unit.index] or unit.index in self.session.begun:
            return False
        return not self.knowledge.refines(unit)

    def _join_batch(self, unit: Unit) -> None:
        file = self.plan.file_of(unit)
        if not self._batch.takes(unit, file, self.tiles.batch_bytes):
            self._hand_out_batch(file)
        self._batch.add(unit)

    def _hand_out_batch(self, next_file: int = 0) -> None:
        """Submit the units that have come together."""
        batch, self._batch = self._batch, Batch(next_file)
        if batch.units:
            self._make_room()
            batch.future = self.pool.submit(self._convert, batch.units)
            self._in_flight.append(batch)

    def _make_room(self) -> None:
        """Commit what was handed out first until another task is within the budget."""
        while len(self._in_flight) >= self.tiles.in_flight:
            self._commit_next()

    def _hand_out(self, work: Work, observing: bool) -> None:
        """Submit the tiles of one pass over one unit, committing finished ones to stay within the budget."""
        self._hand_out_batch()
        if work.preparation is not None:
            work.encoder.rounding = self._prepared(work.preparation)
        while not observing and not work.learned:
            self._commit_next()
        unit, size = work.unit, self.tiles.elements[work.unit.index]
        for begin in range(0 if observing else work.begin, unit.elements, size):
            self._make_room()
            end = min(begin + size, unit.elements)
            future = self.pool.submit(self._compute, work, begin, end, observing)
            self._in_flight.append(Tile(work, begin, end, observing, future))

    def _prepared(self, preparation: Future) -> Any:
        """Wait for a layer's converter, committing what finishes meanwhile."""
        while not wait_for([preparation], timeout=0.2).done:
            if self.stop.is_set():
                self._halt()
            if self._in_flight and self._in_flight[0].future.done():
                self._commit_next()
        return preparation.result()

    def _compute(self, work: Work, begin: int, end: int, observing: bool) -> Any:
        """In a worker: read a tile, compute it, and (when encoding) write its bytes at their final offsets."""
        unit, encoder = work.unit, work.encoder
        raw, backend, tile = self._read(unit, encoder, begin, end)
        if observing:
            learned, finite = encoder.observe(backend, tile)
            self._refuse_nonfinite(unit, finite, raw, begin)
            return learned
        encoded = encoder.encode(backend, tile, begin)
        self._refuse_nonfinite(unit, encoded.finite, raw, begin)
        for output, payload in zip(work.streamed, encoded.payloads, strict=True):
            number, offset, _ = self.plan.placement[unit.output_name(output)]
            with self._told_apart([raw]):
                self.session.files[number].write(offset + output.extent(begin, end)[0], bytes_of(payload))
        return encoded

    @contextlib.contextmanager
    def _told_apart(self, written: Iterable[memoryview]) -> Iterator[None]:
        """What is copied from a mapping is read by the system while it is written: that may be what has failed."""
        try:
            yield
        except errors.DestinationWriteError:
            for data in written:
                np.frombuffer(data, dtype=np.uint8)[:: mmap.PAGESIZE].max(initial=0)
            self.reader.confirm()
            raise

    def _convert(self, units: list[Unit]) -> tuple[list[dict[str, Any]], int]:
        """In a worker: convert units of one tile each. Returns their records and how many bytes were written."""
        pieces = Pieces(self.plan, self.session.files)
        records = [self._convert_whole(unit, pieces) for unit in units]
        with self._told_apart(pieces.data()):
            return records, pieces.write()

    def _convert_whole(self, unit: Unit, pieces: Pieces) -> dict[str, Any]:
        encoder = unit.format.encoder(unit.shape, unit.origin)
        encoded = None
        if unit.elements:
            encoder.rounding = self.knowledge.converter(unit)
            raw, backend, tile = self._read(unit, encoder, 0, unit.elements)
            if encoder.passes == 2:
                learned, finite = encoder.observe(backend, tile)
                self._refuse_nonfinite(unit, finite, raw, 0)
                encoder.absorb(learned)
            encoded = encoder.encode(backend, tile)
            self._refuse_nonfinite(unit, encoded.finite, raw, 0)
        return finish_unit(unit, encoder, encoded, pieces)

    def _read(self, unit: Unit, encoder: Encoder, begin: int, end: int) -> tuple[memoryview, Any, Any]:
        """Elements [begin, end) of a unit: their bytes, and the backend and tile that its encoder is given."""
        raw = unit.read(self.reader.tile, begin, end)
        if encoder.wants_bytes:
            return raw, None, np.frombuffer(raw, dtype=np.uint8)
        backend = self._backend()
        return raw, backend, backend.load(raw, unit.dtype)

    def _backend(self) -> Any:
        """This thread's backend: each has its own staging buffer and stream."""
        if not hasattr(self._local, "backend"):
            self._local.backend = select(self.device)
        return self._local.backend

    def _refuse_nonfinite(self, unit: Unit, finite: bool, raw: memoryview, begin: int) -> None:
        if finite or self.plan.recipe.allow_nonfinite:
            return
        self.reader.confirm()
        values = to_float32(np.frombuffer(raw, dtype=np.uint8), unit.dtype)
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            what = f"is {values[bad[0]]} (as float32)"
        else:
            # A cast makes infinities out of finite numbers, at the end of float32 some formats too; of the largest first.
            bad = np.array([np.abs(values).argmax()])
            what = f"is {values[bad[0]]}, beyond what {unit.format.name if unit.quantized else unit.outputs[0].dtype} can hold"
        index = np.unravel_index(begin + int(bad[0]), unit.shape)
        where = ", ".join(str(int(part)) for part in index)
        raise errors.NonFiniteError(
            f"{printable(unit.key)}[{where}] {what}: the checkpoint is damaged there, or was trained so; "
            f"--allow-nonfinite converts it all the same."
        )

    def _commit_next(self) -> None:
        """Take the oldest tile in flight, wait for it, and make its result part of the output."""
        if self.stop.is_set():
            self._halt()
        while not wait_for([self._in_flight[0].future], timeout=0.2).done:
            if self.stop.is_set():
                self._halt()
        self._accept(self._in_flight.popleft())
        self._keep_durable()

    def _accept(self, task: Tile | Batch) -> None:
        """Take what a finished task has learned or written."""
        if isinstance(task, Batch):
            self._accept_batch(task)
        else:
            self._accept_tile(task)

    def _accept_batch(self, batch: Batch) -> None:
        records, written = batch.future.result()
        self.reader.confirm()
        self.knowledge.confirm()
        self._unsynced += written
        self.session.journal.append(*records)
        for unit, record in zip(batch.units, records, strict=True):
            self.observer.progress(unit, unit.source_bytes)
            self._note_done(unit, record)
        self.prefetcher.advance(batch.source_bytes)
        self.peak = max(self.peak, anonymous_bytes())
        self._publish_complete(batch.file)

    def _accept_tile(self, tile: Tile) -> None:
        work, unit = tile.work, tile.work.unit
        result = tile.future.result()
        last = tile.end == unit.elements
        if not tile.observing:
            self._commit(tile, result)
            if last:
                self._finish(work)
            return
        self.reader.confirm()
        work.encoder.absorb(result)
        self.prefetcher.advance(unit.source_bytes_of(tile.begin, tile.end))
        if last:
            work.learned = True
            self.session.journal.append({"unit": unit.index, "learned": work.encoder.state()})

    def _halt(self) -> None:
        """Stop at a tile: what is computing is finished and committed, the rest is left for a resume."""
        for tile in self._in_flight:
            tile.future.cancel()
        while self._in_flight and not self._in_flight[0].future.cancelled():
            self._accept(self._in_flight.popleft())
        raise errors.InterruptedRunError("Interrupted; what was written is kept.")

    def _commit(self, tile: Tile, encoded: Encoded) -> None:
        work, unit = tile.work, tile.work.unit
        for hasher, payload in zip(work.hashers, encoded.payloads, strict=True):
            hasher.update(bytes_of(payload))
            self._unsynced += payload.nbytes
        self.reader.confirm()
        self.knowledge.confirm()
        work.encoder.commit(encoded)
        work.sums.add(encoded.sums.error, encoded.sums.weight)
        work.output.add(encoded.output.before, encoded.output.after, encoded.output.energy)
        if not work.observes:
            self.prefetcher.advance(unit.source_bytes_of(tile.begin, tile.end))
        if tile.end < unit.elements:
            self.session.journal.append(
                {
                    "unit": unit.index,
                    "end": tile.end,
                    "state": work.encoder.state(),
                    "digests": [hasher.hexdigest() for hasher in work.hashers],
                }
                | sums_record(work.sums, work.output)
            )
        self.peak = max(self.peak, anonymous_bytes())
        self.observer.progress(unit, unit.source_bytes_of(tile.begin, tile.end))

    def _finish(self, work: Work) -> None:
        """The unit's last tile is committed: write what is not streamed, close its hashes, journal it."""
        unit = work.unit
        final = work.encoder.finish()
        running = {output.suffix: hasher for output, hasher in zip(work.streamed, work.hashers, strict=True)}
        hashes = []
        for output in unit.outputs:
            data = final.get(output.suffix, output.constant)
            hasher = running.get(output.suffix) if data is None else self._write_whole(unit.output_name(output), data)
            hashes.append(hasher.hexdigest())
        record = {"unit": unit.index, "hashes": hashes} | sums_record(work.sums, work.output)
        self.session.journal.append(record)
        self._note_done(unit, record)
        self._publish_complete(self.plan.file_of(unit))

    def _note_done(self, unit: Unit, record: dict[str, Any]) -> None:
        """A unit is written and journalled."""
        self.session.done[unit.index] = record
        self.results[unit.index] = layer_result(self.plan, unit, self.knowledge.origin(unit), record)
        self.observer.finished(self.results[unit.index])
        for tensor in unit.sources:
            self.reader.release(tensor)

    def _write_whole(self, name: str, data: bytes | Fill) -> xxhash.xxh3_64:
        number, offset, nbytes = self.plan.placement[name]
        hasher = xxhash.xxh3_64()
        chunk = data if isinstance(data, bytes) else data.item * (FILL_CHUNK // len(data.item))
        for begin in range(0, nbytes, max(len(chunk), 1)):
            part = memoryview(chunk)[: nbytes - begin]
            self.session.files[number].write(offset + begin, part)
            hasher.update(part)
        return hasher

    def _publish_complete(self, only: int | None = None) -> None:
        """Publish the files all of whose units are done: number `only`, or any."""
        for number in range(len(self.plan.files)) if only is None else [only]:
            if number in self.session.published:
                continue
            # Last first: the one still missing is found at once.
            if all(member.index in self.session.done for member in reversed(self.session.members[number])):
                self._settle()  # a file must not be closed while it is being synced, nor a failed sync go unseen
                if not self.session.publish(number, self.options.force) and not self._warned:
                    self._warned = True
                    self.observer.note(
                        "This filesystem has no hard links: a file of the same name that appears while a new one is given "
                        "its name would be replaced."
                    )

    def _keep_durable(self) -> None:
        """Now and then make the data durable, beside the work, and only then say so in the journal."""
        if self._sync is not None and self._sync[0].done():
            self._settle()
        if self._sync is None and self._unsynced >= SYNC_BYTES:
            self._unsynced = 0
            self._sync = (self.syncer.submit(self._sync_files), self.session.journal.lines)

    def _settle(self) -> None:
        """Wait for the sync under way, if any, and journal what it made durable."""
        if self._sync is not None:
            self._sync[0].result()
            self.session.journal.append({"durable": self._sync[1]})
            self.session.journal.sync()
            self._sync = None

    def _sync_files(self) -> None:
        for number, file in enumerate(self.session.files):
            if number not in self.session.published:
                file.sync()
