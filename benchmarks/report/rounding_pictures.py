"""Pictures for docs/rounding.md: what each way of rounding costs, drawn from the recorded results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from benchmarks import quality_methods as methods
from benchmarks.quality_results import FLUX, MINILM, latest, method
from benchmarks.report import style
from benchmarks.results import Result

METHODS = {
    "rtn": dict(color="#000000", marker="o", linestyle="-"),
    "scales": dict(color="#999999", marker="v", linestyle="--"),
    "noise": dict(color="#009E73", marker="D", linestyle=":"),
    "sketch": dict(color="#0072B2", marker="s", linestyle="-"),
    "dense-sweeps": dict(color="#D55E00", marker="^", linestyle="-"),
}
FORMAT_TITLES = {
    "fp8-tensor": "FP8, tensor scale",
    "fp8-row": "FP8, row scales",
    "fp8-block64": "FP8, 64 x 64 blocks",
    "int8-row": "INT8, row scales",
    "int8-row-convrot": "INT8, rows rotated",
    "int8-block128": "INT8, 128 x 128 blocks",
    "nf4": "NF4, blocks of 64",
    "nf4-double": "NF4, double quantization",
    "fp4": "FP4, blocks of 64",
}
TIME_FORMATS = ("int8-row", "fp8-tensor", "nf4")


def velocity_by_time(quality: Sequence[Result], path: Path) -> Path | None:
    """Relative velocity error of the small Flux.2 against t, a panel per format, a line per method; None without results."""
    rows = latest(quality, FLUX)
    formats = [name for name in TIME_FORMATS if any(row.case == name for row in rows)]
    if not formats:
        return None
    figure, axes = pyplot.subplots(1, len(formats), figsize=(3.2 * len(formats), 3.2), squeeze=False, layout="constrained")
    for axis, format in zip(axes[0], formats, strict=True):
        for name, look in METHODS.items():
            points = sorted(
                (float(row.detail), 100 * row.p50)
                for row in rows
                if (row.case, method(row), row.metric) == (format, name, "velocity error") and row.detail
            )
            if points:
                label = methods.METHOD_TITLES[name]
                axis.plot(*zip(*points, strict=True), label=label, markersize=3.5, linewidth=1.2, **look)
        axis.set(title=FORMAT_TITLES[format], xlabel="time t: noise at 1, picture at 0", yscale="log", xlim=(1.03, 0.03))
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g} %"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes[0][0].set_ylabel("velocity error, relative")
    style.legend_below(figure, axes[0][0])
    return style.save(figure, path)


def layer_ratios(quality: Sequence[Result], path: Path) -> Path | None:
    """Each layer's output error over nearest's: a dot per layer, a column per format and method, a panel per model."""
    rows = [row for model in (MINILM, FLUX) for row in latest(quality, model)]
    if not rows:
        return None
    shown = [name for name in ("scales", "sketch", "dense-sweeps") if any(method(row) == name for row in rows)]
    models = list(dict.fromkeys(row.source for row in rows))
    figure, axes = pyplot.subplots(len(models), 1, figsize=(9, 3 * len(models)), squeeze=False, layout="constrained")
    for axis, model in zip(axes[:, 0], models, strict=True):
        formats = [
            name
            for name in FORMAT_TITLES
            if any((row.source, row.case, method(row)) == (model, name, "sketch") for row in rows)
        ]
        for place, format in enumerate(formats):
            for offset, way in enumerate(shown):
                ratios = [
                    row.ratio
                    for row in rows
                    if (row.source, row.case, method(row), row.metric) == (model, format, way, "layer output error")
                    and row.detail
                ]
                centre = place + (offset - (len(shown) - 1) / 2) * 0.27
                spread = [centre + 0.16 * (i / max(len(ratios) - 1, 1) - 0.5) for i in range(len(ratios))]
                look = METHODS[way]
                axis.plot(
                    spread, ratios, linestyle="", marker=look["marker"], color=look["color"], markersize=3, alpha=0.75,
                    label=methods.METHOD_TITLES[way] if place == 0 else None,
                )  # fmt: skip
        axis.axhline(1, color="black", linewidth=0.9)
        axis.set_xticks(range(len(formats)), [FORMAT_TITLES[name].replace(", ", ",\n") for name in formats], fontsize=7.5)
        axis.set(title=model, ylabel="output error / nearest's", ylim=(0, None))
        axis.grid(axis="x", visible=False)
    style.legend_below(figure, axes[0][0])
    return style.save(figure, path)
