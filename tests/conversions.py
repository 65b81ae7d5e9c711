"""Conversions that stop on purpose, and what they leave behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from streamquant import Recipe, errors
from streamquant.options import Silent
from streamquant.transcode import convert


class Watcher(Silent):
    """Keeps what it is told, and calls `after_tile` with the number of tiles so far."""

    def __init__(self, after_tile: Callable[[int], None] = lambda tiles: None):
        self.notes: list[str] = []
        self.tiles = 0
        self.after_tile = after_tile
        self.done_bytes = -1
        self.plan = None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def started(self, plan, tiles, done_bytes: int) -> None:
        self.done_bytes = done_bytes
        self.plan = plan

    def progress(self, unit, source_bytes: int) -> None:
        self.tiles += 1
        self.after_tile(self.tiles)


def interrupt(source: Path, destination: Path, recipe: Recipe, tiles: int, **options) -> Watcher:
    """Convert until `tiles` tiles are done, then stop as Ctrl-C does."""
    stop = threading.Event()
    watcher = Watcher(lambda done: stop.set() if done == tiles else None)
    with pytest.raises(errors.InterruptedRunError):
        convert(source, destination, recipe, observer=watcher, stop=stop, **options)
    assert watcher.tiles >= tiles
    return watcher


def files(folder: Path) -> dict[str, bytes]:
    """Visible files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] == ".")


def the_journal(folder: Path) -> Path:
    (path,) = folder.glob(".*.journal")
    return path


def the_partial(folder: Path) -> Path:
    (path,) = folder.glob(".*.partial")
    return path


def whole(source: Path, tmp_path: Path, recipe: Recipe, **options) -> dict[str, bytes]:
    """An uninterrupted run's files."""
    (tmp_path / "whole").mkdir()
    convert(source, tmp_path / "whole" / "out.safetensors", recipe, **options)
    return files(tmp_path / "whole")
