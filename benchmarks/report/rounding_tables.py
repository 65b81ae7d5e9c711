"""The tables of docs/rounding.md: what each way of rounding costs, as ratios to nearest."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.quality_methods import FORMATS, METHOD_TITLES
from benchmarks.quality_results import FLUX, MINILM, SYNTHETIC, latest, method
from benchmarks.results import Result

TITLES = {
    "fp8-tensor": "FP8 tensor", "fp8-row": "FP8 row", "fp8-block64": "FP8 64 x 64", "int8-row": "INT8 row",
    "int8-row-convrot": "INT8 row, rotated", "int8-block128": "INT8 block 128", "nf4": "NF4", "nf4-double": "NF4 double",
    "fp4": "FP4",
}  # fmt: skip
# Of each model: what the cells of its table hold, and in what words.
TABLES = {
    MINILM: (
        ("1 - cosine", "layer output error", "worst layer"),
        "**MiniLM**, a sentence encoder, 36 layers; 200 sentences to calibrate, 200 others to score: (1 - cosine) of the "
        "embeddings / *layer* / *worst*",
    ),
    FLUX: (
        ("velocity error", "layer output error", "worst layer"),
        "**A small Flux.2** that was really trained (`python -m benchmarks train-tiny`), 24 layers; 16 prompts at 3 steps to "
        "calibrate, 32 other prompts and seeds to score: *velocity* / *layer* / *worst*",
    ),
    SYNTHETIC: (
        ("layer output error",),
        "**Synthetic layers of Flux.2's width** (heavy tails, hot channels, modulated inputs 6,144 wide, MLP inputs 18,432 "
        "wide): *layer*",
    ),
}


def table(rows: Sequence[Result], model: str) -> str:
    """The table of one model in markdown: a row per method, a column per format, ratios to nearest; "" without results."""
    metrics, caption = TABLES[model]
    found = {
        (method(row), row.case, row.metric): row.ratio
        for row in latest(rows, model)
        if method(row) and row.metric in metrics and (not row.detail or row.metric == "worst layer")
    }
    formats = [name for name in FORMATS if any(key[1] == name for key in found)]
    ways = [name for name in METHOD_TITLES if name != "rtn" and any(key[0] == name for key in found)]
    if not formats or not ways:
        return ""
    heads = "| --- " * (len(formats) + 1) + "|"
    lines = [f"{caption}.", "", "| | " + " | ".join(TITLES[name] for name in formats) + " |", heads]
    for way in ways:
        cells = []
        for name in formats:
            ratios = [found.get((way, name, metric)) for metric in metrics]
            cells.append("" if ratios[0] is None else " / ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
        lines.append(f"| {METHOD_TITLES[way]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tables(rows: Sequence[Result]) -> str:
    """The tables of all models."""
    return "\n".join(filter(None, (table(rows, model) for model in TABLES)))
