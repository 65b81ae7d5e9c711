"""Everything a person sees: notes, progress, tables, errors; and the same as JSON lines for programs.

Results go to standard output, messages and progress to standard error. Names that come from a file are made printable
and never read as markup.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from streamquant.budget import TileSizes, anonymous_bytes
from streamquant.checkpoint.header import printable, printable_lines
from streamquant.errors import StreamquantError
from streamquant.options import Silent
from streamquant.plan import Plan, Unit
from streamquant.presets import Preset
from streamquant.report import NEAREST, SEARCHED, FormatSummary, LayerResult, Report
from streamquant.terminal import can_redraw, progress_bar, say, show_table
from streamquant.verdict import finite

MEBIBYTE = 1 << 20
PLAIN_SECONDS = 5.0  # between two progress lines when there is no terminal
BAR_SECONDS = 0.05  # between two looks at the memory
JSON_SECONDS = 0.5
UNMEASURED = ("copy", "cast")  # formats that have no error
LISTED = 12  # fallbacks shown before the rest is counted


def version_text(own: str) -> str:
    """The versions that matter, one line, without importing any of them."""
    found = []
    for package in ("torch", "triton", "bitsandbytes", "numba", "safetensors"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} -")
    return f"streamquant {own} ({', '.join(found)})"


class Screen:
    """One command's output, in the manner the user chose."""

    def __init__(self, as_json: bool = False, quiet: bool = False, out: Console | None = None, err: Console | None = None):
        self.as_json, self.quiet = as_json, quiet
        self.out = out or Console(highlight=False)
        self.err = err or Console(stderr=True, highlight=False)

    def line(self, event: str, **values: Any) -> None:
        """One JSON line on standard output, in ASCII; what JSON cannot hold (NaN, infinity) is null."""
        sys.stdout.write(json.dumps(finite({"event": event, **values}), allow_nan=False) + "\n")
        sys.stdout.flush()

    def fail(self, error: StreamquantError, go_on_with: str | None = None) -> None:
        """Say what went wrong, and the command that goes on."""
        if self.as_json:
            kind = type(error).__name__
            self.line("error", kind=kind, message=str(error), exit_code=error.exit_code, resume=go_on_with)
        say(self.err, Text.assemble(("error: ", "bold red"), printable_lines(str(error))))
        if go_on_with:
            say(self.err, Text.assemble(("go on with: ", "bold"), printable_lines(go_on_with), no_wrap=True))

    @contextmanager
    def watching(self) -> Iterator[Any]:
        """An observer for one conversion."""
        if self.as_json:
            yield JsonLines(self)
        elif self.quiet:
            yield Silent()
        elif can_redraw(self.err):
            with Bar(self.err) as bar:
                yield bar
        else:
            yield PlainLines(self.err)

    def show_plan(self, plan: Plan, tiles: TileSizes, free: int, destination: Path) -> None:
        """The plan of a dry run."""
        if self.as_json:
            self.line("plan", **plan_as_json(plan, tiles, free, destination))
        elif not self.quiet:
            self.show(plan_view(plan, tiles, free, destination))

    def show_report(self, report: Report) -> None:
        """The end of a conversion: a table per format, and where the file is."""
        if self.as_json:
            self.line("done", **report.as_json())
        elif not self.quiet:
            self.show(report_view(report))

    def show(self, parts: list[Table | Text]) -> None:
        """Print the parts of a view to standard output."""
        for part in parts:
            if isinstance(part, Text):
                say(self.out, part)
            else:
                show_table(self.out, part)

    def show_presets(self, known: Iterable[Preset]) -> None:
        """A table of the architectures."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in ("preset", "architecture", "flags", "recognised"):
            table.add_column(heading)
        for preset in known:
            if not preset.name.startswith("_"):
                flags = " ".join(f"--{flag}" for flag in preset.flags)
                table.add_row(preset.name, preset.title, flags, "by its keys" if preset.recognise_all else "by flag only")
        show_table(self.out, table)


class Bar(Silent):
    """A progress bar by bytes, with the tensor in hand and the memory in use."""

    def __init__(self, console: Console):
        self.console = console
        self._bar = progress_bar(console, "memory", "tensor")
        self._unshown, self._last = 0, 0.0
        self._task = self._bar.add_task("", total=None, memory="", tensor="", start=False)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        say(self.console, Text(printable_lines(text)))

    def started(self, plan: Plan, tiles: TileSizes, done_bytes: int) -> None:
        self._budget = tiles.memory_budget
        self._bar.update(self._task, total=plan.source_bytes, completed=done_bytes)
        self._bar.start_task(self._task)

    def finished(self, layer: LayerResult) -> None:
        if line := layer_line(layer):
            self.console.print(line, no_wrap=True, overflow="ellipsis")

    def progress(self, unit: Unit, source_bytes: int) -> None:
        self._unshown += source_bytes
        now = time.monotonic()
        if now - self._last < BAR_SECONDS:
            return  # small tensors come by the thousand a second
        memory = _memory(self._budget)
        self._bar.update(self._task, advance=self._unshown, memory=memory, tensor=escape(printable(unit.key)))
        self._unshown, self._last = 0, now


class PlainLines(Silent):
    """Lines, for logs."""

    def __init__(self, console: Console):
        self.console = console
        self._done = self._total = 0
        self._start = self._last = time.monotonic()

    def note(self, text: str) -> None:
        say(self.console, Text(printable_lines(text)))

    def started(self, plan: Plan, tiles: TileSizes, done_bytes: int) -> None:
        self._done, self._total = done_bytes, plan.source_bytes
        self._skipped, self._budget = done_bytes, tiles.memory_budget

    def finished(self, layer: LayerResult) -> None:
        if line := layer_line(layer):
            self.console.print(line, soft_wrap=True)

    def progress(self, unit: Unit, source_bytes: int) -> None:
        self._done += source_bytes
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        speed = (self._done - self._skipped) / max(now - self._start, 1e-9)
        left = (self._total - self._done) / max(speed, 1.0)
        self.note(
            f"{self._done / max(self._total, 1):4.0%}  {decimal(self._done)} of {decimal(self._total)}  "
            f"{decimal(int(speed))}/s  {left:.0f} s left  {_memory(self._budget)}  {printable(unit.key, 60)}"
        )


class JsonLines(Silent):
    """Events for a program."""

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
        if now - self._last >= JSON_SECONDS or self._done == self._total:
            self._last = now
            self.screen.line(
                "progress",
                done_bytes=self._done,
                total_bytes=self._total,
                tensor=unit.key,
                anonymous_bytes=anonymous_bytes(),
            )


def _memory(budget: int) -> str:
    """Memory in use against what was allowed."""
    return f"{anonymous_bytes() // MEBIBYTE}/{budget // MEBIBYTE} MiB RAM"


def report_view(report: Report) -> list[Table | Text]:
    """The table at the end of a conversion."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("format", no_wrap=True)
    # With learned rounding there are two errors, and 80 columns have no room for the ratio.
    learned = any(layer.output_error_before is not None for layer in report.layers)
    headings = ["weight error", "output error"] if learned else ["ratio", "mean relative error"]
    for heading in ["layers", "in", "out", *headings]:
        table.add_column(heading, justify="right", no_wrap=heading not in ("weight error", "mean relative error"))
    for summary in report.by_format():
        error = summary.mean_relative_error
        table.add_row(
            summary.format,
            f"{summary.layers:,}",
            decimal(summary.source_bytes),
            decimal(summary.output_bytes),
            *([] if learned else [_ratio(summary.output_bytes, summary.source_bytes)]),
            "" if error is None else f"{error:.4f}",
            *([before_and_after(summary)] if learned else []),
        )
    table.add_section()
    table.add_row(
        "file", f"{len(report.layers):,}", decimal(report.source_bytes), decimal(report.output_bytes),
        "" if learned else _ratio(report.output_bytes, report.source_bytes), "", style="bold",
    )  # fmt: skip
    # A run that went on where another stopped did only a part of the work: over its time the whole would be too fast.
    speed = decimal(int(report.source_bytes / max(report.seconds, 1e-9)))
    pace = " since resuming" if report.resumed else f", {speed}/s"
    peak = report.peak_anonymous_bytes // MEBIBYTE
    lines = [Text(f"{report.seconds:.1f} s{pace}, peak {peak} MiB of anonymous memory", style="dim")]
    unknown = sum(layer.relative_error is None and layer.format not in UNMEASURED for layer in report.layers)
    if unknown and not report.resumed:
        held = f"{unknown:,} layers hold" if unknown > 1 else "1 layer holds"
        lines.insert(0, Text(f"{held} NaN or infinity: not in the mean errors", style="yellow"))
    if learned:
        lines.insert(0, Text("output error: estimated, rounded to nearest → as written", style="dim"))
    lines += [Text(printable(str(path), 4096), style="green", no_wrap=True) for path in _few(report.outputs)]
    return [table, *lines]


