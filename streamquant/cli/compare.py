"""`streamquant compare`: two outputs side by side."""

from __future__ import annotations

from typing import Any

import click

from .running import machine_options, options_from, reporting, screen_options, stop_on_signals


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--source", metavar="PATH", help="What both were made from: tells which is nearer to it.")
@click.option("--layers", is_flag=True, help="One row for every layer, not for every kind of block.")
@machine_options
@screen_options
def compare(a: str, b: str, **given: Any) -> None:
    """Compare two outputs A and B.

    Layer by layer: how far apart they are, which is better where, for how many bytes.
    """
    with reporting(given["as_json"], given["quiet"]) as screen:
        from streamquant.compare import compare as look
        from streamquant.progress import watching
        from streamquant.views.compare import comparison_view

        with watching(screen) as watcher:
            found = look(a, b, given["source"], options=options_from(given), watcher=watcher, stop=stop_on_signals())
        if given["as_json"]:
            screen.line("comparison", **found.as_json())
        elif not given["quiet"]:
            screen.show(comparison_view(found, given["layers"]))
