"""What a conversion did, as data."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamquant.formats import Format
from streamquant.plan import Plan, Unit

# Of a layer whose inputs nothing is known of: with the scales that absmax gives, or with searched ones.
NEAREST, SEARCHED = "nearest", "searched scales"
NOT_QUANTIZED = ("copy", "cast")  # formats


@dataclass(frozen=True)
class LayerResult:
    """One source tensor: what it became.

    relative_error: ||decoded - source|| / ||source||, None where not measured. knowledge: what is known of the layer's
    inputs, or what was done without. output_error_before, output_error_after: estimated relative error of the layer's
    outputs, rounded to nearest with absmax and as written; None where nothing was done to lower it. Where nothing is
    known of the inputs they are taken as independent and equal. parameters: of the format, as its class takes them.
    decoded_from: the format that it had in the source, if it was quantized there.
    """

    key: str
    format: str
    rule: str
    reason: str | None
    source_bytes: int
    output_bytes: int
    relative_error: float | None
    knowledge: str = ""
    output_error_before: float | None = None
    output_error_after: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    decoded_from: str | None = None


def layer_result(plan: Plan, unit: Unit, knowledge: str, record: dict[str, Any]) -> LayerResult:
    """What a unit became, from its last journal record ({} where it was not converted)."""
    error, weight = record.get("sums", (0.0, 0.0))
    measured = unit.format.name != "copy" and bool(record) and math.isfinite(error)
    relative = math.sqrt(error / weight) if measured and weight else (0.0 if measured else None)
    before, after, energy = record.get("output", (0.0, 0.0, 0.0))
    energy = energy or weight
    known = bool(energy and before)
    return LayerResult(
        unit.key, unit.format.name, unit.rule, unit.reason, unit.source_bytes, plan.output_bytes(unit), relative,
        knowledge, math.sqrt(before / energy) if known else None, math.sqrt(after / energy) if known else None,
        _parameters(unit.format), unit.decoded.format if unit.decoded else None,
    )  # fmt: skip


@functools.cache
def _parameters(format: Format) -> dict[str, Any]:
    return format.parameters()


@dataclass
class FormatSummary:
    """All tensors of one format together. Errors are means over the layers that have them."""

    format: str
    layers: int = 0
    source_bytes: int = 0
    output_bytes: int = 0
    mean_relative_error: float | None = None
    output_error_before: float | None = None
    output_error_after: float | None = None


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
        outputs: dict[str, list[tuple[float, float]]] = {}
        for layer in self.layers:
            summary = summaries.setdefault(layer.format, FormatSummary(layer.format))
            summary.layers += 1
            summary.source_bytes += layer.source_bytes
            summary.output_bytes += layer.output_bytes
            if layer.relative_error is not None:
                errors.setdefault(layer.format, []).append(layer.relative_error)
            if layer.output_error_before is not None:
                outputs.setdefault(layer.format, []).append((layer.output_error_before, layer.output_error_after))
        for name, pairs in outputs.items():
            before, after = (math.fsum(side) / len(pairs) for side in zip(*pairs, strict=True))
            summaries[name].output_error_before, summaries[name].output_error_after = before, after
        for name, values in errors.items():
            summaries[name].mean_relative_error = math.fsum(values) / len(values)
        return sorted(summaries.values(), key=lambda summary: summary.format in NOT_QUANTIZED)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        document = asdict(self)
        document["outputs"] = [str(path) for path in self.outputs]
        document["formats"] = [asdict(summary) for summary in self.by_format()]
        return document
