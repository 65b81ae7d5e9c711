"""Where everything a person sees is printed, and the same as JSON lines for programs.

Results go to standard output, messages and progress (`progress.py`) to standard error. Names that come from a file are made
printable and never read as markup.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from streamquant.checkpoint.header import printable_lines
from streamquant.errors import StreamquantError
from streamquant.presets import Preset
from streamquant.terminal import Part, say, show
from streamquant.verdict import finite


def version_text(own: str) -> str:
    """The versions that matter, one line, without importing any of them."""
    found = []
    for package in ("torch", "triton", "bitsandbytes", "numba", "safetensors"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} -")
    return f"streamquant {own} ({', '.join(found)})"


class Screen:
    """One command's output, in the manner the user chose."""

    def __init__(self, as_json: bool = False, quiet: bool = False, out: Console | None = None, err: Console | None = None):
        self.as_json, self.quiet = as_json, quiet
        self.out = out or Console(highlight=False)
        self.err = err or Console(stderr=True, highlight=False)

    def line(self, event: str, **values: Any) -> None:
        """One JSON line on standard output, in ASCII; what JSON cannot hold (NaN, infinity) is null."""
        sys.stdout.write(json.dumps(finite({"event": event, **values}), allow_nan=False) + "\n")
        sys.stdout.flush()

    def fail(self, error: StreamquantError, go_on_with: str | None = None) -> None:
        """Say what went wrong, and the command that goes on."""
        if self.as_json:
            kind = type(error).__name__
            self.line("error", kind=kind, message=str(error), exit_code=error.exit_code, resume=go_on_with)
        say(self.err, Text.assemble(("error: ", "bold red"), printable_lines(str(error))))
        if go_on_with:
            say(self.err, Text.assemble(("go on with: ", "bold"), printable_lines(go_on_with), no_wrap=True))

    def show(self, parts: Iterable[Part]) -> None:
        """Print the parts of a view to standard output."""
        for part in parts:
            show(self.out, part)

    def show_presets(self, known: Iterable[Preset]) -> None:
        """A table of the architectures."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in ("preset", "architecture", "flags", "recognised"):
            table.add_column(heading)
        for preset in known:
            if not preset.name.startswith("_"):
                flags = " ".join(f"--{flag}" for flag in preset.flags)
                table.add_row(preset.name, preset.title, flags, "by its keys" if preset.recognise_all else "by flag only")
        self.show([table])
