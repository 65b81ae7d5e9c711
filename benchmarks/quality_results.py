"""What quantization costs in quality, as rows of the common table (`benchmarks.results`).

A row is one number about one model in one format rounded by one contender: `source` is the model, `case` the format, `p50` the
number, `output_bytes` what the quantized layers take on disk, scales included, and `size_bytes` what they take in BF16. All are
of the set of inputs kept for the end, which neither calibrated nor decided anything. Everything of one run has the same
`time`; ratios are to rounding to nearest with plain absmax in the same format, same run, same bytes, and of PSNR they are
differences. How long each conversion took is a row of its own, in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import machine, results
from benchmarks.results import OURS, Result

BENCHMARK = "quality"
MINILM, FLUX, SYNTHETIC = "MiniLM-L6", "tiny Flux.2", "synthetic Flux.2 layers"  # models, as sources
AS_IT_COMES = "no-data"  # the method that a person gets who asks for none
METRICS = {
    "layer output error": "‖X(Q - W)ᵀ‖ / ‖XWᵀ‖ of one layer; without detail, the geometric mean over all layers",
    "worst layer": "the largest ratio of a layer's output error to nearest's; detail names the layer",
    "1 - cosine": "of the final embeddings, mean over sentences",
    "velocity error": "‖v_q - v‖ / ‖v‖ on the unquantized model's own paths; detail is the time t, without it all times",
    "final latent error": "‖z_q - z‖ / ‖z‖ at the end of each model's own path from the same noise",
    "PSNR": "of the final pictures, in dB, mean over pictures; ratio is a difference, in dB",
    results.SECONDS: "that the conversion took",
}


def contender(method: str) -> str:
    """The name of the product rounding by `method`."""
    return f"{OURS} {method}"


def method(row: Result) -> str:
    """The product's method behind a row, "" when another tool made it."""
    name, _, method = row.contender.partition(" ")
    return method if name == OURS else ""


def score(
    time: str, model: str, format: str, contender: str, metric: str, value: float | None, *, detail: str = "",
    ratio: float | None = None, ratio_to: str = "", size_bytes: int | None = None, output_bytes: int | None = None,
    note: str = "",
) -> Result:  # fmt: skip
    """Return the row of one number; its metric must be one of METRICS. Without a value, `note` says why."""
    if metric not in METRICS:
        raise ValueError(f"no such metric: {metric}. There are: {', '.join(METRICS)}")
    return Result(
        time=time, benchmark=BENCHMARK, source=model, case=format, contender=contender, metric=metric, detail=detail,
        size_bytes=size_bytes, output_bytes=output_bytes, runs=int(value is not None), p20=None, p50=value, p80=None,
        bytes_per_second=None, ratio_to=ratio_to if ratio is not None else "", ratio=ratio, peak_anonymous_bytes=None,
        baseline_anonymous_bytes=None, budget_bytes=None, cache="", device="cpu", note=note, **machine.facts(),
    )  # fmt: skip


def latest(rows: Sequence[Result], model: str) -> list[Result]:
    """Return the rows of a model, of each format and contender only those of the last run that measured them."""
    last: dict[tuple[str, str], str] = {}
    for row in rows:
        if row.source == model:
            last[row.case, row.contender] = max(row.time, last.get((row.case, row.contender), ""))
    return [row for row in rows if row.source == model and row.time == last[row.case, row.contender]]
