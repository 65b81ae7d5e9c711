"""Tile sizes: they keep to the budget and to the format's boundaries, and a budget that cannot be kept is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import EVERY_FORMAT, floats, noise, sample, save

from streamquant import FormatChoice, Recipe, budget, errors
from streamquant.budget import MEBIBYTE, anonymous_bytes, bytes_per_element, tile_sizes, tiles_in_flight
from streamquant.plan import plan
from streamquant.transcode import convert


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    path = save(tmp_path_factory.mktemp("s") / "m.safetensors", sample() | {"big.weight": floats(640, 1024, seed=3)})
    return {name: plan(path, recipe) for name, recipe in EVERY_FORMAT.items()}


@settings(max_examples=200)
@given(
    st.sampled_from(list(EVERY_FORMAT)), st.integers(0, 400 * MEBIBYTE), st.integers(1, 64),
    st.sampled_from(["mmap", "pread"]),
    st.sampled_from(["numba", "torch"]), st.none() | st.integers(1, 1 << 32), st.integers(1, 1 << 24),
)  # fmt: skip
def test_tiles_keep_to_the_budget_and_to_the_formats_boundaries(
    plans, name, memory, threads, io, backend, vram, target
):
    made = plans[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "TARGET_TILE_BYTES", target)
        try:
            tiles = tile_sizes(made, memory, threads, io, backend, vram)
        except errors.BudgetError:
            return
    assert tiles.peak_bytes <= memory == tiles.memory_budget and tiles.in_flight == tiles_in_flight(threads)
    for unit, size in zip(made.units, tiles.elements, strict=True):
        assert size >= 1 and (size % unit.granularity == 0 or size == unit.elements)
        taken = budget.OVERHEAD[backend] + size * bytes_per_element(unit, io, backend) * tiles.in_flight
        assert taken <= memory + 1
        assert size * unit.element_bytes <= max(target, unit.granularity * unit.element_bytes)


def test_the_refusal_names_a_budget_that_is_enough(tmp_path):
    """One row of 40 million weights cannot be cut for row scales."""
    path = tmp_path / "m.safetensors"
    from benchmarks.checkpoints import write_checkpoint
    from benchmarks.shapes import TensorShape

    write_checkpoint(path, [TensorShape("l.weight", "F32", (1, 40_000_000))], sparse=True)
    recipe = Recipe(FormatChoice("int8", "row"))
    with pytest.raises(errors.BudgetError, match=r"l\.weight \(1 x 40000000\)") as caught:
        convert(path, tmp_path / "o.safetensors", recipe, memory_budget=256 * MEBIBYTE, threads=2, io="pread")
    assert caught.value.exit_code == 4 and not (tmp_path / "o.safetensors").exists()
    enough = int(re.search(r"--memory-budget (\d+)MiB", str(caught.value))[1])
    made = plan(path, recipe)
    assert tile_sizes(made, enough * MEBIBYTE, 2, "pread", "numba", None).peak_bytes <= enough * MEBIBYTE
    with pytest.raises(errors.BudgetError):
        tile_sizes(made, (enough - 2) * MEBIBYTE, 2, "pread", "numba", None)


def test_a_device_too_small_is_refused_by_its_own_name_and_told_what_is_enough(plans):
    made = plans["int8-row"]
    with pytest.raises(errors.BudgetError, match="big.weight .*--vram-budget") as caught:
        tile_sizes(made, 1 << 30, 2, "mmap", "torch", 1 << 10)
    enough = int(re.search(r"--vram-budget (\d+)MiB", str(caught.value))[1])
    assert tile_sizes(made, 1 << 30, 2, "mmap", "torch", enough * MEBIBYTE)


@pytest.mark.parametrize("memory", [0, 1, 64 * MEBIBYTE])
def test_a_budget_below_the_process_itself_is_refused(plans, memory):
    with pytest.raises(errors.BudgetError, match="--memory-budget"):
        tile_sizes(plans["fp8-tensor"], memory, 1, "mmap", "numba", None)


def test_mebibytes_256_are_enough_for_many_threads(plans):
    for name, made in plans.items():
        assert tile_sizes(made, 256 * MEBIBYTE, 32, "pread", "torch", None).peak_bytes <= 256 * MEBIBYTE, name


def test_a_copied_tensor_takes_no_memory_when_mapped(tmp_path):
    tensors = {"l.weight": floats(8, 8), "table": noise("I64", 4096, 16)}
    made = plan(save(tmp_path / "m.safetensors", tensors), Recipe(FormatChoice("fp8")))
    (table,) = (unit for unit in made.units if unit.key == "table")
    assert bytes_per_element(table, "mmap", "numba") == 0 and bytes_per_element(table, "pread", "numba") == 1


def test_what_the_process_holds_is_counted():
    before = anonymous_bytes()
    block = bytearray(b"x") * (64 * MEBIBYTE)
    assert 60 * MEBIBYTE < anonymous_bytes() - before < 80 * MEBIBYTE and len(block)
