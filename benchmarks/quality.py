"""Quality at equal bytes, side by side: every method of rounding into every format, judged by what a user feels.

Each cell converts the model's checkpoint with the product, decodes the file and measures outputs on inputs that
calibrated nothing. Nearest rounding with plain absmax is measured in every format, and ratios are to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import quality_methods as methods
from benchmarks import quality_peer, quality_results
from benchmarks.peers import PeerError
from benchmarks.quality_layers import Measured, geometric_mean, one_thread
from benchmarks.quality_results import Score
from benchmarks.race import shout
from benchmarks.train_tiny import WEIGHTS

MODELS = ("minilm", "flux", "synthetic")
SETS = ("develop", "final")
# Whose ratios are kept layer by layer too.
LAYER_METHODS = ("scales", "sketch", "dense-sweeps", "peer-learned")
IN_DECIBEL = ("PSNR",)


class Study(Protocol):
    """A model with inputs to score on. name: as results have it. calibrations: the files that methods need."""

    name: str
    scored_on: str
    source: Path
    calibrations: dict[str, Path]

    def applies(self, method: str) -> bool:
        """Whether the model has what the method needs."""

    def measure(self, weights: dict[str, Tensor]) -> Measured:
        """What these weights cost at the model's outputs."""


@dataclass(frozen=True)
class Settings:
    """What to measure. formats, methods, models: names. scored_on: "develop", to look at often, or "final"."""

    models: Sequence[str]
    formats: Sequence[str]
    methods: Sequence[str]
    scored_on: str
    workdir: Path
    weights: Path = WEIGHTS
    peer: bool = False

    def __post_init__(self) -> None:
        for what, names, legal in (
            ("model", self.models, MODELS),
            ("format", self.formats, tuple(methods.FORMATS)),
            ("method", self.methods, tuple(methods.METHODS)),
        ):
            if unknown := [name for name in names if name not in legal]:
                raise ValueError(f"no such {what}: {', '.join(unknown)}. There are: {', '.join(legal)}")


def run(
    settings: Settings, console: Console, record: Callable[[Sequence[Score]], None] = quality_results.append
) -> list[Score]:
    """Measure every cell; record and return the rows."""
    folder = settings.workdir / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    rows, time = [], quality_results.now()
    with one_thread():
        for model in settings.models:
            study = open_study(model, settings, folder)
            for format in settings.formats:
                scores = list(measure_format(study, format, settings, folder, time, console))
                record(scores)
                rows += scores
            console.print(table([row for row in rows if row.model == study.name], study.name))
    return rows


def open_study(model: str, settings: Settings, folder: Path) -> Study:
    """Return the study of one of MODELS, calibrated."""
    if model == "minilm":
        from benchmarks.quality_minilm import MiniLMStudy

        return MiniLMStudy(settings.scored_on, folder)
    if model == "flux":
        from benchmarks.quality_flux import FluxStudy

        name = "tiny Flux.2" if settings.weights == WEIGHTS else f"tiny Flux.2 ({settings.weights.stem})"
        return FluxStudy(settings.scored_on, folder, settings.weights, name)
    from benchmarks.quality_synthetic import SyntheticStudy

    return SyntheticStudy(settings.scored_on, folder)


def measure_format(study: Study, format: str, settings: Settings, folder: Path, time: str, console: Console):
    """Yield the rows of every method in one format, nearest first."""
    wanted = [name for name in settings.methods if name != methods.NEAREST and study.applies(name)]
    if settings.peer:
        wanted += quality_peer.METHODS
    nearest: Measured | None = None
    layers: list[str] = []
    for method in [methods.NEAREST, *wanted]:
        destination = folder / f"{format}-{method}.safetensors"
        try:
            if method in quality_peer.METHODS:
                quantized = quality_peer.quantize(study.source, destination, format, method, layers, settings.workdir)
            else:
                quantized = methods.quantize(study.source, destination, format, method, study.calibrations)
        except PeerError as error:
            shout(console, f"{method} DOES NOT TAKE PART in {format}: {error}")
            continue
        finally:
            destination.unlink(missing_ok=True)
        measured = study.measure(quantized.weights)
        nearest, layers = nearest or measured, quantized.layers
        scores = list(_scores(study, format, method, measured, nearest, quantized, time))
        console.print(_line(scores), highlight=False, soft_wrap=True)
        yield from scores


def _scores(
    study: Study, format: str, method: str, measured: Measured, nearest: Measured, quantized: methods.Quantized, time: str
):
    def row(metric: str, value: float, **more: object) -> Score:
        sizes = {"bytes": quantized.bytes, "seconds": quantized.seconds}
        return quality_results.score(time, study.name, study.scored_on, format, method, metric, value, **sizes, **more)

    for (metric, detail), value in measured.whole.items():
        other = nearest.whole[metric, detail]
        yield row(metric, value, detail=detail, ratio=value - other if metric in IN_DECIBEL else value / other)
    ratios = {layer: value / nearest.layers[layer] for layer, value in measured.layers.items()}
    mean = geometric_mean(measured.layers.values())
    yield row("layer output error", mean, ratio=geometric_mean(ratios.values()))
    worst = max(ratios, key=ratios.__getitem__)
    yield row("worst layer", ratios[worst], detail=worst, ratio=ratios[worst])
    if method in LAYER_METHODS:
        for layer, value in measured.layers.items():
            yield row("layer output error", value, detail=layer, ratio=ratios[layer])


def _line(scores: Sequence[Score]) -> str:
    first = scores[0]
    whole = [row for row in scores if not row.detail or row.metric == "worst layer"]
    parts = [f"{row.metric} {row.value:.4g} ({row.ratio:+.3f})" for row in whole if row.metric in IN_DECIBEL]
    parts += [f"{row.metric} {row.value:.4g} (x {row.ratio:.3f})" for row in whole if row.metric not in IN_DECIBEL]
    return f"{first.format} {first.method}, {first.seconds:.1f} s: {'; '.join(parts)}"


def table(rows: Sequence[Score], title: str = "") -> Table:
    """Return ratios to nearest, a line per method, a column per format: outputs of the model / of its layers / worst layer."""
    formats = list(dict.fromkeys(row.format for row in rows))
    cells: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.metric in IN_DECIBEL or (row.detail and row.metric != "worst layer") or row.ratio is None:
            continue
        cells.setdefault(row.method, {}).setdefault(row.format, []).append(f"{row.ratio:.2f}")
    metrics = list(dict.fromkeys(row.metric for row in rows if row.metric not in IN_DECIBEL))
    grid = Table("", *formats, title=f"{title}: {' / '.join(metrics)}, ratio to nearest", box=None)
    for method, by_format in cells.items():
        grid.add_row(methods.METHOD_TITLES[method], *(" / ".join(by_format.get(format, ["-"])) for format in formats))
    return grid
