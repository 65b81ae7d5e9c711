"""Output in shards: Hugging Face's names and index, each shard a file of its own, together the same tensors."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from conversions import Watcher, files, hidden
from safetensors import safe_open
from small_checkpoints import EVERY_FORMAT, Tensor, floats, load, metadata_of, noise, sample, save, save_shards

from streamquant import FormatChoice, Recipe, errors, open_checkpoint
from streamquant.plan import plan
from streamquant.transcode import convert

RECIPE = Recipe(FormatChoice("fp8"), custom_layers="mlp", custom=FormatChoice("nf4"), comfy_quant=True)
INT8 = Recipe(FormatChoice("int8"))


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "m.safetensors", sample(), {"modelspec.title": "x"})


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.safetensors"


def all_tensors(folder) -> dict[str, Tensor]:
    found = {}
    for name in files(folder):
        if name.endswith(".safetensors"):
            part = load(folder / name)
            assert not found.keys() & part.keys()
            found |= part
    return found


@pytest.mark.parametrize("recipe", EVERY_FORMAT)
def test_shards_hold_what_the_single_file_holds(source, out, tmp_path, recipe):
    convert(source, out, EVERY_FORMAT[recipe], shard_size=10_000)
    convert(source, tmp_path / "one.safetensors", EVERY_FORMAT[recipe])
    assert len(files(out.parent)) > 3
    assert all_tensors(out.parent) == load(tmp_path / "one.safetensors")


def test_names_and_index(source, out):
    report = convert(source, out, RECIPE, shard_size=60_000)
    count = len(files(out.parent)) - 1
    shards = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert set(files(out.parent)) == {*shards, "model.safetensors.index.json"} and count > 1
    assert report.outputs == [out.with_name(name) for name in [*shards, "model.safetensors.index.json"]]
    index = json.loads((out.parent / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard in shards for name in load(out.with_name(shard))}
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["metadata"] == {"total_size": sum(len(tensor.data) for tensor in all_tensors(out.parent).values())}


def test_each_shard_is_a_valid_file_by_itself(source, out):
    convert(source, out, RECIPE, shard_size=60_000)
    for path in out.parent.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
        metadata = metadata_of(path)
        assert metadata["modelspec.title"] == "x" and metadata["format"] == "pt"
        layers = json.loads(metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
        assert {f"{layer}.weight" for layer in layers} <= keys, "lists layers of another shard"
        assert {f"{layer}.comfy_quant" for layer in layers} <= keys


def test_a_layers_tensors_stay_together_and_shards_keep_to_their_size(source, out):
    convert(source, out, RECIPE, shard_size=30_000)
    made = plan(source, RECIPE, name=out.name, shard_size=30_000)
    for unit in made.units:
        assert len({made.placement[unit.output_name(output)][0] for output in unit.outputs}) == 1
    members = Counter(made.placement[unit.output_name(unit.outputs[0])][0] for unit in made.units)
    for number, file in enumerate(made.files):
        assert members[number] == 1 or 1 <= sum(tensor.nbytes for tensor in file.tensors) <= 30_000


def test_shards_that_are_one_keep_the_plain_name(source, out):
    convert(source, out, RECIPE, shard_size=10**9)
    assert set(files(out.parent)) == {"model.safetensors"}


def test_what_is_written_in_shards_opens_again_and_converts_to_the_same(source, out, tmp_path):
    """Shards in, one file out: quantized layers that stay pass through, marker and header entry too."""
    convert(source, out, Recipe(FormatChoice("fp8"), exclude_layers="mlp|tall"), shard_size=30_000)
    assert sum("_quantization_metadata" in file.header.metadata for file in open_checkpoint(out.parent).files) > 1
    again = Recipe(FormatChoice("int8"), exclude_layers="tall|qkv")
    convert(out.parent, tmp_path / "again.safetensors", again)
    found, first = load(tmp_path / "again.safetensors"), all_tensors(out.parent)
    markers = {
        name.removesuffix(".comfy_quant"): json.loads(t.data)
        for name, t in found.items()
        if name.endswith("comfy_quant")
    }
    assert json.loads(metadata_of(tmp_path / "again.safetensors")["_quantization_metadata"])["layers"] == markers
    assert {marker["format"] for marker in markers.values()} == {"float8_e4m3fn", "int8_tensorwise"}
    for layer, marker in markers.items():
        if marker["format"] == "float8_e4m3fn":
            assert found[f"{layer}.weight"] == first[f"{layer}.weight"]


def test_a_shard_appears_when_it_is_complete_and_the_index_last(source, out):
    seen = []
    watcher = Watcher(lambda tiles: seen.append(set(files(out.parent))))
    convert(source, out, RECIPE, shard_size=30_000, observer=watcher)
    assert {} != seen[-1] < set(files(out.parent)) and hidden(out.parent) == []
    assert not any("model.safetensors.index.json" in names for names in seen)
    assert all(before <= after for before, after in zip(seen, seen[1:], strict=False))


def test_one_name_taken_is_enough_to_refuse_before_anything_is_written(source, out):
    made = plan(source, RECIPE, name=out.name, shard_size=30_000)
    out.with_name(made.files[-1].name).write_bytes(b"mine")
    with pytest.raises(errors.OutputExistsError, match=made.files[-1].name):
        convert(source, out, RECIPE, shard_size=30_000)
    assert files(out.parent) == {made.files[-1].name: b"mine"} and hidden(out.parent) == []


def test_a_bad_weight_in_a_later_shard_leaves_nothing_behind(tmp_path, out):
    bad = floats(8, 8, seed=2)
    tensors = {
        "a.weight": floats(64, 64), "b.weight": floats(64, 64, seed=1),
        "z.weight": bad._replace(data=bad.data[:-2] + b"\x80\x7f"), "ids": noise("I64", 2),
    }  # fmt: skip
    source = save(tmp_path / "bad.safetensors", tensors)
    seen = []
    with pytest.raises(errors.NonFiniteError, match=r"z\.weight\[7, 7\]"):
        convert(source, out, INT8, shard_size=4_000, observer=Watcher(lambda _: seen.append(len(files(out.parent)))))
    assert max(seen) > 0 and list(out.parent.iterdir()) == []


def test_a_sharded_source_into_one_file_and_back_into_shards(tmp_path, out):
    tensors = sample()
    names = list(tensors)
    index = save_shards(tmp_path / "s", {n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]})
    convert(index, out, INT8)
    single = load(out)
    out.unlink()
    convert(tmp_path / "s", out, INT8, shard_size=50_000)
    assert all_tensors(out.parent) == single
