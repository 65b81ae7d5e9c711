"""Picture of quality at equal bytes: error against bits a weight, a mark per tool and format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.report import style
from benchmarks.report.equal_bytes import CALIBRATED, PANELS, Point, points
from benchmarks.results import Result

FEW, MANY = 5.6, 7.6  # bits: 4-bit formats are below the one, 8-bit formats above the other


def at_equal_bytes(rows: Sequence[Result], path: Path) -> Path | None:
    """A line per model, left the formats of about 4 bits, right those of 8; None without results."""
    found = {model: points(rows, model, metric) for model, (metric, _) in PANELS.items()}
    found = {model: shown for model, shown in found.items() if shown}
    if not found:
        return None
    figure, axes = pyplot.subplots(len(found), 2, figsize=(12, 5.2 * len(found)), squeeze=False, layout="constrained")
    for (few, many), (model, shown) in zip(axes, found.items(), strict=True):
        for axis, part, title in (
            (few, [point for point in shown if point.bits < FEW], "about 4 bits"),
            (many, [point for point in shown if point.bits > MANY], "about 8 bits"),
        ):
            _panel(axis, part)
            axis.set(title=f"{model}, {title}", xlabel="bits a weight, scales included", ylabel=PANELS[model][1])
        between = [point for point in shown if FEW <= point.bits <= MANY]
        if between:
            names = (f"{p.format} of {style.tool(p.contender)} ({p.bits:.1f} bits: {p.error:.2g})" for p in between)
            few.annotate(
                f"not in the picture: {', '.join(names)}", (0, 0), xytext=(3, 3), xycoords="axes fraction",
                textcoords="offset points", fontsize=6.5, color="#555555",
            )  # fmt: skip
    style.legend_below(figure, *axes.flat, columns=5)
    return style.save(figure, path)


def _panel(axis: Axes, shown: Sequence[Point]) -> None:
    """Marks, and beside them, at the right edge, what each is: names from the largest error down, as far apart as they need."""
    for point in shown:
        look = dict(style.look(point.contender))
        calibrated = point.method == CALIBRATED
        label = style.tool(point.contender)
        if point.method:
            label = f"{style.OURS}, {'calibrated' if calibrated else 'as it comes'}"
        filled = look["color"] if calibrated or not point.method else "white"
        axis.plot(
            point.bits, point.error, linestyle="", markersize=8 if point.method else 6, label=label, markerfacecolor=filled,
            markeredgewidth=1.4, zorder=4 if point.method else 3, alpha=0.9, **look,
        )  # fmt: skip
    if not shown:
        return
    style.logarithmic(axis, "y", (1, 2, 3, 5), lambda value: f"{value:.5f}".rstrip("0"))
    axis.margins(x=0.1, y=0.05)
    left, right = axis.get_xlim()
    edge = right + 0.04 * (right - left)
    axis.set_xlim(left, right + 0.55 * (right - left))
    low, high = (math.log(value) for value in axis.get_ylim())
    ordered = sorted(shown, key=lambda point: -point.error)
    step = min(0.042, 0.98 / len(ordered)) * (high - low)
    heights = [math.log(point.error) for point in ordered]
    # From the top each name goes below the one before, then from the bottom each that fell out of the picture goes back up.
    for i in range(1, len(heights)):
        heights[i] = min(heights[i], heights[i - 1] - step)
    floor = low + 0.3 * step
    for i in reversed(range(len(heights))):
        heights[i] = max(heights[i], floor)
        floor = heights[i] + step
    for point, height in zip(ordered, heights, strict=True):
        colour = style.look(point.contender)["color"]
        axis.annotate(
            point.format if point.method else f"{point.format}, {unversioned(point.contender)}", (point.bits, point.error),
            xytext=(edge, math.exp(height)), textcoords="data", fontsize=7, va="center", color=colour,
            weight="bold" if point.method else "normal",
            arrowprops=dict(arrowstyle="-", color=colour, alpha=0.35, linewidth=0.6, shrinkA=2, shrinkB=3, relpos=(0, 0.5)),
        )  # fmt: skip


def unversioned(contender: str) -> str:
    """A tool's name and way of rounding, without its version."""
    return " ".join(word for word in contender.split() if not word[0].isdigit())
