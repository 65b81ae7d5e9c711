"""`streamquant inspect`: what is in a file, on one screen."""

from __future__ import annotations

import click

from .running import reporting


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--layers", is_flag=True, help="One row for every tensor.")
@click.option("--tree", is_flag=True, help="The names as a tree, blocks of one kind folded.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, one line a file.")
def inspect(files: tuple[str, ...], layers: bool, tree: bool, as_json: bool) -> None:
    """Show what is in FILE.

    Architecture, formats, sizes, scales, provenance, and what loads it. FILE is a .safetensors file of this program or
    another, a shard index, a folder, or a GGUF file. Only headers, markers and a part of the scales are read.
    """
    with reporting(as_json) as screen:
        from dataclasses import asdict

        from streamquant.inspect import inspect as look
        from streamquant.stored.gguf import GgufSummary
        from streamquant.views.inspect import gguf_view, inspection_view, layers_view, tree_view

        for number, file in enumerate(files):
            found = look(file)
            if isinstance(found, GgufSummary):
                if as_json:
                    screen.line("gguf", **(asdict(found) | {"path": str(found.path)}))
                else:
                    screen.show(gguf_view(found))
                continue
            if as_json:
                screen.line("inspection", **found.as_json())
                continue
            if number:
                screen.out.print()
            if tree:
                screen.show([tree_view(found)])
            elif layers:
                screen.show([layers_view(found)])
            else:
                screen.show(inspection_view(found))
