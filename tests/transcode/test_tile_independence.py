"""The same bytes whatever the tile, the budget, the threads, the way of reading and the kernels that compute."""

from __future__ import annotations

import random

import numpy as np
import pytest
from small_checkpoints import EVERY_FORMAT, SEARCHED_FORMATS, floats, of_values, sample, save

from streamquant import budget, pour
from streamquant.plan import plan
from streamquant.transcode import Options, convert, plan_tiles

FORMATS = EVERY_FORMAT | SEARCHED_FORMATS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = sample() | {
        "blocks.3.zeros.weight": of_values(np.zeros((96, 128))),
        "blocks.3.wide.weight": floats(3, 5000, seed=20),
        "blocks.3.last_is_largest.weight": of_values(np.r_[np.ones(999), 1000.0].reshape(40, 25)),
        "long.bias": floats(10_001, dtype="F32", seed=21),
    }
    return save(tmp_path_factory.mktemp("source") / "m.safetensors", tensors)


def converted(source, folder, recipe, **options) -> bytes:
    out = folder / "out.safetensors"
    convert(source, out, FORMATS[recipe], force=True, **options)
    return out.read_bytes()


@pytest.fixture
def at_once(source, tmp_path, monkeypatch):
    """What one thread makes of every tensor in one piece: tiles of 8 MB are larger than any here."""

    def convert_at_once(recipe: str) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(budget, "TARGET_TILE_BYTES", 8 << 20)
            made = plan(source, FORMATS[recipe])
            tiles = plan_tiles(made, Options(threads=1), "cpu").elements
            assert all(size >= unit.elements for size, unit in zip(tiles, made.units, strict=True))
            return converted(source, tmp_path, recipe, threads=1)

    return convert_at_once


@pytest.mark.parametrize("recipe", FORMATS)
def test_tiles_threads_and_io_change_no_byte(source, tmp_path, monkeypatch, at_once, recipe):
    whole = at_once(recipe)
    for tile_bytes, threads, io in [
        (330, 3, "mmap"),
        (640, 1, "pread"),
        (1000, 2, "mmap"),
        (4096, 4, "pread"),
        (8 << 20, 2, "pread"),
    ]:
        monkeypatch.setattr(budget, "TARGET_TILE_BYTES", tile_bytes)
        assert converted(source, tmp_path, recipe, threads=threads, io=io) == whole, (tile_bytes, threads, io)


@pytest.mark.parametrize("recipe", ["fp8-block", "int8-tensor", "nf4-double", "cast-bf16"])
def test_a_tight_budget_changes_no_byte(source, tmp_path, monkeypatch, at_once, recipe):
    """The budget itself, not the target, cuts the tiles here: nothing is left of it but a few kilobytes."""
    whole = at_once(recipe)
    made = plan(source, EVERY_FORMAT[recipe])
    monkeypatch.setattr(budget, "OVERHEAD", {"numba": 0, "torch": 0})
    for memory_budget, threads in [(300_000, 2), (130_000, 1)]:
        tiles = plan_tiles(made, Options(memory_budget=memory_budget, threads=threads, io="pread"), "cpu")
        assert any(size < unit.elements for size, unit in zip(tiles.elements, made.units, strict=True))
        assert tiles.peak_bytes <= memory_budget
        assert converted(source, tmp_path, recipe, memory_budget=memory_budget, threads=threads, io="pread") == whole


@pytest.mark.parametrize("recipe", EVERY_FORMAT)
def test_without_the_compiled_kernels_the_bytes_are_the_same(source, tmp_path, monkeypatch, at_once, recipe):
    from streamquant.kernels import TorchBackend

    whole = at_once(recipe)
    monkeypatch.setattr(pour, "select", TorchBackend)
    monkeypatch.setattr(budget, "TARGET_TILE_BYTES", 4096)
    assert converted(source, tmp_path, recipe, threads=2) == whole


@pytest.mark.parametrize("recipe", ["fp8-tensor", "nf4-double", "int8-row"])
def test_workers_may_finish_in_any_order(source, tmp_path, monkeypatch, at_once, recipe):
    """Threads that dawdle by chance: tiles are committed in order all the same."""
    import time

    whole = at_once(recipe)
    dice = random.Random(7)
    compute = pour.Pour._compute
    monkeypatch.setattr(budget, "TARGET_TILE_BYTES", 4096)
    monkeypatch.setattr(pour.Pour, "_compute", lambda *tile: time.sleep(dice.random() / 300) or compute(*tile))
    assert converted(source, tmp_path, recipe, threads=4) == whole


@pytest.mark.parametrize("recipe", EVERY_FORMAT)
def test_converting_twice_gives_the_same_file(source, tmp_path, recipe):
    assert converted(source, tmp_path, recipe) == converted(source, tmp_path, recipe)
