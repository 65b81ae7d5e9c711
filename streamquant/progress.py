"""How far a piece of work has come: a bar on a terminal, lines now and then in a log, events for a program."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.text import Text

from streamquant.budget import MEBIBYTE, TileSizes, anonymous_bytes
from streamquant.checkpoint.header import printable, printable_lines
from streamquant.console import Screen
from streamquant.options import Observer, Silent
from streamquant.plan import Plan, Unit
from streamquant.report import LayerResult
from streamquant.terminal import can_redraw, progress_bar, say
from streamquant.verdict import Unwatched, Watcher
from streamquant.views.convert import layer_line

LINE_SECONDS = 5.0  # between two progress lines when there is no terminal
BAR_SECONDS = 0.05  # between two looks at the memory
EVENT_SECONDS = 0.5
COMPILING = "The kernels are compiled for this processor now, as after every update: it takes some seconds, once."


@contextmanager
def observing(screen: Screen) -> Iterator[Observer]:
    """An observer for one conversion, in the manner the user chose."""
    if screen.as_json:
        yield Events(screen)
    elif screen.quiet:
        yield Silent()
    elif can_redraw(screen.err):
        with Bar(screen.err, shows_memory=True) as bar:
            yield Narrator(bar)
    else:
        yield Narrator(Lines(screen.err))


@contextmanager
def watching(screen: Screen) -> Iterator[Watcher]:
    """A watcher for any other work: a bar on a terminal, lines in a log, nothing with --json or --quiet."""
    if screen.as_json or screen.quiet:
        yield Unwatched()
    elif can_redraw(screen.err):
        with Bar(screen.err) as bar:
            yield bar
    else:
        yield Lines(screen.err)


class Bar(Unwatched):
    """A progress bar by bytes, with the tensor in hand. memory_budget: bytes, beside which the memory in use is shown."""

    def __init__(self, console: Console, shows_memory: bool = False):
        self.console, self.memory_budget = console, 0
        self._bar = progress_bar(console, *(["memory"] if shows_memory else []), "tensor")
        self._unshown, self._last = 0, 0.0
        self._task = self._bar.add_task("", total=None, start=False, memory="", tensor="")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def compiling(self) -> None:
        say(self.console, Text(COMPILING))

    def started(self, total_bytes: int, done_bytes: int = 0) -> None:
        self._bar.update(self._task, total=total_bytes, completed=done_bytes)
        self._bar.start_task(self._task)

    def progress(self, name: str, nbytes: int) -> None:
        self._unshown += nbytes
        now = time.monotonic()
        if now - self._last < BAR_SECONDS:
            return  # small tensors come by the thousand a second
        memory = _memory(self.memory_budget)
        self._bar.update(self._task, advance=self._unshown, memory=memory, tensor=escape(printable(name)))
        self._unshown, self._last = 0, now


class Lines(Unwatched):
    """A line now and then, for logs. memory_budget: as of a `Bar`."""

    def __init__(self, console: Console):
        self.console, self.memory_budget = console, 0
        self._done = self._total = self._skipped = 0
        self._start = self._last = time.monotonic()

    def compiling(self) -> None:
        say(self.console, Text(COMPILING))

    def started(self, total_bytes: int, done_bytes: int = 0) -> None:
        self._total, self._done, self._skipped = total_bytes, done_bytes, done_bytes

    def progress(self, name: str, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        speed = (self._done - self._skipped) / max(now - self._start, 1e-9)
        parts = [
            f"{self._done / max(self._total, 1):4.0%}",
            f"{decimal(self._done)} of {decimal(self._total)}",
            f"{decimal(int(speed))}/s",
            f"{(self._total - self._done) / max(speed, 1.0):.0f} s left",
            _memory(self.memory_budget),
            printable(name, 60),
        ]
        say(self.console, Text("  ".join(filter(None, parts))))


def _memory(budget: int) -> str:
    """Memory in use against what was allowed, where a limit was set."""
    return f"{anonymous_bytes() // MEBIBYTE}/{budget // MEBIBYTE} MiB RAM" if budget else ""


class Narrator(Silent):
    """Tells a person of a conversion: notes, the layers whose rounding was learned, and how far it has come."""

    def __init__(self, meter: Bar | Lines):
        self.meter, self._console = meter, meter.console

    def note(self, text: str) -> None:
        say(self._console, Text(printable_lines(text)))

    def compiling(self) -> None:
        self.meter.compiling()

    def started(self, plan: Plan, tiles: TileSizes, done_bytes: int) -> None:
        self.meter.memory_budget = tiles.memory_budget
        self.meter.started(plan.source_bytes, done_bytes)

    def finished(self, layer: LayerResult) -> None:
        line = layer_line(layer)
        if line and can_redraw(self._console):
            self._console.print(line, no_wrap=True, overflow="ellipsis")
        elif line:
            self._console.print(line, soft_wrap=True)

    def progress(self, unit: Unit, source_bytes: int) -> None:
        self.meter.progress(unit.key, source_bytes)


class Events(Silent):
    """A conversion told to a program."""

    def __init__(self, screen: Screen):
        self.screen = screen
        self._done = self._total = 0
        self._last = 0.0

    def note(self, text: str) -> None:
        self.screen.line("note", text=text)

    def started(self, plan: Plan, tiles: TileSizes, done_bytes: int) -> None:
        self._done, self._total = done_bytes, plan.source_bytes
        self.screen.line("started", total_bytes=self._total, done_bytes=done_bytes, output_bytes=plan.output_size)

    def finished(self, layer: LayerResult) -> None:
        if layer.knowledge:
            self.screen.line("layer", **asdict(layer))

    def progress(self, unit: Unit, source_bytes: int) -> None:
        self._done += source_bytes
        now = time.monotonic()
        if now - self._last >= EVENT_SECONDS or self._done == self._total:
            self._last = now
            self.screen.line(
                "progress",
                done_bytes=self._done,
                total_bytes=self._total,
                tensor=unit.key,
                anonymous_bytes=anonymous_bytes(),
            )
