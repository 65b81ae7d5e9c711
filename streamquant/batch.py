"""Whole units done in one go, small ones many to a task.

What a task costs besides its arithmetic (handing it over, system calls, a line of the journal) is then paid once for
hundreds of small tensors. A batch holds consecutive units of the plan and is committed as one: so the journal stays a
prefix of the work, only in larger steps where units are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from streamquant.checkpoint.writer import PartialFile
from streamquant.formats import Encoded, Encoder, Fill
from streamquant.formats.base import OutputErrors
from streamquant.kernels import ErrorSums
from streamquant.plan import Plan, Unit

MOST_UNITS = 512  # of a batch: the screen should move, however small they are


@dataclass
class Batch:
    """Consecutive units, each of one tile and all of one output file, on their way through a worker.

    source_bytes: of their sources. read_bytes: of the same, decoded. future: their records, and the number of bytes written.
    """

    file: int
    units: list[Unit] = field(default_factory=list)
    source_bytes: int = 0
    read_bytes: int = 0
    future: Future[tuple[list[dict[str, Any]], int]] | None = None

    def add(self, unit: Unit) -> None:
        self.units.append(unit)
        self.source_bytes += unit.source_bytes
        self.read_bytes += unit.elements * unit.element_bytes

    def takes(self, unit: Unit, file: int, most_bytes: int) -> bool:
        """Whether a unit of that output file may join those that are here."""
        if file != self.file or len(self.units) == MOST_UNITS:
            return False
        return not self.units or self.read_bytes + unit.elements * unit.element_bytes <= most_bytes


class Pieces:
    """What a task writes: pieces that lie side by side in a file go out in one call."""

    def __init__(self, plan: Plan, files: Sequence[PartialFile]):
        self._plan, self._files = plan, files
        self._pieces: list[tuple[int, int, memoryview]] = []

    def add(self, name: str, data: memoryview) -> None:
        """The tensor `name` begins with these bytes."""
        number, offset, _ = self._plan.placement[name]
        self._pieces.append((number, offset, data))

    def data(self) -> list[memoryview]:
        """The bytes of all pieces."""
        return [data for _, _, data in self._pieces]

    def size(self, name: str) -> int:
        """Bytes of a whole tensor."""
        return self._plan.placement[name][2]

    def write(self) -> int:
        """Write all; returns how many bytes they were."""
        written = 0
        for number, offset, parts in _adjacent(sorted(self._pieces, key=lambda piece: piece[:2])):
            data = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
            self._files[number].write(offset, data)
            written += len(data)
        return written


def _adjacent(pieces: list[tuple[int, int, memoryview]]) -> Iterator[tuple[int, int, list[memoryview]]]:
    """Sorted (file, offset, bytes), those without a gap between them together."""
    begin, end, parts = (-1, -1), (-1, -1), []
    for number, offset, data in pieces:
        if (number, offset) != end and parts:
            yield *begin, parts
            parts = []
        if not parts:
            begin = number, offset
        parts.append(data)
        end = number, offset + len(data)
    if parts:
        yield *begin, parts


def finish_unit(unit: Unit, encoder: Encoder, encoded: Encoded | None, pieces: Pieces) -> dict[str, Any]:
    """The only tile of a unit is encoded (None: it has no elements). Its outputs go to `pieces`; returns its record."""
    encoded = encoded or Encoded([np.empty(0, dtype=np.uint8) for output in unit.outputs if output.streamed])
    encoder.commit(encoded)
    suffixes = (output.suffix for output in unit.outputs if output.streamed)
    streamed = {suffix: bytes_of(payload) for suffix, payload in zip(suffixes, encoded.payloads, strict=True)}
    encoded.payloads.clear()
    final = encoder.finish()
    hashes = []
    for name, output in zip(unit.output_names, unit.outputs, strict=True):
        data = streamed.pop(output.suffix, output.constant)
        if output.suffix in final:
            data = final[output.suffix]
            if isinstance(data, Fill):
                data = data.item * (pieces.size(name) // len(data.item))
        pieces.add(name, memoryview(data))
        hashes.append(xxhash.xxh3_64_hexdigest(data))
    return {"unit": unit.index, "hashes": hashes} | sums_record(encoded.sums, encoded.output)


def sums_record(sums: ErrorSums, output: OutputErrors) -> dict[str, Any]:
    """The error sums of a unit as the journal has them."""
    return {"sums": [sums.error, sums.weight], "output": [output.before, output.after, output.energy]}


def bytes_of(payload: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(payload).reshape(-1).view(np.uint8))
