"""Tiles of every layout against a whole decode by somebody else: our formats' own, comfy-kitchen, bitsandbytes, torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from others_layers import EVERY_LAYOUT, bnb4, mxfp8, nvfp4, weight
from small_checkpoints import EVERY_FORMAT, floats, sample, save

import streamquant
from streamquant.checkpoint.reader import TileReader
from streamquant.formats.int8 import Int8TensorWise
from streamquant.stored import Contents, read_contents, tiles
from streamquant.stored.numbers import byte_values, decode_bytes, decode_nibbles

TILE = 256  # elements: small enough to cut every layer here into several


def decode(contents: Contents, key: str, elements: int = TILE) -> np.ndarray:
    """A whole weight, tile by tile."""
    layout = contents.weight(key)
    with TileReader(contents.checkpoint) as reader:
        parts = [layout.decode(reader.tile, begin, end).values for begin, end in tiles(layout.shape, elements)]
    return np.concatenate(parts).reshape(layout.shape) if parts else np.empty(layout.shape, dtype=np.float32)


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_what_we_write_decodes_to_the_bit_as_its_format_does(tmp_path, name):
    source = save(tmp_path / "source.safetensors", sample())
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, EVERY_FORMAT[name])
    contents = read_contents(streamquant.open_checkpoint(output))
    plan = streamquant.plan(source, EVERY_FORMAT[name])
    assert set(contents.layers) == {unit.layer for unit in plan.units if unit.quantized}
    for unit in plan.units:
        if not unit.quantized:
            continue
        layer = contents.layers[unit.layer]
        tensors = {output.suffix: contents.checkpoint.read(unit.output_name(output)) for output in unit.outputs}
        layout = unit.format
        if isinstance(layout, Int8TensorWise):  # whether rows are rotated may be settled by the weights
            layout = replace(layout, convrot_group_size=layer.marker.get("convrot_groupsize", 0))
        whole = layout.decode(tensors, torch.float32).numpy()
        assert np.array_equal(decode(contents, unit.key), whole), unit.key
        assert np.array_equal(decode(contents, unit.key, 1 << 18), whole), unit.key
        assert (layer.format, layer.shape, layer.faults) == (unit.format.name, unit.shape, ())
        assert layer.nbytes == plan.output_bytes(unit)


@pytest.mark.parametrize("name", EVERY_LAYOUT)
@pytest.mark.parametrize("shape", [(40, 128), (130, 320), (3, 64)])
def test_what_others_write_decodes_as_they_decode_it(tmp_path, name, shape):
    stored = EVERY_LAYOUT[name](weight(*shape))
    path = save(tmp_path / "other.safetensors", stored.named("blocks.0.linear"))
    contents = read_contents(streamquant.open_checkpoint(path))
    assert not contents.layers["blocks.0.linear"].faults
    ours = decode(contents, "blocks.0.linear.weight")
    # Rotations and double-quantized absmax may be summed in another order; everything else is exact.
    exact = not any(word in name for word in ("convrot", "nested", "llm"))
    tolerance = 0 if exact else 2e-6 * float(stored.decoded.abs().max())
    np.testing.assert_allclose(ours, stored.decoded.numpy(), rtol=0, atol=tolerance)


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from([32, 64, 128]), st.booleans(), st.sampled_from(["nf4", "fp4"]))
def test_4bit_blocks_run_across_rows_of_any_length(tmp_path_factory, rows, columns, block_size, nested, book):
    stored = bnb4(weight(rows, columns), book, block_size, nested)
    path = save(tmp_path_factory.mktemp("bnb") / "w.safetensors", stored.named("l"))
    contents = read_contents(streamquant.open_checkpoint(path))
    np.testing.assert_allclose(decode(contents, "l.weight", 64), stored.decoded.numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", [nvfp4, mxfp8])
@settings(max_examples=15)
@given(rows=st.integers(1, 300), groups=st.integers(1, 12), data=st.data())
def test_tiled_scales_are_cut_to_the_weight_s_own_shape(tmp_path_factory, layout, rows, groups, data):
    stored = layout(weight(rows, 16 * groups - 3))
    path = save(tmp_path_factory.mktemp("tiled") / "w.safetensors", stored.named("l"))
    contents = read_contents(streamquant.open_checkpoint(path))
    expected = stored.decoded.numpy()
    assert np.array_equal(decode(contents, "l.weight"), expected)
    row, begin = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, 16 * groups - 4))
    end = data.draw(st.integers(begin + 1, 16 * groups - 3))
    with TileReader(contents.checkpoint) as reader:
        start = row * expected.shape[1]
        piece = contents.weight("l.weight").decode(reader.tile, start + begin, start + end)
    assert np.array_equal(piece.values, expected[row, begin:end])


@pytest.mark.parametrize("layout", [nvfp4, mxfp8])
def test_of_one_endless_row_only_what_is_asked_for_is_read(tmp_path, layout):
    columns, rows = 1 << 16, 2
    path = save(tmp_path / "w.safetensors", layout(weight(rows, columns)).named("l"))
    contents = read_contents(streamquant.open_checkpoint(path))
    found = contents.weight("l.weight")
    with TileReader(contents.checkpoint) as reader:

        def read(tensor, begin, end):
            assert end - begin <= max(tensor.info.nbytes // 8, 4)
            return reader.tile(tensor, begin, end)

        for begin, end in tiles(found.shape, columns // 16):
            found.decode(read, begin, end)
        if layout is mxfp8:
            scales, complete = found.scales(read, 100)
            assert scales.size == 100 and not complete


def test_one_endless_row_is_decoded_in_pieces(tmp_path):
    source = save(tmp_path / "source.safetensors", {"wide.weight": floats(2, 5 * 4096), "tall.weight": floats(4096, 3)})
    for recipe in ("fp8-row", "fp8-block3d", "int8-tensor", "nf4"):
        output = tmp_path / f"{recipe}.safetensors"
        streamquant.convert(source, output, EVERY_FORMAT[recipe])
        contents = read_contents(streamquant.open_checkpoint(output))
        assert np.array_equal(decode(contents, "wide.weight", 4096), decode(contents, "wide.weight", 1 << 18)), recipe


@given(st.lists(st.integers(1, 40), min_size=0, max_size=3), st.sampled_from([16, 64, 4096]))
def test_tiles_cover_a_shape_once_in_whole_rows_or_parts_of_one(shape, elements):
    total = int(np.prod(shape, dtype=np.int64))
    columns = shape[-1] if shape else 1
    end = 0
    for begin, stop in tiles(tuple(shape), elements):
        assert begin == end < stop
        whole_rows = begin % columns == 0 and stop % columns == 0
        assert whole_rows or begin // columns == (stop - 1) // columns
        assert stop - begin <= elements
        end = stop
    assert end == total


@pytest.mark.parametrize(
    ("tag", "dtype"),
    [
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E8M0", torch.float8_e8m0fnu),
        ("I8", torch.int8),
    ],
)
def test_one_byte_numbers_are_torch_s(tag, dtype):
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    truth = every.view(dtype).float().numpy()
    np.testing.assert_array_equal(byte_values(tag), truth)
    for first in (0, 1):  # an odd start, an odd length
        np.testing.assert_array_equal(decode_bytes(every.numpy()[first:255], tag), truth[first:255])


def test_nibbles_come_in_the_order_asked_for():
    book = np.arange(16, dtype=np.float32)
    packed = np.array([0x12, 0xF0], dtype=np.uint8)
    assert decode_nibbles(packed, book).tolist() == [1, 2, 15, 0]
    assert decode_nibbles(packed, book, high_first=False).tolist() == [2, 1, 0, 15]


def test_a_path_is_enough(tmp_path):
    path = save(tmp_path / "plain.safetensors", {"a.weight": floats(4, 4)})
    assert read_contents(streamquant.open_checkpoint(Path(path))).layers == {}
