"""The command line. A command is a module of its own, and imports what is heavy only when it runs.

Option names are matched after every underscore is read as a hyphen, so the spellings of the older converter
(`--comfy_quant`, `--scaling_mode`) are accepted everywhere, by that one rule.
"""

from __future__ import annotations

import atexit
import gc
from typing import Any

import click
from click.shell_completion import get_completion_class

from streamquant import __version__, presets

from .calibration import calibration
from .comfyui_install import comfyui_install
from .compare import compare
from .convert import convert
from .dequantize import dequantize
from .doctor import doctor
from .inspect import inspect
from .safe import Program
from .verify import verify

MAX_WIDTH = 100
GARBAGE_THRESHOLD = 50_000  # objects
CONTEXT = {
    "max_content_width": MAX_WIDTH,
    "token_normalize_func": lambda word: word.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}


def _show_version(context: click.Context, _: Any, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from streamquant.console import version_text

        click.echo(version_text(__version__))
        context.exit()


@click.group(cls=Program, context_settings=CONTEXT)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show versions.")
def main() -> None:
    """Turn a huge diffusion checkpoint into a small one, in constant memory."""
    # Looking for cycles every 700 objects costs a fifth of the time that numba loads in, and once more at the end, when
    # nothing needs to be found any more, a sixth of a second.
    gc.set_threshold(GARBAGE_THRESHOLD)
    atexit.register(gc.freeze)


main.add_command(convert)
for command in (calibration, inspect, verify, compare, dequantize, doctor, comfyui_install):
    main.add_command(command)


@main.command("presets")
def list_presets() -> None:
    """List the architectures and their flags."""
    from streamquant import console

    console.Screen().show_presets(presets.load_presets().values())


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a completion script, to be evaluated by SHELL."""
    script = get_completion_class(shell)(main, {}, "streamquant", "_STREAMQUANT_COMPLETE")
    click.echo(script.source())
