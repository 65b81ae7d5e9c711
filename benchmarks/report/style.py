"""How pictures look: colours that people with any colour vision tell apart, a ground of their own for dark pages too.

Colours are Okabe and Ito's ("Color Universal Design", 2008). Whoever has a colour has a marker too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.results import OURS

matplotlib.use("Agg")  # no window, no display

# By the first word of a contender's name.
TOOLS = {
    OURS: dict(color="#0072B2", marker="o"),
    "convert-to-quant": dict(color="#D55E00", marker="s"),
    "bitsandbytes": dict(color="#009E73", marker="^"),
    "comfy-kitchen": dict(color="#CC79A7", marker="D"),
    "torchao": dict(color="#E69F00", marker="v"),
    "optimum-quanto": dict(color="#56B4E9", marker="P"),
    "sdnq": dict(color="#000000", marker="X"),
    "plain": dict(color="#8a8a8a", marker="h"),
    "cp": dict(color="#000000", marker="|"),
}
STYLE = {
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.12,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.hashsalt": "streamquant",
}


def tool(contender: str) -> str:
    """The first word of a contender's name: which tool it is."""
    return contender.split()[0]


def look(contender: str) -> dict[str, str]:
    """Colour and marker of a contender."""
    return TOOLS[tool(contender)]


def times_axis(axis: Axes, which: str = "x") -> None:
    """A logarithmic axis of factors: ticks such as 0.5 x, 10 x."""
    logarithmic(axis, which, (1, 2, 5), lambda value: f"{value:g} x")


def amount_axis(axis: Axes, which: str, name: str, steps: Sequence[int] = (1, 2, 5)) -> None:
    """A logarithmic axis of bytes: decimal for files, binary for memory ("memory"); ticks at `steps` of a power of ten."""
    base, units = (1024, ("B", "KiB", "MiB", "GiB")) if name == "memory" else (1000, ("B", "kB", "MB", "GB"))

    def text(value: float) -> str:
        step = 0
        while value >= base * 0.999 and step < len(units) - 1:
            value, step = value / base, step + 1
        return f"{value:g} {units[step]}"

    if name == "memory":
        getattr(axis, f"set_{which}scale")("log", base=2)
        target = getattr(axis, f"{which}axis")
        target.set_major_locator(matplotlib.ticker.LogLocator(base=2, numticks=20))
        target.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    else:
        logarithmic(axis, which, steps, text)


def logarithmic(axis: Axes, which: str, steps: Sequence[int], text: Callable[[float], str]) -> None:
    """A logarithmic axis with ticks at `steps` of each power of ten."""
    getattr(axis, f"set_{which}scale")("log")
    target = getattr(axis, f"{which}axis")
    target.set_major_locator(matplotlib.ticker.LogLocator(subs=steps))
    target.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    target.set_minor_formatter(matplotlib.ticker.NullFormatter())


def by_line(axis: Axes, titles: Sequence[str]) -> None:
    """One horizontal line a title, the first on top."""
    axis.set_yticks(range(len(titles)), titles)
    axis.set_ylim(len(titles) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    for place in range(1, len(titles)):
        axis.axhline(place - 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def legend_below(figure: Figure, *axes: Axes, columns: int | None = None) -> None:
    """One legend for all axes, below them, a label once."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns or min(len(found), 5))


def save(figure: Figure, path: Path) -> Path:
    """Write it, without a date, so that the same results give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        figure.savefig(path, metadata={"Date": None})
    else:
        figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
