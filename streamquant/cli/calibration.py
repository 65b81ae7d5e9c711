"""`streamquant calibration`: what a model's layers saw, looked at and put together."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .running import reporting


@click.group()
def calibration() -> None:
    """Inspect and merge calibration files.

    Such a file says what the linear layers of a model see; `convert --calibration` rounds by it. It is collected while
    the model runs: in Python with streamquant.calibration.collect or self_calibrate, in ComfyUI with the node pack.
    """


@calibration.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE FILE...")
@click.option("-o", "--output", required=True, metavar="PATH", help="The calibration of all of them together.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines for programs.")
def merge(files: tuple[str, ...], output: str, force: bool, as_json: bool) -> None:
    """Merge calibrations of one model exactly.

    The result is what collecting all of them in one go would have given.
    """
    with reporting(as_json) as screen:
        from streamquant import calibration as library
        from streamquant.checkpoint.header import printable
        from streamquant.errors import OutputExistsError

        target = Path(output)
        if os.path.exists(target) and not force:
            raise OutputExistsError(f"{printable(output, 300)} is there already: give --force to replace it.")
        merged = library.merge(files)
        merged.save(target)
        inputs = max(layer.count for layer in merged.layers.values())
        if as_json:
            screen.line("merged", output=str(target), layers=len(merged.layers), kind=merged.kind, most_inputs=inputs)
        else:
            from rich.text import Text

            from streamquant.views.common import count, path_of

            what = f"{count(len(merged.layers), 'layer')}, {merged.kind}, up to {inputs:,} inputs each"
            screen.show([Text(f"{path_of(target)}: {what}.", no_wrap=True)])


@calibration.command()
@click.argument("file", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each layer.")
def inspect(file: str, as_json: bool) -> None:
    """Show what a calibration FILE holds, layer by layer.

    In mean: the share of the inputs' energy that lies in their mean. In sketch: the share that the low-rank form holds;
    the rest is known column by column only. Top channel: the share of the largest single column.
    """
    with reporting(as_json) as screen:
        from streamquant import calibration as library

        rows = library.load(file).summary()
        if as_json:
            for row in rows:
                screen.line("layer", **row)
            return
        from streamquant.views.calibration import calibration_table

        screen.show([calibration_table(rows)])
