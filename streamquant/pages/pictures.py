"""The pictures of a page, drawn by matplotlib as SVG that takes its text colour from the page, dark or light."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from streamquant.checkpoint.header import printable
from streamquant.errors import UsageError

INK = "#010203"  # stands for the page's own text colour, and is replaced by it
# Okabe and Ito's colours, which people of every colour vision tell apart; the markers tell them apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
CELL, LEFT, RIGHT, PANEL = 0.24, 1.7, 1.3, 0.75  # inches: of a cell, beside the cells, above and below those of a stack
TITLE = 10  # points
MAX_BLOCKS, MAX_KINDS, MAX_STACKS, MAX_POINTS, MAX_FORMATS = 400, 100, 24, 20_000, 12  # more of them no picture shows
MAX_DIGITS = 18  # of a block's number
_NUMBER = re.compile(r"(?<![0-9A-Za-z_])\d+(?![0-9A-Za-z_])")


@dataclass(frozen=True)
class Point:
    """One layer in the pictures. error: relative, of its weights."""

    name: str
    format: str
    error: float
    output_bytes: int


def require_matplotlib() -> None:
    """Raise UsageError where matplotlib is missing."""
    _matplotlib()


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UsageError("A report needs matplotlib for its pictures: pip install matplotlib.") from None
    # Objects of its own rather than pyplot's: no window, no state shared with the caller's pictures.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "streamquant", "font.family": "sans-serif", "font.size": 9,
        "text.parse_math": False,
        "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    return matplotlib, Figure, rc_context(settings)


def _svg(figure: Any, label: str) -> str:
    """The figure as an SVG element; `label` is read to those who cannot see it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # names of vocabularies, of no use here
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def blocks_and_kinds(points: Sequence[Point]) -> dict[str, tuple[list[int], list[str], np.ndarray]]:
    """Layers in blocks: stack -> (block numbers, kinds of layer, errors [kinds, blocks], NaN where there is no layer).

    Stacks too large for a picture are left out: a file can name a million blocks of a million kinds.
    """
    stacks: dict[str, dict[tuple[int, str], float]] = {}
    for point in points:
        if place := _place(point):
            stack, block, kind = place
            stacks.setdefault(stack, {})[block, kind] = point.error
    tables = {}
    for stack, cells in stacks.items():
        blocks, kinds = sorted({block for block, _ in cells}), list(dict.fromkeys(kind for _, kind in cells))
        if len(blocks) > MAX_BLOCKS or len(kinds) > MAX_KINDS:
            continue
        rows, columns = ({value: place for place, value in enumerate(values)} for values in (kinds, blocks))
        grid = np.full((len(kinds), len(blocks)), np.nan)
        for (block, kind), error in cells.items():
            grid[rows[kind], columns[block]] = error
        tables[stack] = (blocks, kinds, grid)
    return tables


def _place(point: Point) -> tuple[str, int, str] | None:
    """(stack, block number, kind of layer) of a layer in a block; None of all others."""
    match = _NUMBER.search(point.name)
    if not match or len(match[0]) > MAX_DIGITS or not math.isfinite(point.error):
        return None
    return point.name[: match.start()].rstrip("."), int(match[0]), point.name[match.end() :].lstrip(".")


def heat_map(points: Sequence[Point]) -> str | None:
    """Relative error by block and kind of layer, on one logarithmic colour scale; None when no layer is in a block.

    Each cell says which layer it is: to a person who points at it, and to the page in `data-layer`.
    """
    tables = {stack: table for stack, table in blocks_and_kinds(points).items() if (table[2] > 0).sum() > 1}
    if not tables:
        return None
    largest = sorted(tables, key=lambda stack: -tables[stack][2].size)[:MAX_STACKS]
    tables = {stack: table for stack, table in tables.items() if stack in largest}
    _, Figure, settings = _matplotlib()
    from matplotlib.colors import LogNorm

    every = np.concatenate([grid[grid > 0] for _, _, grid in tables.values()])
    norm = LogNorm(float(every.min()) / 1.02, float(every.max()) * 1.02)
    # Places are in inches: every cell is a square of the same size, in whatever stack.
    titles = {stack: _shortened(stack) or "layers" for stack in tables}
    widest = max(max(CELL * len(table[0]), _title_width(titles[stack])) for stack, table in tables.items())
    heights = [len(kinds) * CELL for _, kinds, _ in tables.values()]
    width, height = LEFT + widest + RIGHT, sum(heights) + PANEL * len(tables)
    with settings:
        figure = Figure(figsize=(width, height))
        top = height
        for number, ((stack, (blocks, kinds, grid)), tall) in enumerate(zip(tables.items(), heights, strict=True)):
            top -= PANEL / 2 + tall
            wide = len(blocks) * CELL
            panel = figure.add_axes((LEFT / width, top / height, wide / width, tall / height))
            top -= PANEL / 2
            _draw_panel(panel, titles[stack], blocks, [_shortened(kind) or "weight" for kind in kinds])
            shown = np.ma.masked_invalid(np.where(grid > 0, grid, np.nan))
            panel.pcolormesh(shown, norm=norm, cmap="cividis", gid=f"stack-{number}")
            panel.invert_yaxis()
        tall = min(height - PANEL, 2.4)
        bar = figure.add_axes(((LEFT + widest + 0.35) / width, 1 - (PANEL / 2 + tall) / height, 0.16 / width, tall / height))
        _draw_bar(bar, norm)
        svg = _svg(figure, "Heat map of the relative error by block and kind of layer")
    if sum(grid.size for _, _, grid in tables.values()) > MAX_POINTS:
        return svg
    layers = {place: point for point in points if (place := _place(point))}
    for number, (stack, (blocks, kinds, _)) in enumerate(tables.items()):
        svg = _with_names(svg, f"stack-{number}", [layers.get((stack, block, kind)) for kind in kinds for block in blocks])
    return svg


