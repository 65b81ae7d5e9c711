"""What a conversion did, as data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerResult:
    """One source tensor: what it became. relative_error: ||decoded - source|| / ||source||, None where not measured."""

    key: str
    format: str
    rule: str
    reason: str | None
    source_bytes: int
    output_bytes: int
    relative_error: float | None


@dataclass
class FormatSummary:
    """All tensors of one format together."""

    format: str
    layers: int = 0
    source_bytes: int = 0
    output_bytes: int = 0
    mean_relative_error: float | None = None


@dataclass(frozen=True)
class Report:
    """A finished conversion. outputs: the files that now exist. seconds: wall time of this run."""

    outputs: list[Path]
    architecture: str
    layers: list[LayerResult]
    removed: dict[str, str]
    source_bytes: int
    output_bytes: int
    seconds: float
    resumed: bool
    peak_anonymous_bytes: int
    notes: tuple[str, ...] = field(default=())

    def by_format(self) -> list[FormatSummary]:
        """Totals per format, quantized ones first, in order of appearance; the error is the mean over its layers."""
        summaries: dict[str, FormatSummary] = {}
        errors: dict[str, list[float]] = {}
        for layer in self.layers:
            summary = summaries.setdefault(layer.format, FormatSummary(layer.format))
            summary.layers += 1
            summary.source_bytes += layer.source_bytes
            summary.output_bytes += layer.output_bytes
            if layer.relative_error is not None:
                errors.setdefault(layer.format, []).append(layer.relative_error)
        for name, values in errors.items():
            summaries[name].mean_relative_error = math.fsum(values) / len(values)
        return sorted(summaries.values(), key=lambda summary: summary.format in ("copy", "cast"))

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        document = asdict(self)
        document["outputs"] = [str(path) for path in self.outputs]
        document["formats"] = [asdict(summary) for summary in self.by_format()]
        return document
