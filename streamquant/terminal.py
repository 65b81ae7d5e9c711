"""What the width of a terminal means: sentences break between words, tables fit, a progress bar stays on one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

MARGIN = 3  # columns right of a bar: a terminal echoes Ctrl-C as ^C there, which in a full row would begin another one
ROOMY, NARROW = 100, 72  # columns: from here on a bar is long; below this it says less
# A line may begin with a label: its other lines stand under what follows that.
_LABEL = re.compile(r" *\S+(?: \S+)?  +(?=\S)")
LONGEST_LABEL = 12
WIDEST = 10_000  # columns
HARD_SPACE = "\u00a0"
FOLDED = 16  # columns in which a long name may be folded


def wrapped(text: Text, width: int) -> Text:
    """`text` with line ends between its words. A line is wider than `width` columns only if it is a single word: names, paths
    and numbers stay whole.
    """
    lines = (piece for line in text.split("\n", allow_blank=True) for piece in _wrapped_line(line, width))
    return Text("\n", style=text.style).join(lines)


def _wrapped_line(line: Text, width: int) -> Iterator[Text]:
    plain = line.plain
    label = _LABEL.match(plain)
    indented = len(plain) - len(plain.lstrip(" "))
    indent = label.end() if label and label.end() <= LONGEST_LABEL else indented and indented + 2  # an item of a list
    starts = [0]
    for word in list(re.finditer(r"[^ ]+", plain))[1:]:
        room = width - (indent if starts[-1] else 0)
        if cell_len(plain[starts[-1] : word.end()]) > room:
            starts.append(word.start())
    for start, end in pairwise([*starts, len(plain)]):
        piece = line[start:end]
        piece.rstrip()
        yield Text(" " * indent).append_text(piece) if start else piece


def say(console: Console, text: Text) -> None:
    """Print a sentence: broken between words on a terminal, one line elsewhere. Text that is `no_wrap` is never broken, for it
    is to be copied whole: a path, a command.
    """
    if console.is_terminal and not text.no_wrap:
        text = wrapped(text, console.width)
    console.print(text, soft_wrap=True)


def show_table(console: Console, table: Table) -> None:
    """Print a table: as wide as a terminal if it can be made so narrow, elsewhere as wide as it needs to be, so that a name can
    be searched for.
    """
    before = console.width
    if not (console.is_terminal and _fits(console, table)):
        console.width = WIDEST
        console.width = Measurement.get(console, console.options, table).maximum
    console.print(table)
    console.width = before


def _fits(console: Console, table: Table) -> bool:
    """Whether a table can be made narrow enough; if not, rich would break numbers and leave out columns."""
    needed = [max(_needs(console, column, cell) for cell in (column.header, *column.cells)) for column in table.columns]
    return sum(needed) + 2 * (len(needed) - 1) <= console.width


def _needs(console: Console, column: Column, cell: RenderableType) -> int:
    """Columns that a cell cannot do without."""
    measured = Measurement.get(console, console.options, cell)
    if column.no_wrap:
        return measured.maximum
    may_be_cut = column.overflow == "fold" and isinstance(cell, str | Text)  # a long name, a regular expression
    return min(measured.minimum, FOLDED) if may_be_cut else measured.minimum


@dataclass(frozen=True)
class Phrase:
    """A cell of words that may take several lines; what belongs together ("128 x 128", "rotated by 256") stays together."""

    text: str

    @property
    def _bound(self) -> Text:
        together = re.compile(r"(rotated )?by (?=\d)|(?<=\d) x (?=\d)")
        return Text(together.sub(lambda match: match[0].replace(" ", HARD_SPACE), self.text))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(len, self._bound.plain.split(" "))), len(self.text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in wrapped(self._bound, options.max_width).plain.replace(HARD_SPACE, " ").split("\n"):
            yield Text(line, no_wrap=True)


@dataclass(frozen=True)
class Rows:
    """A table that may be long and has a long name in its first column: every row is one line, as wide as it needs to be; on
    a terminal that is too narrow for it the name has a line of its own. bad: numbers of the rows that are to stand out.
    breaks: names may take several lines, broken after commas, where that makes the table fit.
    """

    headings: tuple[str, ...]
    right: tuple[str, ...]
    rows: list[list[str]]
    bad: set[int] | frozenset[int] = frozenset()
    breaks: bool = False

    def lines(self, width: int | None = None) -> Iterator[tuple[str, str]]:
        """(line, style): padded columns, two spaces between them. width: of the terminal."""
        widths = self._widths
        right = [heading in self.right for heading in self.headings]
        is_stacked = width is not None and not self._fits(width)
        if is_stacked and self.breaks and (broken := self._broken())._fits(width):
            yield from broken.lines(width)
            return
        for number, row in enumerate((self.headings, *self.rows), start=-1):
            style = "bold" if number < 0 else "red" if number in self.bad else ""
            cells = list(map(_padded, row, widths, right))
            if is_stacked:
                yield cells[0].rstrip(), style
                cells[0] = ""
            yield "  ".join(cells).rstrip(), style

    @property
    def _widths(self) -> list[int]:
        return [max(map(cell_len, column)) for column in zip(self.headings, *self.rows, strict=True)]

    def _fits(self, width: int) -> bool:
        return sum(self._widths) + 2 * (len(self.headings) - 1) <= width

    def _broken(self) -> Rows:
        """With a line for each part of a name."""
        found = []
        for name, *cells in self.rows:
            first, *others = re.split("(?<=,) ", name)
            found += [[first, *cells], *([f"  {part}", *[""] * len(cells)] for part in others)]
        return Rows(self.headings, self.right, found)


def _padded(cell: str, width: int, is_right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if is_right else cell + space


Part = Text | Table | Tree | Rows  # of a view


def show(console: Console, part: Part) -> None:
    """Print a part of a view. On a terminal tables fit its width and sentences break between words, but a line that is to be
    copied is never cut; elsewhere all is as wide as it needs to be, so that a name can be searched for.
    """
    if isinstance(part, Text):
        say(console, part)
    elif isinstance(part, Table):
        show_table(console, part)
    elif isinstance(part, Tree):
        console.print(part, soft_wrap=not console.is_terminal)
    else:
        for line, style in part.lines(console.width if console.is_terminal else None):
            if style and console.is_terminal:
                console.print(Text(line, style=style), soft_wrap=True)
            else:
                console.file.write(f"{line}\n")


class OneLine(Progress):
    """A progress bar that never takes two lines, which could not be erased reliably."""

    def get_renderable(self) -> ConsoleRenderable:
        return _WithMargin(super().get_renderable())


@dataclass(frozen=True)
class _WithMargin:
    """What is not to reach the right edge."""

    inner: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.inner, options.update_width(max(1, options.max_width - MARGIN)))


def progress_bar(console: Console, *fields: str) -> OneLine:
    """A bar by bytes. fields: of the task, shown after the speed where there is room; the last one gets what is left of the
    line.
    """

    def whole() -> Column:
        return Column(no_wrap=True)

    columns = [
        BarColumn(bar_width=28 if console.width >= ROOMY else 10, table_column=whole()),
        TextColumn("{task.percentage:>3.0f}%"),
        DownloadColumn(table_column=whole()),
        TransferSpeedColumn(table_column=whole()),
        TimeRemainingColumn(compact=True, table_column=whole()),
    ]
    has_room = console.width >= NARROW
    if has_room:
        columns += [TextColumn(f"{{task.fields[{field}]}}") for field in fields[:-1]]
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns.append(TextColumn(f"[dim]{{task.fields[{fields[-1]}]}}", table_column=rest))
    return OneLine(*columns, console=console, transient=True, expand=has_room)


def can_redraw(console: Console) -> bool:
    """Whether a bar can be drawn there: not in a file, nor on a terminal that cannot move its cursor."""
    return console.is_terminal and not console.is_dumb_terminal
