"""`streamquant comfyui-install`: the node pack, linked into a ComfyUI."""

from __future__ import annotations

import click

from .running import reporting


@click.command("comfyui-install")
@click.argument("comfyui", metavar="PATH")
@click.option("--python", metavar="FILE", help="ComfyUI's Python, where it is not found beside it.")
@click.option("--force", is_flag=True, help="Replace a pack of this name that is there already.")
def comfyui_install(comfyui: str, python: str | None, force: bool) -> None:
    """Link the node pack into the ComfyUI at PATH.

    Then checks that ComfyUI's Python can import what the pack needs, and says what to install where it cannot.
    """
    with reporting() as screen:
        from streamquant.checkpoint.header import printable
        from streamquant.comfyui_install import install

        done = install(comfyui, python, force=force)
        how = "linked to" if done.linked else "copied from"
        target, pack, python_file = (printable(str(path), 4096) for path in (done.target, done.pack, done.python))
        screen.out.print(
            f"{target} is {how} {pack}; {python_file} can import it. Start ComfyUI anew.", markup=False, soft_wrap=True
        )
