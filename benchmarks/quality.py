"""Quality at equal bytes, side by side: every method of rounding into every format, judged by what a user feels.

Each cell converts the model's checkpoint with the product, decodes the file and measures outputs on inputs that
calibrated nothing. Nearest rounding with plain absmax is measured in every format, and ratios are to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import quality_methods as methods
from benchmarks import quality_results, results
from benchmarks.quality_layers import Measured, geometric_mean, one_thread
from benchmarks.quality_results import AS_IT_COMES, FLUX
from benchmarks.results import Result
from benchmarks.train_tiny import WEIGHTS

MODELS = ("minilm", "flux", "synthetic")
# Whose ratios are kept layer by layer too.
LAYER_METHODS = ("scales", "sketch", "dense-sweeps")
IN_DECIBEL = ("PSNR",)


class Study(Protocol):
    """A model with inputs to score on. name: as results have it. calibrations: the files that methods need."""

    name: str
    source: Path
    calibrations: dict[str, Path]

    def applies(self, method: str) -> bool:
        """Whether the model has what the method needs."""

    def measure(self, weights: dict[str, Tensor]) -> Measured:
        """What these weights cost at the model's outputs."""


@dataclass(frozen=True)
class Settings:
    """What to measure. formats, methods, models: names. scored_on: "develop", to look at often, or "final".

    against: other tools, by name; each is measured in its own formats, whatever `formats` and `methods` say.
    learned: formats in which the other converter's learned rounding is measured, too.
    """

    models: Sequence[str]
    formats: Sequence[str]
    methods: Sequence[str]
    scored_on: str
    workdir: Path
    weights: Path = WEIGHTS
    against: Sequence[str] = ()
    learned: Sequence[str] = ()

    def __post_init__(self) -> None:
        from benchmarks.quality_converter import FLAGS
        from benchmarks.quality_rivals import NAMES

        for what, names, legal in (
            ("tool", self.against, NAMES),
            ("format of the other converter", self.learned, tuple(FLAGS)),
            ("model", self.models, MODELS),
            ("format", self.formats, tuple(methods.FORMATS)),
            ("method", self.methods, tuple(methods.METHODS)),
        ):
            if unknown := [name for name in names if name not in legal]:
                raise ValueError(f"no such {what}: {', '.join(unknown)}. There are: {', '.join(legal)}")


def run(settings: Settings, console: Console, record: Callable[[Sequence[Result]], None] = results.append) -> list[Result]:
    """Measure every cell; record and return the rows."""
    from benchmarks import quality_rivals

    folder = settings.workdir / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    rows, time = [], results.now()

    def keep(scores: list[Result]) -> None:
        record(scores)
        rows.extend(scores)

    with one_thread():
        for model in settings.models:
            study = open_study(model, settings, folder)
            if settings.methods:
                for format in settings.formats:
                    keep(list(measure_format(study, format, settings, folder, time, console)))
                console.print(table([row for row in rows if row.source == study.name], study.name))
            reference = as_it_comes(study, folder)
            for scores in quality_rivals.measure(
                study, settings.against, settings.learned, reference, folder, settings.workdir, time, console
            ):
                keep(scores)
    return rows


def as_it_comes(study: Study, folder: Path) -> Callable[[str], tuple[Measured, methods.Quantized]]:
    """What the product makes of the model in a format, asked for nothing: a function that measures each format once."""

    @cache
    def measured(format: str) -> tuple[Measured, methods.Quantized]:
        destination = folder / f"{format}-as-it-comes.safetensors"
        try:
            quantized = methods.quantize(study.source, destination, format, AS_IT_COMES, study.calibrations)
        finally:
            destination.unlink(missing_ok=True)
        return study.measure(quantized.weights), quantized

    return measured


def open_study(model: str, settings: Settings, folder: Path) -> Study:
    """Return the study of one of MODELS, calibrated."""
    if model == "minilm":
        from benchmarks.quality_minilm import MiniLMStudy

        return MiniLMStudy(settings.scored_on, folder)
    if model == "flux":
        from benchmarks.quality_flux import FluxStudy

        name = FLUX if settings.weights == WEIGHTS else f"{FLUX} ({settings.weights.stem})"
        return FluxStudy(settings.scored_on, folder, settings.weights, name)
    from benchmarks.quality_synthetic import SyntheticStudy

    return SyntheticStudy(settings.scored_on, folder)


