"""The picture sheet: the same samples of the small Flux.2 in every format, side by side. It converts the model anew."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot

from benchmarks import quality_methods as methods
from benchmarks import tiny_shapes
from benchmarks.report import style
from benchmarks.report.rounding_pictures import FORMAT_TITLES

SAMPLES = 6
# Every format to nearest and calibrated; of NF4 also the best that there is.
SHEET = (*((format, method) for format in methods.FORMATS for method in ("rtn", "sketch")), ("nf4", "dense-sweeps"))


def sheet(workdir: Path, path: Path) -> Path:
    """The original first, then each format's pictures and their differences, eight times enlarged."""
    from benchmarks.quality_flux import FluxStudy
    from benchmarks.quality_layers import one_thread
    from benchmarks.train_tiny import WEIGHTS

    folder = workdir / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    with one_thread():
        study = FluxStudy("final", folder, WEIGHTS)
        sheets = [("unquantized, BF16", study.pictures(study.original, SAMPLES))]
        for format, method in sorted(SHEET, key=lambda cell: list(FORMAT_TITLES).index(cell[0])):
            quantized = methods.quantize(study.source, folder / "sheet.safetensors", format, method, study.calibrations)
            title = f"{FORMAT_TITLES[format]}: {methods.METHOD_TITLES[method].removesuffix(' (C)').removesuffix(' (C++)')}"
            sheets.append((title, study.pictures(quantized.weights, SAMPLES)))
        (folder / "sheet.safetensors").unlink()
    original = sheets[0][1]
    figure, axes = pyplot.subplots(len(sheets), 2 * SAMPLES, figsize=(11, 0.74 * len(sheets) + 0.7))
    for line, (title, images) in zip(axes, sheets, strict=True):
        differences = (images - original).abs() * 4  # range 2 to 1, eight times
        for i, axis in enumerate(line):
            picture = (images[i] + 1) / 2 if i < SAMPLES else differences[i - SAMPLES].clamp(0, 1)
            axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=7)
    for i in range(SAMPLES):
        axes[0][i].set_title(tiny_shapes.words(study.prompts[i]).replace(", ", "\n"), fontsize=5, loc="center", weight="normal")
    axes[0][SAMPLES].set_title("difference to the first row, x 8", fontsize=7, loc="left", weight="normal")
    top = 1 - 0.5 / figure.get_figheight()
    figure.subplots_adjust(left=0.19, right=0.995, top=top, bottom=0.003, wspace=0.04, hspace=0.04)
    return style.save(figure, path)