def before_and_after(result: LayerResult | FormatSummary) -> str:
    """The estimated output error, rounded to nearest and as written."""
    if result.output_error_before is None:
        return ""
    return f"{result.output_error_before:.4f} → {result.output_error_after:.4f}"


def layer_line(layer: LayerResult, width: int = 34) -> Text | None:
    """What a person is told of a layer whose rounding was learned; None of all others."""
    if layer.knowledge in ("", NEAREST, SEARCHED):
        return None
    return Text.assemble(
        (printable(layer.key.removesuffix(".weight"), width).ljust(width), "bold"), f" {layer.format:15} ",
        before_and_after(layer), (f"  {layer.knowledge}", "dim"),
    )  # fmt: skip


def _few(paths: list[Path]) -> list[Path]:
    return paths if len(paths) <= 4 else [*paths[:3], paths[-1]]


def _ratio(output: int, source: int) -> str:
    return f"{output / source:.1%}" if source else ""


def plan_view(plan: Plan, tiles: TileSizes, free: int, destination: Path) -> list[Table | Text]:
    """What a dry run shows: per rule and format how much, every fallback, sizes, disk, memory."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("rule", overflow="fold")
    table.add_column("becomes", no_wrap=True)
    for heading in ("layers", "in", "out"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (rule, becomes), units in _by_rule(plan).items():
        read = sum(unit.source_bytes for unit in units)
        written = sum(plan.output_bytes(unit) for unit in units)
        table.add_row(Text(printable(rule, 300)), becomes, f"{len(units):,}", decimal(read), decimal(written))
    parts: list[Table | Text] = [*(Text(printable_lines(note)) for note in plan.notes), table]
    fallbacks = fallback_units(plan)
    if fallbacks:
        parts.append(Text(f"\nNot as asked for ({len(fallbacks):,}):", style="bold"))
        parts += [Text(f"  {printable(unit.key)}: {printable(str(unit.reason), 300)}") for unit in fallbacks[:LISTED]]
        if len(fallbacks) > LISTED:
            parts.append(Text(f"  and {len(fallbacks) - LISTED:,} more (--json lists all)"))
    if plan.removed:
        parts.append(Text(f"\nLeft out: {len(plan.removed)} tensors ({', '.join(map(printable, list(plan.removed)[:3]))} …)"))
    size = plan.checkpoint.size
    shards = f" in {len(plan.files)} shards" if len(plan.files) > 1 else ""
    parts += [
        Text(f"\n{decimal(size)} become {decimal(plan.output_size)} ({_ratio(plan.output_size, size)}){shards}."),
        Text.assemble(
            f"Free disk {decimal(free)}", (", which is too little" if free < plan.output_size else "", "bold red"),
            f". Peak memory to expect: {tiles.peak_bytes // MEBIBYTE} MiB at the most.",
        ),
        Text(f"Nothing was written. Output would be {printable(str(destination), 4096)}"),
    ]
    return parts


def fallback_units(plan: Plan) -> list[Unit]:
    """Layers that did not get the format that a rule gave them."""
    words = ("divisible", "heur", "already quantized")
    return [unit for unit in plan.units if unit.reason and any(word in unit.reason for word in words)]


def _by_rule(plan: Plan) -> dict[tuple[str, str], list[Unit]]:
    grouped: dict[tuple[str, str], list[Unit]] = {}
    for unit in plan.units:
        grouped.setdefault((unit.rule, unit.format.name), []).append(unit)
    return grouped


def plan_as_json(plan: Plan, tiles: TileSizes, free: int, destination: Path) -> dict[str, Any]:
    """The plan as JSON values, per tensor."""
    return {
        "architecture": plan.architecture,
        "notes": list(plan.notes),
        "destination": str(destination),
        "files": [{"name": file.name, "bytes": file.size, "header_bytes": len(file.header)} for file in plan.files],
        "source_bytes": plan.checkpoint.size,
        "output_bytes": plan.output_size,
        "free_disk_bytes": free,
        "peak_memory_bytes": tiles.peak_bytes,
        "removed": plan.removed,
        "rules": [
            {
                "rule": rule,
                "becomes": becomes,
                "layers": len(units),
                "source_bytes": sum(unit.source_bytes for unit in units),
                "output_bytes": sum(plan.output_bytes(unit) for unit in units),
            }
            for (rule, becomes), units in _by_rule(plan).items()
        ],
        "tensors": [_unit_as_json(plan, unit, elements) for unit, elements in zip(plan.units, tiles.elements, strict=True)],
    }


def _unit_as_json(plan: Plan, unit: Unit, tile_elements: int) -> dict[str, Any]:
    written = []
    for output in unit.outputs:
        number, offset, nbytes = plan.placement[unit.output_name(output)]
        written.append(
            {
                "name": unit.output_name(output),
                "dtype": output.dtype,
                "shape": list(output.shape),
                "file": plan.files[number].name,
                "offset": offset,
                "bytes": nbytes,
            }
        )
    return {
        **asdict(unit.source.info),
        "decoded_from": unit.decoded.format if unit.decoded else None,
        "becomes": unit.format.name,
        "parameters": unit.format.parameters(),
        "rule": unit.rule,
        "reason": unit.reason,
        "tile_elements": tile_elements,
        "outputs": written,
    }