def _title_width(title: str) -> float:
    """Inches, and a little more: matplotlib's font is a wide one, but the reader's browser chooses its own."""
    from matplotlib.textpath import TextPath

    return 1.1 * TextPath((0, 0), title, size=TITLE).get_extents().width / 72


def _shortened(name: str, limit: int = 40) -> str:
    """The end of a long name, which tells more than its beginning."""
    shown = printable(name, 4096)
    return shown if len(shown) <= limit else f"…{shown[1 - limit :]}"


def _with_names(svg: str, group: str, layers: list[Point | None]) -> str:
    """The cells of a group, which are drawn row by row, with the names of their layers."""
    start = svg.index(f'<g id="{group}">')
    end = svg.index("</g>", start)
    opening, *cells = re.split("(?=<path )", svg[start:end])
    if len(cells) != len(layers):
        return svg
    for place, layer in enumerate(layers):
        if layer is not None:
            name = escape(printable(layer.name, 4096))
            cells[place] = cells[place].replace("<path ", f'<path data-layer="{name}" ', 1)
            cells[place] = cells[place].replace("/>", f"><title>{name}: {layer.error:.4g}</title></path>", 1)
    return svg[:start] + opening + "".join(cells) + svg[end:]


def _draw_panel(panel: Any, title: str, blocks: list[int], kinds: list[str]) -> None:
    panel.set_title(title, loc="left", fontsize=TITLE)
    step = max(1, len(blocks) // 24)
    panel.set_xticks(np.arange(len(blocks))[::step] + 0.5, [str(block) for block in blocks[::step]])
    panel.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    panel.tick_params(length=0)
    for side in panel.spines.values():
        side.set_visible(False)


def _draw_bar(bar: Any, norm: Any) -> None:
    """The colour scale, in rectangles: matplotlib's own would be a bitmap, which the page does not let in."""
    edges = np.geomspace(norm.vmin, norm.vmax, 65)
    bar.pcolormesh([0, 1], edges, np.sqrt(edges[1:] * edges[:-1])[:, None], norm=norm, cmap="cividis", edgecolors="face")
    bar.set_yscale("log")
    bar.set_xticks([])
    ticks = [edges[0], (edges[0] * edges[-1]) ** 0.5, edges[-1]]
    bar.set_yticks(ticks, [f"{value:.2g}" for value in ticks])
    bar.minorticks_off()
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    bar.set_ylabel("relative error of the weights")
    for side in bar.spines.values():
        side.set_visible(False)


def error_against_size(points: Sequence[Point]) -> str | None:
    """Each layer's relative error over its bytes in the output, a colour and a marker for each format."""
    drawn = [point for point in points if math.isfinite(point.error) and point.error > 0 and point.output_bytes]
    if not drawn:
        return None
    drawn = sorted(drawn, key=lambda point: -point.error)[:MAX_POINTS]
    _, Figure, settings = _matplotlib()
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    with settings:
        figure = Figure(figsize=(7.2, 3.6))
        panel = figure.subplots()
        formats: dict[str, list[Point]] = {}
        for point in drawn:
            known = point.format in formats or len(formats) < MAX_FORMATS
            formats.setdefault(point.format if known else "others", []).append(point)
        for number, (name, chosen) in enumerate(formats.items()):
            panel.scatter(
                [point.output_bytes / 1e6 for point in chosen], [point.error for point in chosen], s=26, alpha=0.85,
                linewidths=0, color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
                label=printable(name, 40),
            )  # fmt: skip
        panel.set_xscale("log")
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
            if _spans_little(axis):
                axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
                axis.set_minor_locator(NullLocator())
        panel.grid(True, which="major", color=INK, alpha=0.12, linewidth=0.6)
        panel.set_xlabel("size in the output, MB")
        panel.set_ylabel("relative error")
        panel.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
        return _svg(figure, "Relative error of every layer against its size")


def _spans_little(axis: Any) -> bool:
    """Whether an axis shows about a decade or less, in which powers of ten would give hardly a label."""
    low, high = axis.get_view_interval()
    return high / low < 15
