"""What all views share: how tables look, how numbers are spelled, how progress is shown."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from streamquant.checkpoint.header import printable
from streamquant.console import PLAIN_SECONDS, Screen
from streamquant.terminal import can_redraw, progress_bar, say, show_table, wrapped
from streamquant.verdict import Unwatched, Watcher

HARD_SPACE = "\u00a0"
LISTED = 12  # findings shown before the rest is counted


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
        pads = ["rjust" if heading in self.right else "ljust" for heading in self.headings]
        is_stacked = width is not None and not self._fits(width)
        if is_stacked and self.breaks and (broken := self._broken())._fits(width):
            yield from broken.lines(width)
            return
        for number, row in enumerate((self.headings, *self.rows), start=-1):
            style = "bold" if number < 0 else "red" if number in self.bad else ""
            cells = [getattr(cell, pad)(room) for cell, pad, room in zip(row, pads, widths, strict=True)]
            if is_stacked:
                yield cells[0].rstrip(), style
                cells[0] = ""
            yield "  ".join(cells).rstrip(), style


    @property
    def _widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]

    def _fits(self, width: int) -> bool:
        return sum(self._widths) + 2 * (len(self.headings) - 1) <= width

    def _broken(self) -> Rows:
        """With a line for each part of a name."""
        found = []
        for name, *cells in self.rows:
            first, *others = re.split("(?<=,) ", name)
            found += [[first, *cells], *([f"  {part}", *[""] * len(cells)] for part in others)]
        return Rows(self.headings, self.right, found)


def rows(
    headings: tuple[str, ...], right: tuple[str, ...], found: list[list[str]], bad: set[int] | frozenset[int] = frozenset()
) -> Rows:
    """Rows of words as a table."""
    return Rows(headings, right, found, bad)


def show(screen: Screen, parts: list[Table | Text | Tree | Rows]) -> None:
    """Print to standard output. On a terminal tables fit its width and sentences break between words, but a line that is a path
    is never cut, so that it can be copied whole; elsewhere all is as wide as it needs to be, so that a name can be searched
    for.
    """
    for part in parts:
        if isinstance(part, Rows):
            for line, style in part.lines(screen.out.width if screen.out.is_terminal else None):
                if style and screen.out.is_terminal:
                    screen.out.print(Text(line, style=style), soft_wrap=True)
                else:
                    screen.out.file.write(f"{line}\n")
        elif isinstance(part, Text):
            say(screen.out, part)
        elif isinstance(part, Tree) and not screen.out.is_terminal:
            screen.out.print(part, soft_wrap=True)
        elif isinstance(part, Table):
            show_table(screen.out, part)
        else:
            screen.out.print(part)


def table(*columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """An empty table in the manner of this program. right: the columns that hold numbers. whole: those that are not narrowed
    before all others are.
    """
    made = Table(box=None, header_style="bold", pad_edge=False)
    for heading in columns:
        if heading in right:
            made.add_column(heading, justify="right", no_wrap=True)
        else:
            made.add_column(heading, overflow="fold", no_wrap=heading in whole)
    return made


@dataclass(frozen=True)
class Phrase:
    """A cell of words that may take several lines; what belongs together ("128 x 128", "rotated by 256") stays together."""

    text: str

    @property
    def _bound(self) -> Text:
        together = re.compile(r"(rotated )?by (?=\d)|(?<=\d) x (?=\d)")
        return Text(together.sub(lambda match: match[0].replace(" ", HARD_SPACE), self.text))

    def __rich_measure__(self, console: RichConsole, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(len, self._bound.plain.split(" "))), len(self.text))

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        for line in wrapped(self._bound, options.max_width).plain.replace(HARD_SPACE, " ").split("\n"):
            yield Text(line, no_wrap=True)


def name_of(text: str, limit: int = 120) -> Text:
    """A name from a file: data, never markup."""
    return Text(printable(text, limit))


def path_of(path: Path) -> str:
    return printable(str(path), 4096)


def path_line(path: Path) -> Text:
    """A path on a line of its own, never broken."""
    return Text(path_of(path), style="green", no_wrap=True)


def report_line(path: Path) -> Text:
    """Where a page was written."""
    return Text.assemble(("report  ", "bold"), path_of(path), no_wrap=True)


def ratio(value: float | None) -> str:
    """A relative error."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "inf" if value > 0 else "nan"
    return f"{value:.4f}" if 0.0001 <= value < 1000 or not value else f"{value:.1e}"


def decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "exact" if value > 0 else "none"


def shape_of(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def count(number: int, noun: str) -> str:
    """ "1 layer", "2,000 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def sentences(heading: str, lines: list[str]) -> list[Text]:
    """A heading and the first few lines under it."""
    parts = [Text(f"\n{heading}", style="bold"), *(Text(f"  {printable(line, 4096)}") for line in lines[:LISTED])]
    if len(lines) > LISTED:
        parts.append(Text(f"  and {len(lines) - LISTED:,} more (--json lists all)"))
    return parts


@contextmanager
def watching(screen: Screen) -> Iterator[Watcher]:
    """A watcher in the manner the user chose: a bar on a terminal, lines in a log, nothing with --json or --quiet."""
    if screen.as_json or screen.quiet:
        yield Unwatched()
    elif can_redraw(screen.err):
        with Progress(screen) as progress:
            yield progress
    else:
        yield Lines(screen)


class Progress(Unwatched):
    """A progress bar by bytes, with the tensor in hand."""

    def __init__(self, screen: Screen):
        self._bar = progress_bar(screen.err, "tensor")
        self._task = self._bar.add_task("", total=None, tensor="", start=False)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def started(self, total_bytes: int) -> None:
        self._bar.update(self._task, total=total_bytes)
        self._bar.start_task(self._task)

    def progress(self, name: str, nbytes: int) -> None:
        self._bar.update(self._task, advance=nbytes, tensor=escape(printable(name)))


class Lines(Unwatched):
    """A line now and then, for logs."""

    def __init__(self, screen: Screen):
        self._screen = screen
        self._done = self._total = 0
        self._start = self._last = time.monotonic()

    def started(self, total_bytes: int) -> None:
        self._total = total_bytes

    def progress(self, name: str, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        speed = decimal(int(self._done / max(now - self._start, 1e-9)))
        text = f"{self._done / max(self._total, 1):4.0%}  {decimal(self._done)} of {decimal(self._total)}  {speed}/s"
        say(self._screen.err, Text(f"{text}  {printable(name, 60)}"))
