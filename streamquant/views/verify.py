"""The screens of `streamquant verify`."""

from __future__ import annotations

import math

from rich.filesize import decimal
from rich.text import Text

from streamquant.checkpoint.header import printable, printable_lines
from streamquant.terminal import Rows
from streamquant.verdict import LayerCheck, Verdict

from .common import count, decibels, path_of, ratio, sentences


def verdict_view(found: Verdict) -> list[Rows | Text]:
    """A table by format, what is wrong, and the verdict."""
    parts: list[Rows | Text] = [Text(printable_lines(note)) for note in found.notes]
    if found.layers:
        parts.append(_formats(found))
    if found.removed:
        names = ", ".join(printable(name) for name in list(found.removed)[:3])
        parts.append(
            Text(f"\nLeft out by {next(iter(found.removed.values()))}: {count(len(found.removed), 'tensor')} ({names} …)")
        )
    if found.findings:
        lines = [
            f"{printable(finding.tensor)}: {finding.text}" if finding.tensor else finding.text for finding in found.findings
        ]
        parts += sentences(f"Unsound ({len(lines):,})", lines)
    parts.append(Text(f"\n{_done(found)}", style="dim"))
    if found.sound:
        looked = "sound" if found.sampled >= 1 else f"nothing wrong in the {found.sampled:.0%} that were looked at"
        parts.append(Text.assemble((looked, "bold green"), "  ", path_of(found.output), no_wrap=True))
    else:
        parts.append(Text.assemble(("unsound", "bold red"), "  ", path_of(found.output), no_wrap=True))
    return parts


def _formats(found: Verdict) -> Rows:
    """Per format and scaling: the mean and worst relative error, the worst of the rest, the mean share of saturated codes."""
    numbers = ("layers", "error", "worst", "dB", "cosine", "largest", "saturated")
    grouped: dict[tuple[str, str], list[LayerCheck]] = {}
    for layer in found.layers:
        grouped.setdefault((layer.format, layer.detail), []).append(layer)
    listed = [[f"{printable(name, 40)}, {printable(detail)}", *_numbers(layers)] for (name, detail), layers in grouped.items()]
    return Rows(("format", *numbers), numbers, listed, breaks=True)


def _numbers(layers: list[LayerCheck]) -> list[str]:
    errors = [layer.relative_error for layer in layers]
    saturated = sum(layer.saturated_share for layer in layers) / len(layers)
    return [
        f"{len(layers):,}",
        ratio(math.fsum(errors) / len(errors) if all(map(math.isfinite, errors)) else math.inf),
        ratio(max(errors)),
        decibels(min(layer.signal_to_noise for layer in layers)),
        f"{min(layer.cosine for layer in layers):.5f}",
        f"{max(layer.largest_error for layer in layers):.2g}",
        f"{saturated:.2%}",
    ]


def _done(found: Verdict) -> str:
    """What was looked at, and how fast."""
    words = []
    if found.layers:
        words.append(f"{count(len(found.layers), 'layer')} decoded and compared")
    if found.copied[0]:
        words.append(f"{count(found.copied[0], 'tensor')} compared byte for byte")
    if found.hashes_known:
        words.append(found.hashes_in_words)
    looked = found.source_bytes * min(found.sampled, 1.0)
    speed = decimal(int(looked / max(found.seconds, 1e-9)))
    return f"{', '.join(words)}; {decimal(int(looked))} of source in {found.seconds:.1f} s, {speed}/s"


def checked_layers_view(found: Verdict) -> Rows:
    """Every layer, the worst first."""
    numbers = ("error", "nearest", "dB", "cosine", "largest", "saturated")
    layers = sorted(found.layers, key=lambda layer: -layer.relative_error)
    listed = [
        [
            printable(layer.key.removesuffix(".weight")),
            printable(layer.format, 40),
            ratio(layer.relative_error),
            ratio(layer.nearest_error),
            decibels(layer.signal_to_noise),
            f"{layer.cosine:.5f}",
            f"{layer.largest_error:.2g}",
            f"{layer.saturated_share:.2%}",
        ]
        for layer in layers
    ]
    bad = {number for number, layer in enumerate(layers) if not layer.sound}
    return Rows(("layer", "format", *numbers), numbers, listed, bad)
