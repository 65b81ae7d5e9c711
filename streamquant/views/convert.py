"""What `streamquant convert` shows: the plan of a dry run, the report at the end, a line for each layer that was learned."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from streamquant.budget import MEBIBYTE, TileSizes
from streamquant.checkpoint.header import printable, printable_lines
from streamquant.plan import Plan, Unit
from streamquant.report import NEAREST, SEARCHED, FormatSummary, LayerResult, Report

from .common import path_line, sentences, table

SUMS = ("layers", "in", "out")


def report_view(report: Report) -> list[Table | Text]:
    """The table at the end of a conversion."""
    formats = Table(box=None, header_style="bold", pad_edge=False)
    formats.add_column("format", no_wrap=True)
    # With learned rounding there are two errors, and 80 columns have no room for the ratio.
    learned = any(layer.output_error_before is not None for layer in report.layers)
    headings = ["weight error", "output error"] if learned else ["ratio", "mean relative error"]
    for heading in (*SUMS, *headings):
        formats.add_column(heading, justify="right", no_wrap=heading not in ("weight error", "mean relative error"))
    for summary in report.by_format():
        error = summary.mean_relative_error
        formats.add_row(
            summary.format,
            f"{summary.layers:,}",
            decimal(summary.source_bytes),
            decimal(summary.output_bytes),
            *([] if learned else [_ratio(summary.output_bytes, summary.source_bytes)]),
            "" if error is None else f"{error:.4f}",
            *([before_and_after(summary)] if learned else []),
        )
    formats.add_section()
    formats.add_row(
        "file", f"{len(report.layers):,}", decimal(report.source_bytes), decimal(report.output_bytes),
        "" if learned else _ratio(report.output_bytes, report.source_bytes), "", style="bold",
    )  # fmt: skip
    # A run that went on where another stopped did only a part of the work: over its time the whole would be too fast.
    speed = decimal(int(report.source_bytes / max(report.seconds, 1e-9)))
    pace = " since resuming" if report.resumed else f", {speed}/s"
    peak = report.peak_anonymous_bytes // MEBIBYTE
    lines = [Text(f"{report.seconds:.1f} s{pace}, peak {peak} MiB of anonymous memory", style="dim")]
    unknown = sum(layer.relative_error is None and layer.format != "copy" for layer in report.layers)
    if unknown and not report.resumed:
        held = f"{unknown:,} layers hold" if unknown > 1 else "1 layer holds"
        lines.insert(0, Text(f"{held} NaN or infinity: not in the mean errors", style="yellow"))
    if learned:
        lines.insert(0, Text("output error: estimated, rounded to nearest → as written", style="dim"))
    lines += [path_line(path) for path in _few(report.outputs)]
    return [formats, *lines]


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
    rules = table("rule", "becomes", *SUMS, right=SUMS, whole=("becomes",))
    for (rule, becomes), units in _by_rule(plan).items():
        read = sum(unit.source_bytes for unit in units)
        written = sum(plan.output_bytes(unit) for unit in units)
        rules.add_row(Text(printable(rule, 300)), becomes, f"{len(units):,}", decimal(read), decimal(written))
    parts: list[Table | Text] = [*(Text(printable_lines(note)) for note in plan.notes), rules]
    if fallbacks := fallback_units(plan):
        lines = [f"{printable(unit.key)}: {printable(str(unit.reason), 300)}" for unit in fallbacks]
        parts += sentences(f"Not as asked for ({len(fallbacks):,}):", lines)
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
