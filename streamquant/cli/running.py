"""How the commands beside `convert` run: failures become a sentence and an exit code, signals a clean stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from streamquant.checkpoint.mapping import why_no_mapping
from streamquant.errors import StreamquantError
from streamquant.options import Options


@contextmanager
def reporting(as_json: bool = False, quiet: bool = False) -> Iterator[Any]:
    """A Screen; a StreamquantError ends the process with its sentence and its exit code."""
    from streamquant import console

    screen = console.Screen(as_json=as_json, quiet=quiet)
    try:
        yield screen
    except StreamquantError as error:
        screen.fail(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our lines is gone. Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def stop_on_signals() -> threading.Event:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C ends the process at once."""
    stop = threading.Event()

    def handle(number: int, _: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def screen_options(command: Callable) -> Callable:
    """--json and --quiet."""
    command = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print JSON lines for programs.")(command)


def machine_options(command: Callable) -> Callable:
    """--threads and --io."""
    io, threads = "How files are read: auto, mmap or pread.", "How many threads work; by default one a processor."
    choice = click.Choice(["auto", "mmap", "pread"])
    command = click.option("--io", type=choice, default="auto", metavar="HOW", help=io)(command)
    return click.option("--threads", type=click.IntRange(1), metavar="N", help=threads)(command)


def options_from(given: dict[str, Any]) -> Options:
    """The Options that --threads and --io mean. Says so where files cannot be mapped: a conversion says it itself."""
    if given["io"] == "mmap" and (why := why_no_mapping()) and not given["quiet"]:
        click.echo(f"Files are read instead of mapped: {why}.", err=True)
    return Options(threads=given["threads"], io=given["io"])
