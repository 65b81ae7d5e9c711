"""The screen of `streamquant doctor`."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from streamquant.checkpoint.header import printable
from streamquant.doctor import Check, sound

from .common import table

STATES = {"ok": ("ok", "green"), "missing": ("–", "yellow"), "problem": ("problem", "bold red")}


def doctor_view(checks: list[Check]) -> list[Table | Text]:
    """A line for each thing that was looked at."""
    made = table("", "", "")
    made.show_header = False
    for check in checks:
        word, style = STATES[check.state]
        made.add_row(check.topic, Text(word, style=style), Text(printable(check.text, 400)))
    verdict = "Everything that streamquant needs is here." if sound(checks) else "Something that streamquant needs is missing."
    return [made, Text(f"\n{verdict}", style="bold")]
