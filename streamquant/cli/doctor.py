"""`streamquant doctor`: what this machine has, and what it lacks."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from .running import reporting


@click.command(short_help="Show what is here, what is fast and what is missing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line a check.")
def doctor(as_json: bool) -> None:
    """Show versions, devices, what is fast here and what is missing. Exit code 1 when something needed is missing."""
    with reporting(as_json) as screen:
        from streamquant.doctor import examine, sound
        from streamquant.views.doctor import doctor_view

        checks = examine()
        if as_json:
            for check in checks:
                screen.line("check", **asdict(check))
        else:
            screen.show(doctor_view(checks))
        if not sound(checks):
            sys.exit(1)
