"""What the tests of whole conversions share: a small source, a folder to convert into, many small tiles."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import sample, save

from streamquant import budget, pour


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles in a small file, and a sync every few of them."""
    monkeypatch.setattr(budget, "TARGET_TILE_BYTES", 4096)
    monkeypatch.setattr(pour, "SYNC_BYTES", 20_000)


@pytest.fixture
def source(tmp_path) -> Path:
    """The sample in a folder of its own."""
    return save(tmp_path / "source" / "m.safetensors", sample())


@pytest.fixture
def out(tmp_path) -> Path:
    """Where to convert to: nothing else is in that folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.safetensors"
