"""The page itself: one HTML file that needs nothing beside it, written whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import secrets
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from streamquant import __version__
from streamquant.checkpoint.calls import writing
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.reader import open_checkpoint
from streamquant.checkpoint.writer import write_file
from streamquant.report import Report
from streamquant.stored.markers import provenance
from streamquant.verdict import Verdict

from .pictures import Point, error_against_size, heat_map, require_matplotlib
from .samples import LayerSample, sample_layers

FILE_NAME = "report.html"
ADVICE = "mend the cause, or name another folder with --report"
PACKAGES = ("torch", "numpy", "numba", "triton", "bitsandbytes", "safetensors")
# Nothing may be loaded from anywhere, whatever a name in a file contains.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class PageLayer:
    """A row of the table. errors are relative; nearest: of rounding to nearest, None where unknown."""

    name: str
    format: str
    detail: str
    error: float
    nearest: float | None
    source_bytes: int
    output_bytes: int
    cause: str | None = None


def prepare_page(folder: str | Path) -> None:
    """Make sure that a page can be written into `folder`, before hours of work. Raises UsageError without matplotlib,
    DestinationWriteError where nothing can be written.
    """
    require_matplotlib()
    folder = Path(folder)
    with writing(folder, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, trial = tempfile.mkstemp(dir=folder, prefix=".streamquant-")
        os.close(descriptor)
        os.unlink(trial)


def write_verdict_page(folder: str | Path, verdict: Verdict) -> Path:
    """The page of a verification. Returns its path. Raises UsageError without matplotlib, DestinationWriteError."""
    layers = [
        PageLayer(
            layer.key.removesuffix(".weight"), layer.format, layer.detail, layer.relative_error, layer.nearest_error,
            layer.source_bytes, layer.output_bytes, layer.cause,
        )
        for layer in verdict.layers
    ]  # fmt: skip
    word = '<span class="good">sound</span>' if verdict.sound else '<span class="bad">unsound</span>'
    facts = [
        f"{word}: {len(verdict.layers):,} layers decoded and compared, {verdict.copied[0]:,} tensors compared byte for byte"
        + (f", {verdict.hashes_in_words}." if verdict.hashes_known else "."),
        f"{_size(verdict.source_bytes)} became {_size(verdict.output_bytes)}. Looked at {verdict.sampled:.0%} of the weights.",
        *map(_text, verdict.notes),
    ]
    findings = [
        f"<b>{_text(finding.tensor)}</b>: {_text(finding.text)}" if finding.tensor else _text(finding.text)
        for finding in verdict.findings
    ]
    return _write(folder, verdict.source, verdict.output, layers, facts, findings)


def write_conversion_page(folder: str | Path, source: str | Path, report: Report) -> Path:
    """The page of a conversion that is done. Raises as `write_verdict_page` does."""
    layers = [
        PageLayer(
            layer.key.removesuffix(".weight"), layer.format, "", layer.relative_error, None, layer.source_bytes,
            layer.output_bytes,
        )
        for layer in report.layers
        if layer.relative_error is not None
    ]  # fmt: skip
    output = next((path for path in report.outputs if path.name.endswith(".index.json")), report.outputs[0])
    resumed = " since it was resumed" if report.resumed else ""
    facts = [f"{_size(report.source_bytes)} became {_size(report.output_bytes)} in {report.seconds:.1f} s{resumed}."]
    return _write(folder, Path(source), output, layers, [*facts, *map(_text, report.notes)], [])


def _write(
    folder: str | Path, source: Path, output: Path, layers: list[PageLayer], facts: list[str], findings: list[str]
) -> Path:
    points = [Point(layer.name, layer.format, layer.error, layer.output_bytes) for layer in layers]
    parts = [f"<h1>{_text(output.name)}</h1>", *(f"<p>{fact}</p>" for fact in facts)]
    if findings:
        parts.append(f"<h2>What is unsound</h2><ul>{''.join(f'<li>{finding}</li>' for finding in findings)}</ul>")
    parts.append(f"<h2>By format</h2>{_formats(layers)}")
    if picture := heat_map(points):
        parts.append(f'<h2>Error by block</h2><div class="wide">{picture}</div>')
    if picture := error_against_size(points):
        parts.append(f'<h2>Error against size</h2><div class="wide">{picture}</div>')
    parts.append(_histograms(layers, sample_layers(source, output)))
    parts.append(f"<details><summary>All {len(layers):,} layers</summary>{_layers(layers)}</details>")
    parts.append(f"<h2>To reproduce</h2><pre>{_text(_recipe(source, output), 1 << 20)}</pre>")
    folder = Path(folder)
    with writing(folder, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    write_file(path, [_document(output.name, parts).encode()], secrets.token_hex(4), ADVICE)
    return path


def _document(title: str, parts: Iterable[str]) -> str:
    style = _resource("style.css")
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{_text(title)}</title>'
        f"<style>{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def _resource(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _text(text: str, limit: int = 4096) -> str:
    """Text from anywhere, as data. Line ends of our own JSON stay."""
    return "\n".join(escape(printable(line, limit)) for line in text.split("\n"))


def _size(nbytes: int) -> str:
    return decimal(nbytes)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if math.isfinite(value) else "infinite" if value > 0 else "not a number"


def _row(cells: Sequence[str], words: int, tag: str = "td", layer: str | None = None) -> str:
    """A table row whose first `words` cells hold words, the others numbers. layer: that it is about."""
    made = (
        f"<{tag}>{cell}</{tag}>" if index < words else f'<{tag} class="n">{cell}</{tag}>' for index, cell in enumerate(cells)
    )
    about = "" if layer is None else f' data-layer="{_text(layer)}"'
    return f"<tr{about}>{''.join(made)}</tr>"


def _formats(layers: list[PageLayer]) -> str:
    grouped: dict[tuple[str, str], list[PageLayer]] = {}
    for layer in layers:
        grouped.setdefault((layer.format, layer.detail), []).append(layer)
    rows = [_row(["format", "scales", "layers", "in", "out", "mean error", "worst error"], 2, "th")]
    for (name, detail), members in grouped.items():
        errors = [layer.error for layer in members]
        mean = math.fsum(errors) / len(errors) if all(map(math.isfinite, errors)) else math.inf
        cells = [_text(name), _text(detail), f"{len(members):,}", _size(sum(layer.source_bytes for layer in members))]
        rows.append(_row([*cells, _size(sum(layer.output_bytes for layer in members)), _number(mean), _number(max(errors))], 2))
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _layers(layers: list[PageLayer]) -> str:
    """The worst first."""
    rows = [_row(["layer", "format", "error", "to nearest", "in", "out"], 2, "th")]
    for layer in sorted(layers, key=lambda layer: -layer.error):
        name = _text(layer.name) + (f' <span class="bad">{_text(layer.cause)}</span>' if layer.cause else "")
        cells = [name, _text(layer.format), _number(layer.error), _number(layer.nearest)]
        rows.append(_row([*cells, _size(layer.source_bytes), _size(layer.output_bytes)], 2, layer=layer.name))
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _histograms(layers: list[PageLayer], samples: dict[str, LayerSample]) -> str:
    """A choice of layers, the worst first, with their histograms as data."""
    shown = [layer.name for layer in sorted(layers, key=lambda layer: -layer.error) if f"{layer.name}.weight" in samples]
    if not shown:
        return ""
    data = json.dumps([asdict(samples[f"{name}.weight"]) for name in shown]).replace("<", "\\u003c")
    options = "".join(f'<option value="{index}">{_text(name)}</option>' for index, name in enumerate(shown))
    return (
        f'<h2>Histograms</h2><p><label>Layer <select id="layer">{options}</select></label> '
        f'<span class="dim">a few tiles of each, the worst first; a click on a cell above or a row below chooses it</span></p>'
        f'<div id="histograms" class="histograms"></div><script type="application/json" id="samples">{data}</script>'
        f"<script>{_resource('histograms.js')}</script>"
    )


def _recipe(source: Path, output: Path) -> str:
    """What was made of what, by which versions, as JSON."""
    found: dict[str, Any] = {"source": str(source), "output": str(output)}
    entries = []
    for file in open_checkpoint(output).files:
        if (entry := provenance(file.header, str(file.path))) and entry.entry not in entries:
            entries.append(entry.entry)
    if entries:
        found["made by"] = entries[0]
    versions = {"streamquant": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return json.dumps(found | {"page written with": versions}, indent=2)
