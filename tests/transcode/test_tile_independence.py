"""The same bytes whatever the tile, the budget, the threads, the way of reading and the kernels that compute."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from small_checkpoints import EVERY_FORMAT, NUMPY, SEARCHED_FORMATS, floats, load, of_values, sample, save

from streamquant import budget, pour
from streamquant.plan import plan
from streamquant.transcode import Options, convert, plan_tiles

FORMATS = EVERY_FORMAT | SEARCHED_FORMATS

# Of every format and mode, the sha256 of what `fixed_source` becomes (without the header, which names the version).
# They may change only when the bytes on disk are meant to change; then say so in the commit.
GOLDEN = {
    "fp8-tensor": "135ad27a9782baa8f967c86b3013292efa54c19e1fba992c25e7bffd27a22b3d",
    "fp8-row": "112b92b4b3c99599b62b52886a8cb3640d4764fb0b3b38d89fd78e2ce35e77ce",
    "fp8-block": "74cba9982f43a78170505e451d8f2de39f871ea511f38489df22d8ad13194e59",
    "fp8-block3d": "3e671653f6689b89b5eb7cb1d3c2ae9f6fc2cbd1b047e74adb14dc412854403a",
    "fp8-e5m2": "fe993af8968302db4f3df6bb2c0cf8e39a606e3b85748d67fff113dab2b0d015",
    "int8-tensor": "e9dd251c3611e374250e7a0d07a709e47e27bb013aaf12707ab409c454def337",
    "int8-row": "55c2436762821f932b579414477ba62fef0d3ae048747f1527769d6e4f230cef",
    "int8-row-rotated": "4fef22a5bdb720d06ea94cbf712f21d9075e74759b2770715074aaf6b7084d45",
    "int8-block": "8c0c13581373ca273672f83590ee646f265990dcb28a6fa3419cf949599a81fc",
    "nf4": "f9ee50a03d8ede8bfade50a18bac201362b0cfdcc83470e45d01b934b6f40579",
    "nf4-double": "ea282b73d0ca3d1fcd0f7cf5ffe23930f7d5411920fe315b66ee130b57c2e23d",
    "fp4": "7459f2aa7424623c0e123035c7240317b6c443bd3cf5096d97f5a1d4702d7988",
    "fp4-double": "94ee154e0c7fda405676df09a2483010d94bbec7c094720c7c3501fb44fba620",
    "cast-bf16": "f061d23216dbfa893e02383691316319de916f75307e883943b02b31d5858551",
    "cast-fp16": "2a13a5e0931d4ac47b56caca19fd5d30ed88649f7a698fdb05254cc8a9b539ea",
}


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


# -- the bytes themselves, once and for all


def fixed_source() -> dict:
    """Weights that no library's random numbers can change: a congruential sequence, spread over many exponents."""

    def values(count: int, seed: int) -> np.ndarray:
        bits = (
            np.arange(1, count + 1, dtype=np.uint64) * np.uint64(6364136223846793005) + np.uint64(seed)
        ) >> np.uint64(33)
        uniform = bits.astype(np.float64) / 2**31 - 0.5
        return uniform * np.exp2(np.arange(count) % 13 - 8)

    shapes = {
        "a.weight": (64, 96, "BF16"),
        "b.weight": (33, 31, "F16"),
        "c.weight": (32, 256, "F32"),
        "d.weight": (5, 7, "F64"),
    }
    made = {
        name: of_values(values(rows * columns, seed).reshape(rows, columns), dtype)
        for seed, (name, (rows, columns, dtype)) in enumerate(shapes.items())
    }
    assert set(NUMPY) < {dtype for _, _, dtype in shapes.values()}
    return made | {"zeros.weight": of_values(np.zeros((32, 32))), "a.bias": of_values(values(96, 9), "F32")}


@pytest.mark.parametrize("recipe", EVERY_FORMAT)
def test_golden_bytes(tmp_path, recipe):
    path = save(tmp_path / "m.safetensors", fixed_source())
    convert(path, tmp_path / "o.safetensors", EVERY_FORMAT[recipe])
    found = load(tmp_path / "o.safetensors")
    digest = hashlib.sha256()
    for name, (dtype, shape, data) in found.items():
        digest.update(f"{name} {dtype} {shape} {len(data)}\n".encode() + data)
    assert digest.hexdigest() == GOLDEN[recipe]
