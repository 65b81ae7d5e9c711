"""`streamquant verify`: is the output what its source should have become?"""

from __future__ import annotations

import sys
from typing import Any

import click

from streamquant.errors import UnsoundOutputError

from .running import machine_options, options_from, reporting, screen_options, stop_on_signals


class Share(click.ParamType):
    """A share: 5%, or 0.05."""

    name = "share"

    def convert(self, value: Any, param: Any, context: Any) -> float:
        if isinstance(value, float):
            return value
        text = value.strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            self.fail(f"{value!r} is not a share above 0: write 5% or 0.05.", param, context)
        return share


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("output", metavar="OUTPUT")
@click.option("--sample", type=Share(), default=1.0, metavar="SHARE", help="Look at a part of every layer only, as 5%.")
@click.option("--layers", is_flag=True, help="Show every layer, the worst first.")
@click.option("--report", "report", metavar="DIR", help="Write a page of pictures there (needs matplotlib).")
@machine_options
@screen_options
def verify(source: str, output: str, **given: Any) -> None:
    """Check OUTPUT against its SOURCE.

    Every byte is hashed, every layer decoded and compared with what it was made from, every fault named. Exit code 0 only
    when all is sound, 11 when it is not.
    """
    with reporting(given["as_json"], given["quiet"]) as screen:
        from rich.text import Text

        from streamquant.progress import watching
        from streamquant.verify import verify as check
        from streamquant.views.common import report_line
        from streamquant.views.verify import checked_layers_view, verdict_view

        if given["report"]:
            from streamquant.pages import prepare_page

            prepare_page(given["report"])
        with watching(screen) as watcher:
            found = check(
                source, output, sample=given["sample"], options=options_from(given), watcher=watcher, stop=stop_on_signals()
            )
        page = _write_page(given["report"], found) if given["report"] else None
        if given["as_json"]:
            screen.line("verdict", **(found.as_json() | {"report": page and str(page)}))
        elif not given["quiet"]:
            screen.show(([checked_layers_view(found), Text("")] if given["layers"] else []) + verdict_view(found))
            if page is not None:
                screen.show([report_line(page)])
        if not found.sound:
            sys.exit(UnsoundOutputError.exit_code)


def _write_page(folder: str, found: Any) -> Any:
    from streamquant.pages import write_verdict_page

    return write_verdict_page(folder, found)