def measure_format(
    study: Study, format: str, settings: Settings, folder: Path, time: str, console: Console
) -> Iterator[Result]:
    """Yield the rows of every method in one format, nearest first."""
    wanted = [name for name in settings.methods if name != methods.NEAREST and study.applies(name)]
    nearest: Measured | None = None
    for method in [methods.NEAREST, *wanted]:
        destination = folder / f"{format}-{method}.safetensors"
        try:
            quantized = methods.quantize(study.source, destination, format, method, study.calibrations)
        finally:
            destination.unlink(missing_ok=True)
        measured = study.measure(quantized.weights)
        nearest = nearest or measured
        name, other = quality_results.contender(method), quality_results.contender(methods.NEAREST)
        cell = Cell(time, study.name, format, name, quantized, method in LAYER_METHODS)
        scores = list(cell.scores(measured, nearest, other))
        console.print(line(scores), highlight=False, soft_wrap=True)
        yield from scores


@dataclass(frozen=True)
class Cell:
    """One contender in one format on one model. by_layer: keep ratios layer by layer too, as always where layers are all."""

    time: str
    model: str
    format: str
    contender: str
    quantized: methods.Quantized
    by_layer: bool = False
    note: str = ""

    def scores(self, measured: Measured, other: Measured | None, other_name: str) -> Iterator[Result]:
        """The rows of what was measured, with ratios to what `other_name` costs, None if there is nothing to compare with."""
        other = other or Measured()

        def row(metric: str, value: float, detail: str = "", ratio: float | None = None) -> Result:
            return quality_results.score(
                self.time, self.model, self.format, self.contender, metric, value, detail=detail, ratio=ratio,
                ratio_to=other_name, size_bytes=self.quantized.size_bytes, output_bytes=self.quantized.bytes, note=self.note,
            )  # fmt: skip

        yield row(results.SECONDS, self.quantized.seconds)
        for (metric, detail), value in measured.whole.items():
            whole = other.whole.get((metric, detail))
            ratio = None if whole is None else value - whole if metric in IN_DECIBEL else value / whole
            yield row(metric, value, detail, ratio)
        ratios = {layer: value / other.layers[layer] for layer, value in measured.layers.items() if layer in other.layers}
        mean = geometric_mean(measured.layers.values())
        yield row("layer output error", mean, ratio=geometric_mean(ratios.values()) if ratios else None)
        if ratios:
            worst = max(ratios, key=ratios.__getitem__)
            yield row("worst layer", ratios[worst], worst, ratios[worst])
        if self.by_layer or not measured.whole:
            for layer, value in measured.layers.items():
                yield row("layer output error", value, layer, ratios.get(layer))


def line(scores: Sequence[Result]) -> str:
    """One line for the screen: what a cell took and cost, as a whole."""
    first = scores[0]
    parts = []
    for row in scores[1:]:
        if row.p50 is None or (row.detail and row.metric != "worst layer"):
            continue
        by = "" if row.ratio is None else f" ({row.ratio:+.3f})" if row.metric in IN_DECIBEL else f" (x {row.ratio:.3f})"
        parts.append(f"{row.metric} {row.p50:.4g}{by}")
    return f"{first.case} {first.contender}, {first.p50 or 0:.1f} s: {'; '.join(parts)}"


def table(rows: Sequence[Result], title: str = "") -> Table:
    """Return ratios to nearest, a line per method, a column per format: outputs of the model / of its layers / worst layer."""
    formats = list(dict.fromkeys(row.case for row in rows))
    shown = [row for row in rows if row.metric not in (*IN_DECIBEL, results.SECONDS)]
    cells: dict[str, dict[str, list[str]]] = {}
    for row in shown:
        if (row.detail and row.metric != "worst layer") or row.ratio is None:
            continue
        cells.setdefault(row.contender, {}).setdefault(row.case, []).append(f"{row.ratio:.2f}")
    metrics = list(dict.fromkeys(row.metric for row in shown))
    grid = Table("", *formats, title=f"{title}: {' / '.join(metrics)}, ratio to nearest", box=None)
    for contender, by_format in cells.items():
        name = methods.METHOD_TITLES.get(contender.removeprefix(f"{quality_results.OURS} "), contender)
        grid.add_row(name, *(" / ".join(by_format.get(format, ["-"])) for format in formats))
    return grid
