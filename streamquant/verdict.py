"""What verifying found, as data, and who watches it at work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Finding:
    """Something unsound. kind: "hash", "layer", "bytes", "missing" and so on. tensor: "" when it is about the file."""

    kind: str
    tensor: str
    text: str


@dataclass(frozen=True)
class LayerCheck:
    """One layer compared with its source.

    relative_error: ||decoded - source|| / ||source||. signal_to_noise: dB. largest_error: of one element, at flat index
    largest_error_at. saturated_share: codes at an end of their grid. nearest_error: what rounding to nearest makes of the
    same source where it was looked at; None where there is no telling. cause: what is wrong, or None.
    """

    key: str
    format: str
    detail: str
    shape: tuple[int, ...]
    source_bytes: int
    output_bytes: int
    relative_error: float
    signal_to_noise: float
    cosine: float
    largest_error: float
    largest_error_at: int
    saturated_share: float
    nearest_error: float | None
    cause: str | None

    @property
    def sound(self) -> bool:
        return self.cause is None


@dataclass(frozen=True)
class Verdict:
    """What verifying found. sampled: share of the weights that was looked at. hashed: (tensors, bytes) that agree with the
    manifest; hashes_known: tensors that have one.
    """

    source: Path
    output: Path
    architecture: str
    layers: tuple[LayerCheck, ...]
    findings: tuple[Finding, ...]
    copied: tuple[int, int]
    removed: dict[str, str]
    hashed: tuple[int, int]
    hashes_known: int
    tensors: int
    sampled: float
    source_bytes: int
    output_bytes: int
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def sound(self) -> bool:
        return not self.findings

    @property
    def hashes_in_words(self) -> str:
        """How many hashes agree of those that were looked at: of a sample, not those of whole tensors."""
        looked = self.hashed[0] + sum(finding.kind == "hash" for finding in self.findings)
        rest = self.hashes_known - looked
        return f"{self.hashed[0]:,} of {looked:,} hashes agree" + (f" ({rest:,} not looked at)" if rest > 0 else "")

    def as_json(self) -> dict[str, Any]:
        """JSON values; numbers that JSON does not have (an infinite ratio) become null."""
        return finite(asdict(self) | {"sound": self.sound, "source": str(self.source), "output": str(self.output)})


def finite(value: Any) -> Any:
    """A tree of values with None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Watcher(Protocol):
    """Whoever watches; called from the thread that called."""

    def compiling(self) -> None:
        """Kernels will be compiled, once on a machine, before the first tile is done: for seconds nothing moves."""

    def started(self, total_bytes: int) -> None:
        """So many bytes of the source will be gone through."""

    def progress(self, name: str, nbytes: int) -> None:
        """`nbytes` more of the source are done; `name` is in hand."""


class Unwatched:
    """A watcher that looks away."""

    def compiling(self) -> None: ...

    def started(self, total_bytes: int) -> None: ...

    def progress(self, name: str, nbytes: int) -> None: ...
