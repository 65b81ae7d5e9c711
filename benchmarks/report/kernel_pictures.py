"""Picture of single kernels: weights encoded and decoded in memory, against a plain copy and against other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot

from benchmarks.report import style
from benchmarks.report.selection import KERNELS, operations
from benchmarks.results import Result

DECODED = {name: title.partition(" (")[0] for name, title in KERNELS.items() if name != "copy"}


def kernels(encoding: Sequence[Result], decoding: Sequence[Result], path: Path) -> Path | None:
    """Bytes of BF16 a second, a line a format: encoding left, decoding right; None without results."""
    encoded, decoded = operations(encoding), operations(decoding, DECODED)
    names = [name for name in DECODED if name in encoded or name in decoded]
    if not names:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.42 * len(names) + 1.9), sharey=True, sharex=True, layout="constrained")
    for axis, found, title in zip(axes, (encoded, decoded), ("Encoding", "Decoding, as ComfyUI's nodes do it"), strict=True):
        for place, name in enumerate(names):
            shown = [row for row in found.get(name, {}).values() if row.bytes_per_second]
            for row in shown:
                label = (
                    "plain torch, the fallback without numba" if row.contender == "plain torch" else style.tool(row.contender)
                )
                size = 8 if row.contender == style.OURS else 5.5
                axis.plot(row.bytes_per_second, place, linestyle="", markersize=size, label=label, **style.look(row.contender))
        axis.set_title(title)
    if "copy" in encoded:
        speed = encoded["copy"]["numpy copy"].bytes_per_second
        for axis in axes:
            axis.axvline(speed, color="black", linewidth=1.2, label="a plain copy in memory")
    style.amount_axis(axes[0], "x", "file", (1, 3))
    style.by_line(axes[0], [DECODED[name] for name in names])
    axes[1].grid(axis="y", visible=False)
    axes[1].tick_params(axis="y", length=0)
    axes[1].spines["left"].set_visible(False)
    for axis in axes:
        axis.set_xlabel("of BF16 weights a second (right is faster)")
    style.legend_below(figure, *axes)
    return style.save(figure, path)
