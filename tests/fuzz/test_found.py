"""What fuzzing and attacks have found, each as a small test."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import xxhash
from click.testing import CliRunner
from others_layers import bnb4, weight
from small_checkpoints import Tensor, floats, noise, of_values, save, save_shards

from streamquant import calibration, cli, errors
from streamquant.checkpoint.journal import differences, read_records
from streamquant.checkpoint.json_text import load_json
from streamquant.checkpoint.reader import TileReader, open_checkpoint
from streamquant.folding import spell
from streamquant.pages.pictures import Point, blocks_and_kinds
from streamquant.stored import read_contents

A, B = {"a.weight": floats(8, 8)}, {"b.weight": floats(8, 8)}


def shown(*arguments: str | Path) -> str:
    done = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def marked(path: Path, text: str) -> Path:
    tensors = {"a.weight": noise("F8_E4M3", 64, 64), "a.weight_scale": of_values([1.0] * 64, "F32")}
    return save(path, tensors | {"a.comfy_quant": Tensor("U8", (len(text.encode()),), text.encode())})


# JSON

@pytest.mark.parametrize(
    "text",
    ['{"format": "x", "a": ' + "[" * 500 + "]" * 500 + "}", '{"format": "x", "a": ' + "9" * 5000 + "}", '{"format": "x", "format": "y"}',
     "[]", "{", '{"a": ' * 40 + "1" + "}" * 40],
)  # fmt: skip
def test_markers_that_no_one_would_write(tmp_path, text):
    """Nested 500 deep, one was read, and ended in a RecursionError when it was printed."""
    (layer,) = read_contents(str(marked(tmp_path / "x.safetensors", text))).layers.values()
    assert layer.layout is None and "is not the JSON object" in layer.faults[0], layer.faults


@pytest.mark.parametrize("text", ["[" * 33 + "]" * 33, '{"a":' * 33 + "0" + "}" * 33, "1" * 41, "-" + "1" * 41, b"\xff", '{"a":1,"a":1}', "[" * 10**6])
def test_json_that_is_refused(text):
    with pytest.raises(ValueError):
        load_json(text)


@pytest.mark.parametrize("text", ["[" * 32 + "]" * 32, "1" * 40, "[]", '{"a": [1, 2.5, null, "x"]}'])
def test_json_that_is_read(text):
    assert load_json(text) == json.loads(text)


@pytest.mark.parametrize("recipe", ['"x"', "[1]", "7", '{"layer_config": 7}', '{"preset": 7}', '{"base": [1]}'])
@pytest.mark.parametrize("source", ['"x"', "7", "null", "[7]"])
def test_provenance_of_other_types(tmp_path, recipe, source):
    path = save(tmp_path / "x.safetensors", A, {"streamquant": f'{{"recipe": {recipe}, "source": {source}}}'})
    assert "made by" in shown("inspect", path)


def test_a_format_with_escapes_in_its_name(tmp_path):
    """It was shown as it is in the sentence about its scales."""
    path = marked(tmp_path / "x.safetensors", json.dumps({"format": "float8_e4m3fn\x1b]0;owned\x07"}))
    assert "\x1b" not in shown("inspect", path) and "\\x1b]0;owned" in shown("inspect", path)


# Sizes

def state_of(**changes: object) -> dict[str, Tensor]:
    """An NF4 layer of 8 x 64 whose quant_state says something else."""
    state = json.dumps({"shape": [8, 64], "blocksize": 64, "quant_type": "nf4", "dtype": "bfloat16"} | changes).encode()
    return {"l.weight": noise("U8", 256, 1), "l.weight.absmax": of_values([1.0] * 8, "F32"),
            "l.weight.quant_map": of_values(list(range(16)), "F32"),
            "l.weight.quant_state.bitsandbytes__nf4": Tensor("U8", (len(state),), state)}  # fmt: skip


@pytest.mark.parametrize("block_size", [1, 3, 0, -64, True, 64.0, "64", None, 1 << 17, 10**30])
def test_a_block_size_that_is_none(tmp_path, block_size):
    """A block as large as its layer would have been decoded whole for every tile."""
    path = save(tmp_path / "x.safetensors", state_of(blocksize=block_size))
    (layer,) = read_contents(str(path)).layers.values()
    assert layer.layout is None and "quant_state" in layer.faults[0]


def test_a_calibration_of_70_dimensions(tmp_path):
    tensors = {"a.count": Tensor("I64", (), bytes([1] + [0] * 7)), "a.mean": of_values([1.0], "F32"),
               "a.diagonal": Tensor("F32", (1,) * 70, bytes(4)), "a.hessian": Tensor("F32", (1, 1), bytes(4))}  # fmt: skip
    meta = {"format": "streamquant-calibration", "version": "1", "kind": "dense", "seed": "0", "keys": "module"}
    with pytest.raises(errors.CalibrationError, match="dimension"):
        calibration.load(save(tmp_path / "x.safetensors", tensors, meta))


# Names

def test_block_numbers_of_thousands_of_digits(tmp_path):
    """Python does not read them as integers."""
    names = [f"blocks.{digit * 5000}.weight" for digit in "78"]
    assert spell(names) == "blocks.*.weight" and spell(names[:1]) == names[0]
    assert "blocks" in shown("inspect", "--tree", save(tmp_path / "x.safetensors", dict.fromkeys(names, floats(2, 2))))
    assert blocks_and_kinds([Point(name, "fp8", 0.1, 1) for name in names]) == {}


def test_a_tree_thousands_of_levels_deep(tmp_path):
    names = ["a." * depth + "w" for depth in range(0, 3000, 3)]
    assert "a.a" in shown("inspect", "--tree", save(tmp_path / "x.safetensors", dict.fromkeys(names, floats(1))))


def test_a_picture_of_a_million_blocks_is_not_drawn():
    points = [Point(f"blocks.{number}.kind{number}", "fp8", 0.1, 1) for number in range(100_000)]
    assert blocks_and_kinds(points) == {}


# Shards

@pytest.mark.parametrize(
    "name",
    ["../b.safetensors", "/etc/passwd", "sub/../../b.safetensors", "..\\b.safetensors", "C:\\b.safetensors", "C:b.safetensors", "\\\\host\\b", "..",
     ".", "", "NUL", "nul.safetensors", "COM1", "sub/AUX.txt", "b.safetensors.", "b.safetensors ", ".. /b.safetensors", "b\0.safetensors", "b:stream"],
)  # fmt: skip
def test_shards_outside_the_folder(tmp_path, name):
    save(tmp_path / "b.safetensors", B)
    index = save_shards(tmp_path / "model", A, B, **{"b.weight": name})
    with pytest.raises(errors.ShardOutsideFolderError, match="outside its own folder"):
        open_checkpoint(index)


@pytest.mark.parametrize("name", ["n" * 300, "\ud800", "missing.safetensors", "sub", "pipe", "loop", "model-00001-of-00002.safetensors/x"])
def test_shards_that_are_no_files(tmp_path, name):
    index = save_shards(tmp_path, A, B, **{"b.weight": name})
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(errors.ShardMissingError):
        open_checkpoint(index)


@pytest.mark.parametrize("inner", ["link.safetensors", "folder/b.safetensors"])
def test_links_out_of_the_folder(tmp_path, inner):
    outside = save(tmp_path / "secret" / "b.safetensors", B)
    index = save_shards(tmp_path / "model", A, B, **{"b.weight": inner})
    (index.parent / "link.safetensors").symlink_to(outside)
    (index.parent / "folder").symlink_to(outside.parent)
    with pytest.raises(errors.ShardOutsideFolderError, match="a link out of its own folder"):
        open_checkpoint(index)


def test_links_that_stay_at_home(tmp_path):
    """Inside the folder; the folder itself; and the index with its shards, to one other folder (as in a Hugging Face cache)."""
    index = save_shards(tmp_path / "blobs", A, B)
    (tmp_path / "named").symlink_to(index.parent)
    assert set(open_checkpoint(tmp_path / "named").tensors) == set(A | B)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in index.parent.iterdir():
        (linked / path.name).symlink_to(path)
    assert set(open_checkpoint(linked).tensors) == set(A | B)
    (index.parent / "model-00002-of-00002.safetensors").rename(index.parent / "real")
    (index.parent / "model-00002-of-00002.safetensors").symlink_to("real")
    assert set(open_checkpoint(index).tensors) == set(A | B)


def test_an_index_that_is_a_pipe_or_endless(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(errors.SourceReadError, match="not a regular file"):
            open_checkpoint(tmp_path / name)


# States of 4-bit layers

@pytest.mark.parametrize(("key", "value"), [("nested_blocksize", 2**70), ("nested_blocksize", True), ("nested_offset", True), ("nested_offset", 1e39)])
def test_a_nested_state_with_numbers_that_are_none_is_a_layer_that_cannot_be_decoded(tmp_path, key, value):
    tensors = bnb4(weight(64, 64), nested=True).named("a")
    name = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].data)) | {key: value}
    data = json.dumps(state).encode()
    found = read_contents(open_checkpoint(save(tmp_path / "m.safetensors", tensors | {name: Tensor("U8", (len(data),), data)})))
    (layer,) = found.layers.values()
    assert layer.layout is None and "its absmax is in 8 bits, and what decodes it is missing" in layer.faults[0]


@pytest.mark.parametrize("size", [True, 2**70, -1, 0, 1.0, "1"])
def test_a_block_size_that_is_no_number_is_not_taken_for_one(tmp_path, size):
    marker = json.dumps({"format": "float8_e4m3fn_block3d", "group_size": size}).encode()
    tensors = {
        "a.weight": noise("F8_E4M3", 32, 2), "a.weight_scale": floats(32, 2, 1, dtype="F32"),
        "a.comfy_quant": Tensor("U8", (len(marker),), marker),
    }  # fmt: skip
    checkpoint = open_checkpoint(save(tmp_path / "m.safetensors", tensors))
    (layer,) = read_contents(checkpoint).layers.values()
    with TileReader(checkpoint) as reader:
        assert layer.layout.decode(reader.tile, 0, 64).values.shape == (64,)


@pytest.mark.parametrize("size", [32, None])
@pytest.mark.parametrize("name", ["int8_blockwise", "int8_tensorwise"])
def test_a_single_number_marked_as_a_layer(tmp_path, name, size):
    marker = json.dumps({"format": name, "group_size": size}).encode()
    tensors = {"a.weight": noise("I8"), "a.weight_scale": floats(dtype="F32"), "a.comfy_quant": Tensor("U8", (len(marker),), marker)}
    (layer,) = read_contents(open_checkpoint(save(tmp_path / "m.safetensors", tensors))).layers.values()
    assert (layer.shape, layer.faults) == ((), ())


# Journals

def journal(folder: Path, *lines: str) -> Path:
    path = folder / "x.journal"
    path.write_bytes(b"".join(xxhash.xxh3_64_hexdigest(line.encode()).encode() + f" {line}\n".encode() for line in lines))
    return path


FIRST = '{"journal": 1, "fingerprint": {"a": 1}}'


@pytest.mark.parametrize("line", ['{"unit": []}', '{"durable": "x"}', '{"published": {}}', '{"learned": 1}', "[" * 3000, "9" * 5000, "null", "{"])
def test_a_journal_line_that_no_one_writes_ends_it(tmp_path, line):
    records = read_records(journal(tmp_path, FIRST, '{"unit": 0, "hashes": []}', line, '{"unit": 1, "hashes": []}'))
    assert set(records.units) == {0} and records.lines == 2


@pytest.mark.parametrize("line", ['{"journal": 1}', '{"journal": 1, "fingerprint": []}', '{"journal": 2, "fingerprint": {}}', "[]", "9" * 5000])
def test_a_journal_that_is_none(tmp_path, line):
    with pytest.raises(errors.ResumeError):
        read_records(journal(tmp_path, line))


def test_differences_of_fingerprints_are_safe_to_show():
    assert differences({"a": 1, "s\x1b[2J": 1}, {"a": 1}) == ["s\\x1b[2J was 1, is null"]
