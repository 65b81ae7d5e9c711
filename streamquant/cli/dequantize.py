"""`streamquant dequantize`: a quantized checkpoint back to a plain one."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .running import machine_options, options_from, reporting, screen_options, stop_on_signals

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@click.command()
@click.argument("source", metavar="SOURCE")
@click.option("-o", "--output", metavar="PATH", help="Default: the source's name with the dtype in it.")
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Of the decoded layers. Default: what they were made from.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinity where layers decode to them.")
@machine_options
@screen_options
def dequantize(source: str, output: str | None, **given: Any) -> None:
    """Write SOURCE as a plain checkpoint.

    Decodes every quantized layer (FP8, INT8, NVFP4, MXFP8, NF4, FP4; of this program, convert-to-quant, ComfyUI or
    bitsandbytes), copies the rest, and writes one .safetensors file. When
    interrupted it leaves nothing behind, and starts again from the beginning.
    """
    with reporting(given["as_json"], given["quiet"]) as screen:
        from streamquant.dequantize import dequantize as run
        from streamquant.progress import watching
        from streamquant.views.dequantize import dequantized_view

        destination = _destination(Path(source), output, given["dtype"])
        with watching(screen) as watcher:
            report = run(
                source, destination, dtype=DTYPES.get(given["dtype"]), force=given["force"],
                allow_nonfinite=given["allow_nonfinite"], options=options_from(given), watcher=watcher, stop=stop_on_signals(),
            )  # fmt: skip
        if given["as_json"]:
            screen.line("done", **(asdict(report) | {"source": str(report.source), "output": str(report.output)}))
        elif not given["quiet"]:
            screen.show(dequantized_view(report))


def _destination(source: Path, output: str | None, dtype: str | None) -> Path:
    """Where to write: as told, or beside the source as it was named."""
    source = Path(os.path.abspath(source))
    stem = source.name.removesuffix(".json").removesuffix(".index").removesuffix(".safetensors")
    name = f"{stem}-{dtype or 'dequantized'}.safetensors"
    if output is None:
        return source.parent / name
    return Path(output) / name if output.endswith("/") or os.path.isdir(output) else Path(output)
