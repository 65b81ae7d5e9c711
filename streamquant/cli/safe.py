"""What the command line says of its own arguments, safe to show: a shell fills them in with the names of files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from streamquant.checkpoint.header import printable_lines


class Program(click.Group):
    """A group of commands whose complaints about arguments hold no control characters."""

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:
        with _printable_complaints():
            return super().make_context(*arguments, **named)

    def invoke(self, context: click.Context) -> Any:
        with _printable_complaints():
            return super().invoke(context)


@contextmanager
def _printable_complaints() -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        error.message = printable_lines(error.message)
        raise


def command_line(words: Iterable[str]) -> str:
    """Words as a shell takes them, to be shown and copied: $'…' with escapes where a word holds what is no printable text."""
    return " ".join(shlex.quote(word) if word.isprintable() else f"$'{_escaped(os.fsencode(word))}'" for word in words)


def _escaped(raw: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in raw)
