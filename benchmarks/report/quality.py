"""Pictures of the recorded quality results, for docs/rounding/: drawn from the CSV, but for the sheet of samples.

Colours are Okabe and Ito's, which people with any colour vision tell apart; methods differ by marker and line too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from rich.console import Console

from benchmarks import quality_methods as methods
from benchmarks import tiny_shapes
from benchmarks.machine import REPOSITORY
from benchmarks.quality_results import Score, latest

matplotlib.use("Agg")  # no window, no display

FOLDER = REPOSITORY / "docs" / "rounding"
FLUX, MINILM = "tiny Flux.2", "MiniLM-L6"
# Okabe, Ito, "Color Universal Design", 2008.
STYLES = {
    "rtn": dict(color="#000000", marker="o", linestyle="-"),
    "scales": dict(color="#999999", marker="v", linestyle="--"),
    "noise": dict(color="#009E73", marker="D", linestyle=":"),
    "sketch": dict(color="#0072B2", marker="s", linestyle="-"),
    "dense-sweeps": dict(color="#D55E00", marker="^", linestyle="-"),
}
FORMAT_TITLES = {
    "fp8-tensor": "FP8, tensor scale",
    "fp8-block64": "FP8, 64 x 64 blocks",
    "int8-row": "INT8, row scales",
    "int8-row-convrot": "INT8, rows rotated",
    "int8-block128": "INT8, 128 x 128 blocks",
    "nf4": "NF4, blocks of 64",
    "fp4": "FP4, blocks of 64",
}
TIME_FORMATS = ("int8-row", "fp8-tensor", "nf4")
SHEET_SAMPLES = 6
SHEET = (
    ("int8-row", "rtn"), ("int8-row", "sketch"), ("fp8-tensor", "rtn"), ("fp8-tensor", "sketch"), ("fp4", "rtn"),
    ("fp4", "sketch"), ("nf4", "rtn"), ("nf4", "sketch"), ("nf4", "dense-sweeps"),
)  # fmt: skip
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.hashsalt": "streamquant",
}


def draw(rows: Sequence[Score], workdir: Path, console: Console, folder: Path = FOLDER) -> list[Path]:
    """Write every picture whose results are there, and return their paths; the sheet converts the small Flux.2 anew."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with pyplot.rc_context(STYLE):
        if flux := latest(rows, FLUX):
            made += [velocity_by_time(flux, folder / "velocity-by-time.svg"), sample_sheet(workdir, folder / "samples.png")]
        if layers := [*latest(rows, MINILM), *flux]:
            made.append(layer_ratios(layers, folder / "layer-ratios.svg"))
    for path in made:
        console.print(f"drew {path}", soft_wrap=True)
    return made


def velocity_by_time(rows: Sequence[Score], path: Path) -> Path:
    """Relative velocity error against t, a panel per format, a line per method."""
    formats = [name for name in TIME_FORMATS if any(row.format == name for row in rows)]
    figure, axes = pyplot.subplots(1, len(formats), figsize=(3.2 * len(formats), 3.2), squeeze=False, layout="constrained")
    for axis, format in zip(axes[0], formats, strict=True):
        for method, style in STYLES.items():
            points = sorted(
                (float(row.detail), 100 * row.value)
                for row in rows
                if (row.format, row.method, row.metric) == (format, method, "velocity error") and row.detail
            )
            if points:
                label = methods.METHOD_TITLES[method]
                axis.plot(*zip(*points, strict=True), label=label, markersize=3.5, linewidth=1.2, **style)
        axis.set(title=FORMAT_TITLES[format], xlabel="time t: noise at 1, picture at 0", yscale="log", xlim=(1.03, 0.03))
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g} %"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes[0][0].set_ylabel("velocity error, relative")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return _save(figure, path)


def layer_ratios(rows: Sequence[Score], path: Path) -> Path:
    """Each layer's output error over nearest's: a dot per layer, a column per format and method, a panel per model."""
    shown = [name for name in ("scales", "sketch", "dense-sweeps") if any(row.method == name for row in rows)]
    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = pyplot.subplots(len(models), 1, figsize=(9, 3 * len(models)), squeeze=False, layout="constrained")
    for axis, model in zip(axes[:, 0], models, strict=True):
        formats = [name for name in FORMAT_TITLES if any((row.model, row.format) == (model, name) for row in rows)]
        for place, format in enumerate(formats):
            for offset, method in enumerate(shown):
                ratios = [
                    row.ratio
                    for row in rows
                    if (row.model, row.format, row.method, row.metric) == (model, format, method, "layer output error")
                    and row.detail
                ]
                centre = place + (offset - (len(shown) - 1) / 2) * 0.27
                spread = [centre + 0.16 * (i / max(len(ratios) - 1, 1) - 0.5) for i in range(len(ratios))]
                style = STYLES[method]
                axis.plot(
                    spread, ratios, linestyle="", marker=style["marker"], color=style["color"], markersize=3, alpha=0.75,
                    label=methods.METHOD_TITLES[method] if place == 0 else None,
                )  # fmt: skip
        axis.axhline(1, color="black", linewidth=0.9)
        axis.set_xticks(range(len(formats)), [FORMAT_TITLES[name].replace(", ", ",\n") for name in formats])
        axis.set(title=model, ylabel="output error / nearest's", ylim=(0, None))
        axis.grid(axis="x", visible=False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return _save(figure, path)


def sample_sheet(workdir: Path, path: Path) -> Path:
    """The same samples by every format: the original first, then pictures and their differences, eight times enlarged."""
    from benchmarks.quality_flux import FluxStudy
    from benchmarks.quality_layers import one_thread
    from benchmarks.train_tiny import WEIGHTS

    folder = workdir / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    with one_thread():
        study = FluxStudy("final", folder, WEIGHTS)
        sheets = [("unquantized, bf16", study.pictures(study.original, SHEET_SAMPLES))]
        for format, method in SHEET:
            quantized = methods.quantize(study.source, folder / "sheet.safetensors", format, method, study.calibrations)
            title = f"{FORMAT_TITLES[format].split(',')[0]}, {methods.METHOD_TITLES[method]}"
            sheets.append((title, study.pictures(quantized.weights, SHEET_SAMPLES)))
    original = sheets[0][1]
    columns = 2 * SHEET_SAMPLES
    figure, axes = pyplot.subplots(len(sheets), columns, figsize=(11, 0.8 * len(sheets) + 0.5))
    for line, (title, images) in zip(axes, sheets, strict=True):
        differences = (images - original).abs() * 4  # range 2 to 1, eight times
        for i, axis in enumerate(line):
            picture = (images[i] + 1) / 2 if i < SHEET_SAMPLES else differences[i - SHEET_SAMPLES].clamp(0, 1)
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=7)
    for i in range(SHEET_SAMPLES):
        axes[0][i].set_title(tiny_shapes.words(study.prompts[i]).replace(", ", "\n"), fontsize=5)
    axes[0][SHEET_SAMPLES].set_title("difference to the first row, x 8", fontsize=7, loc="left")
    figure.subplots_adjust(left=0.15, right=0.995, top=0.94, bottom=0.005, wspace=0.04, hspace=0.04)
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    # Without a date, so that the same results give the same file.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return path
