"""The screen of `streamquant dequantize`."""

from __future__ import annotations

from rich.filesize import decimal
from rich.text import Text

from streamquant.budget import MEBIBYTE
from streamquant.checkpoint.header import printable
from streamquant.dequantize import Dequantized

from .common import count, path_line


def dequantized_view(report: Dequantized) -> list[Text]:
    """What was decoded, and where the file is."""
    formats = ", ".join(f"{number:,} {printable(name, 40)}" for name, number in report.formats.items())
    layers = count(sum(report.formats.values()), "layer")
    speed = decimal(int(report.output_bytes / max(report.seconds, 1e-9)))
    peak = report.peak_anonymous_bytes // MEBIBYTE
    return [
        Text(f"{layers} decoded ({formats}), {count(report.copied, 'tensor')} copied"),
        Text(f"{count(report.left_out, 'tensor')} of scales and markers left out"),
        Text(f"{decimal(report.source_bytes)} became {decimal(report.output_bytes)}"),
        Text(f"{report.seconds:.1f} s, {speed}/s, peak {peak} MiB of anonymous memory", style="dim"),
        path_line(report.output),
    ]  # fmt: skip
