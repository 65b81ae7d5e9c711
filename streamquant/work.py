"""A unit on its way through the pour, and one of its tiles."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import xxhash

from streamquant.formats import Encoder
from streamquant.formats.base import OutputErrors
from streamquant.kernels import ErrorSums
from streamquant.session import Session, prefix_hashers
from streamquant.unit import Unit


class Work:
    """A unit being converted: its encoder, a running hash per streamed output, its error sums.

    preparation: what decides its rounding, being made.
    """

    def __init__(self, unit: Unit):
        self.unit = unit
        self.encoder: Encoder = unit.format.encoder(unit.shape, unit.origin)
        self.preparation: Future | None = None
        self.streamed = [output for output in unit.outputs if output.streamed]
        self.hashers = [xxhash.xxh3_64() for _ in self.streamed]
        self.sums = ErrorSums()
        self.output = OutputErrors()
        self.begin = 0
        self.observes = self.encoder.passes == 2  # whether a first pass is part of this run
        self.learned = not self.observes

    def skip_first_pass(self, state: Any) -> None:
        """Take over what an interrupted run learned in its first pass."""
        self.encoder.restore(state)
        self.observes, self.learned = False, True

    def take_up(self, record: dict[str, Any], session: Session) -> None:
        """Go on where an interrupted run stopped in the middle of this unit."""
        self.begin = record["end"]
        self.skip_first_pass(record["state"])
        self.sums = ErrorSums(*record["sums"])
        self.output = OutputErrors(*record["output"])
        self.hashers = list(prefix_hashers(session, self.unit, self.streamed, self.begin))


@dataclass
class Tile:
    """Elements [begin, end) of a unit, on their way through a worker."""

    work: Work
    begin: int
    end: int
    observing: bool
    future: Future
