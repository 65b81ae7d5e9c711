"""Pictures of whole conversions: time against a copy of the file, memory against its size, recovery after a kill."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot

from benchmarks.report import style
from benchmarks.report.selection import CONVERSIONS, OURS, PEER, conversions, recoveries
from benchmarks.results import Result

MEMORY_CASES = ("fp8-tensor", "int8-row", "nf4", "nf4-double")
LABEL_LEFT = 0.75  # times a copy, from which a label on the right would lie across the copy's line
LARGEST = 64.4e9  # Flux.2-dev


def speed(rows: Sequence[Result], source: str, path: Path) -> Path | None:
    """Seconds over those of a copy, a line a format; None without results."""
    found = conversions(rows, source)
    if not found:
        return None
    figure, axis = pyplot.subplots(figsize=(8, 0.36 * len(found) + 1.5), layout="constrained")
    for place, heat in enumerate(found.values()):
        copied = heat["cp"].p50
        for name in (OURS, PEER):
            row = heat.get(name)
            if row is None or row.p50 is None:
                continue
            axis.plot([row.p20 / copied, row.p80 / copied], [place, place], color=style.look(name)["color"], linewidth=2)
            label = name if name == OURS else f"{name} --simple"
            axis.plot(row.p50 / copied, place, linestyle="", markersize=7, label=label, **style.look(name))
            text = f"{row.p50:.1f} s" if row.p50 < 100 else f"{row.p50:.0f} s"
            # Beside the line of the copy, not across it.
            is_left = LABEL_LEFT < row.p80 / copied < 1
            axis.annotate(
                text, ((row.p20 if is_left else row.p80) / copied, place), xytext=(-7 if is_left else 7, 0),
                textcoords="offset points", ha="right" if is_left else "left", va="center", fontsize=8, color="#444444",
            )  # fmt: skip
    axis.axvline(1, color="black", linewidth=1.2, label="cp and fsync of the source", zorder=1)
    style.times_axis(axis)
    axis.set_xlim(0.4, 20)
    style.by_line(axis, [CONVERSIONS[case].replace("`", "").replace("the command above, with ", "") for case in found])
    axis.set_xlabel("time over that of a copy, cold cache (left is faster; bars: p20 to p80)")
    axis.set_title(f"{source[:-2]} {source[-2:]} of BF16 weights shaped like Flux.2, converted to")
    style.legend_below(figure, axis)
    return style.save(figure, path)


def memory(rows: Sequence[Result], path: Path) -> Path | None:
    """Peak anonymous memory against the size of the file, ours and the peer's; None without results."""
    shown = [row for row in rows if row.case in MEMORY_CASES and row.peak_anonymous_bytes and "one-tensor" not in row.source]
    if not shown:
        return None
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name, label in ((OURS, f"{OURS}: every format and session"), (PEER, f"{PEER} --simple")):
        points = sorted((row.size_bytes, row.peak_anonymous_bytes) for row in shown if row.contender == name)
        if not points:
            continue
        sizes, peaks = np.array(points, dtype=float).T
        axis.plot(sizes, peaks, linestyle="", markersize=5, alpha=0.8, label=label, **style.look(name))
        colour = style.look(name)["color"]
        distinct = np.unique(sizes)
        medians = np.array([np.median(peaks[sizes == size]) for size in distinct])
        if name == OURS:
            axis.plot(distinct, medians, color=colour, linewidth=1.5)
            axis.annotate(
                f"{medians[-1] / 2**20:.0f} MiB", (distinct[-1], medians[-1]), xytext=(0, 8), textcoords="offset points",
                ha="center", color=colour,
            )  # fmt: skip
            continue
        # What it holds grows with its output; one size gives a line through nothing but the interpreter's own share.
        slope, fixed = np.polyfit(distinct, medians, 1) if len(distinct) > 1 else (medians[0] / distinct[0], 0.0)
        axis.plot(distinct, fixed + slope * distinct, color=colour, linewidth=1.5)
        beyond = np.geomspace(distinct[-1], LARGEST, 30)
        axis.plot(
            beyond, fixed + slope * beyond, color=colour, linewidth=1.5, linestyle="--", label="extrapolated, not measured"
        )
        axis.annotate(
            f"{(fixed + slope * LARGEST) / 2**30:.0f} GiB?", (LARGEST, fixed + slope * LARGEST), xytext=(-4, 4),
            textcoords="offset points", ha="right", va="bottom", color=colour,
        )  # fmt: skip
    style.amount_axis(axis, "x", "file")
    style.amount_axis(axis, "y", "memory")
    axis.set_xlabel("size of the BF16 file (16 GB and more: sparse)")
    axis.set_ylabel("peak anonymous memory")
    axis.set_title("Memory of a conversion")
    style.legend_below(figure, axis, columns=3)
    return style.save(figure, path)


def recovery(rows: Sequence[Result], path: Path) -> Path | None:
    """What a kill costs at each moment: time lost, and bytes written again; None without results."""
    found = recoveries(rows)
    if not found:
        return None
    titles = {"int8-default": "INT8, as it comes", "headline": "NF4 + FP8, as it comes"}
    names = [f"{titles.get(case, CONVERSIONS.get(case, case))}, {moment}" for case, _, moment in found]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 0.3 * len(found) + 1.7), sharey=True, layout="constrained")
    for place, ((_, name, _), by_metric) in enumerate(found.items()):
        # Noise can make a run that went on faster than the uninterrupted one.
        lost = max(by_metric["seconds lost"].p50, 0)
        left.barh(place, lost, height=0.6, color=style.look(name)["color"], label=name)
        left.annotate(f"{lost:.1f} s", (lost, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
        if name == OURS:
            again = by_metric["bytes written again"]
            share = 100 * max(again.p50, 0) / again.output_bytes
            right.barh(place, share, height=0.6, color=style.look(name)["color"])
            right.annotate(
                f"{max(again.p50, 0) / 1e6:.1f} MB, {share:.2f} %", (share, place), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
        else:
            right.annotate("starts again", (0, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    style.by_line(left, names)
    left.set_xlim(0, left.get_xlim()[1] * 1.1)
    right.set_xlim(0, max(right.get_xlim()[1] * 1.6, 1))
    left.set_xlabel("seconds lost, start-up included")
    right.set_xlabel("bytes written again, of the output (%)")
    left.set_title("After kill -9")
    style.legend_below(figure, left)
    return style.save(figure, path)


def tensor_counts(rows: Sequence[Result], path: Path) -> Path | None:
    """Seconds of each step against how many tensors a file has, the newest of each number; None without results."""
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.p50 is not None:
            points.setdefault(row.contender, {})[int(row.case.partition(" ")[0])] = row.p50
    if not points:
        return None
    figure, axis = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    # What is compared are the steps of one program, which have no colours of their own.
    for (name, found), look in zip(points.items(), itertools.cycle(style.TOOLS.values())):
        axis.plot(*zip(*sorted(found.items()), strict=True), markersize=5, linewidth=1.4, label=name, **look)
    axis.set(
        xscale="log", yscale="log", xlabel="tensors in the file", ylabel="seconds", title="Time against the number of tensors"
    )
    counts = sorted(set().union(*points.values()))
    axis.set_xticks(counts, [f"{count:,}" for count in counts])
    axis.set_xticks([], minor=True)
    style.legend_below(figure, axis)
    return style.save(figure, path)
