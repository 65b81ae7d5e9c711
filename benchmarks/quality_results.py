"""The table of what quantization costs in quality: a CSV file beside the other results, rows only ever added.

A row is one number about one model in one format rounded by one method. Everything of one run has the same `time`;
ratios are to rounding to nearest with plain absmax in the same format, same run, same bytes.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import get_args, get_type_hints

from benchmarks import machine
from benchmarks.results import FOLDER, SchemaError

PATH = FOLDER / "quality.csv"


@dataclass(frozen=True)
class Score:
    """One row. What is not known is None and an empty cell.

    model: what was quantized. scored_on: the set of inputs the number comes from, none of which calibrated anything.
    metric: see `METRICS`. detail: the layer or the time a number is about, empty for the whole. ratio: to "rtn".
    bytes: of the quantized layers on disk, scales included. seconds: that the conversion took.
    """

    time: str
    model: str
    scored_on: str
    format: str
    method: str
    metric: str
    detail: str
    value: float
    ratio: float | None
    bytes: int | None
    seconds: float | None
    device: str
    cpu: str
    cores: int
    python: str
    torch: str
    streamquant: str
    commit: str


METRICS = {
    "layer output error": "‖X(Q - W)ᵀ‖ / ‖XWᵀ‖ of one layer; without detail, the geometric mean over all layers",
    "worst layer": "the largest ratio of a layer's output error to nearest's; detail names the layer",
    "1 - cosine": "of the final embeddings, mean over sentences",
    "velocity error": "‖v_q - v‖ / ‖v‖ on the unquantized model's own paths; detail is the time t, without it all times",
    "final latent error": "‖z_q - z‖ / ‖z‖ at the end of each model's own path from the same noise",
    "PSNR": "of the final pictures, in dB, mean over pictures; ratio is a difference, in dB",
}
COLUMNS = [field.name for field in fields(Score)]


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def score(
    time: str, model: str, scored_on: str, format: str, method: str, metric: str, value: float, *, detail: str = "",
    ratio: float | None = None, bytes: int | None = None, seconds: float | None = None,
) -> Score:  # fmt: skip
    """Return the row of one number; its metric must be one of METRICS."""
    if metric not in METRICS:
        raise ValueError(f"no such metric: {metric}. There are: {', '.join(METRICS)}")
    return Score(
        time=time, model=model, scored_on=scored_on, format=format, method=method, metric=metric, detail=detail,
        value=value, ratio=ratio, bytes=bytes, seconds=seconds, device="cpu", **machine.facts(),
    )  # fmt: skip


def append(rows: Iterable[Score], path: Path = PATH) -> None:
    """Add `rows` to the file, refusing one with other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        _check_columns(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in rows)


def read(path: Path = PATH) -> list[Score]:
    """Return every row, oldest first."""
    _check_columns(path)
    kinds = {name: get_args(hint)[0] if get_args(hint) else hint for name, hint in get_type_hints(Score).items()}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Score(**{name: None if text == "" and kinds[name] is not str else kinds[name](text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def latest(rows: Sequence[Score], model: str) -> list[Score]:
    """Return the rows of a model, of each format and method only those of the last run that measured them."""
    last: dict[tuple[str, str], str] = {}
    for row in rows:
        if row.model == model:
            last[row.format, row.method] = max(row.time, last.get((row.format, row.method), ""))
    return [row for row in rows if row.model == model and row.time == last[row.format, row.method]]


def _check_columns(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != COLUMNS:
        odd = sorted(set(found) ^ set(COLUMNS)) or ["their order"]
        raise SchemaError(f"{path} has other columns than this version writes ({', '.join(odd)}): move it away first")


def _cell(value: object) -> object:
    """Five digits are more than any of these numbers is worth."""
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else value
