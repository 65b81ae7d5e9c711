"""Quality at equal bytes: what models and layers lose by each tool and format, and how many bits a weight they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.quality_results import AS_IT_COMES, FLUX, MINILM, SYNTHETIC, latest, method
from benchmarks.results import Result

# Of each model: what its outputs are judged by, and in what words. The synthetic layers make no model.
PANELS = {
    MINILM: ("1 - cosine", "error of sentence embeddings, 1 - cosine"),
    FLUX: ("velocity error", "error of the velocity, relative"),
    SYNTHETIC: ("layer output error", "error of layer outputs, relative, geometric mean"),
}
CALIBRATED = "sketch"


@dataclass(frozen=True)
class Point:
    """One tool's format on one model. bits: a weight, scales included; method: the product's, "" for another tool."""

    contender: str
    format: str
    method: str
    bits: float
    error: float


def points(rows: Sequence[Result], model: str, metric: str) -> list[Point]:
    """Everything measured of the model as a whole, newest first by format and contender; ours as it comes and calibrated."""
    mine = latest(rows, model)
    # Rows of before sizes were kept are of the same layers.
    size = next((row.size_bytes for row in mine if row.size_bytes and not row.detail), 0)
    return [
        Point(row.contender, row.case, method(row), 8 * row.output_bytes / ((row.size_bytes or size) / 2), row.p50)
        for row in mine
        if row.metric == metric and not row.detail and row.p50 is not None and row.output_bytes and size
        and method(row) in ("", AS_IT_COMES, CALIBRATED)
    ]  # fmt: skip
