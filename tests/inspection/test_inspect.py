"""What `inspect` says of a file, and that it reads no weight to say it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from others_layers import EVERY_LAYOUT, bnb4, float8, weight
from small_checkpoints import Tensor, floats, sample, save, save_shards

import streamquant
from streamquant import FormatChoice, Recipe, errors
from streamquant.checkpoint.reader import TileReader
from streamquant.folding import fold, fold_all, spell
from streamquant.inspect import SCALES_PER_LAYER, inspect
from streamquant.stored.gguf import GgufSummary


def flux2_like() -> dict[str, Tensor]:
    names = ["double_stream_modulation_img.lin", "img_in", *(f"single_blocks.{block}.linear{part}" for block in range(3) for part in (1, 2))]
    return {f"{name}.weight": floats(128, 128, seed=number) for number, name in enumerate(names)}


def test_a_mixed_file_on_one_page(tmp_path):
    source = save(tmp_path / "source.safetensors", flux2_like(), {"modelspec.title": "Tiny"})
    recipe = Recipe(FormatChoice("nf4"), custom_layers="img_in", custom=FormatChoice("fp8"), preset=("flux2",))
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, recipe)
    found = inspect(output)
    assert (found.architecture, found.preset, found.files) == ("Flux.2", "flux2", 1)
    assert found.nbytes == output.stat().st_size and found.weights == 8 * 128 * 128
    assert [(group.format, group.detail, group.layers) for group in found.groups] == [
        ("bnb_nf4", "blocks of 64", 6),
        ("float8_e4m3fn", "tensor scale", 1),
    ]
    nf4 = found.groups[0]
    assert nf4.bits_per_weight == pytest.approx(4.5, abs=0.2)
    assert [(kept.dtype, kept.tensors) for kept in found.kept] == [("BF16", 1)]
    assert found.metadata["modelspec.title"] == "Tiny" and found.provenance[0]["recipe"]["custom_layers"] == "img_in"
    assert found.hashed == found.tensors and found.faults == ()
    assert found.loaders == "ComfyUI with a node pack"
    document = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert {layer["format"] for layer in document["layers"]} == {"bnb_nf4", "float8_e4m3fn"}
    assert len(document["plain"]) == 1


@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_scale_ranges_are_those_in_the_file(tmp_path, name):
    stored = EVERY_LAYOUT[name](weight(256, 128))
    found = inspect(save(tmp_path / "file.safetensors", stored.named("a")))
    low, high = found.groups[0].scale_range
    assert 0 < low <= high and not found.groups[0].sampled
    scale = next((tensor for suffix, tensor in stored.tensors.items() if suffix in ("weight_scale", "weight.absmax")), None)
    if scale is not None and scale.dtype == "F32":
        values = np.frombuffer(scale.data, dtype=np.float32)
        assert (low, high) == (values[values > 0].min(), values.max())


def test_scales_are_sampled_and_weights_never_read(tmp_path, monkeypatch):
    read: dict[str, int] = {}
    original = TileReader.tile

    def tile(self, tensor, begin, end):
        read[tensor.name] = read.get(tensor.name, 0) + end - begin
        return original(self, tensor, begin, end)

    monkeypatch.setattr(TileReader, "tile", tile)
    stored = bnb4(weight(1024, 512), block_size=64)
    found = inspect(save(tmp_path / "file.safetensors", stored.named("a")))
    assert found.groups[0].sampled
    assert "a.weight" not in read
    assert read["a.weight.absmax"] == 4 * SCALES_PER_LAYER


def test_faults_are_listed_with_their_layers(tmp_path):
    tensors = float8(weight(32, 32)).named("a")
    tensors["a.scale_weight"] = tensors.pop("a.weight_scale")
    found = inspect(save(tmp_path / "file.safetensors", tensors))
    ((name, fault),) = found.faults
    assert name == "a" and "spelled scale_weight" in fault


def test_scales_that_are_no_numbers_are_a_fault(tmp_path):
    tensors = float8(weight(32, 32)).named("a") | {"a.weight_scale": Tensor("F32", (), np.float32(np.nan).tobytes())}
    found = inspect(save(tmp_path / "file.safetensors", tensors))
    assert found.faults == (("a", "its scales hold NaN or infinity"),) and found.groups[0].scale_range is None


def test_shards_and_plain_files(tmp_path):
    index = save_shards(tmp_path / "sharded", {"a.weight": floats(8, 8)}, {"b.weight": floats(8, 8, dtype="F32")})
    found = inspect(tmp_path / "sharded")
    assert (found.path, found.files, found.groups) == (index, 2, ())
    assert "no layer is quantized" in found.loaders
    assert inspect(save(tmp_path / "plain.safetensors", sample())).tensors == len(sample())


def test_gguf_and_what_is_no_checkpoint(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(48))
    assert isinstance(inspect(tmp_path / "model.gguf"), GgufSummary)
    (tmp_path / "junk.dat").write_bytes(b"\xff" * 64)
    with pytest.raises(errors.HeaderLengthError):
        inspect(tmp_path / "junk.dat")
    with pytest.raises(errors.SourceMissingError):
        inspect(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("double_blocks.0.img_attn.qkv", ("double_blocks.", ".img_attn.qkv")),
        ("h.12.mlp.3.w", ("h.", ".mlp.", ".w")),
        ("linear1.weight", ("linear1.weight",)),
        ("time_embed_2.7", ("time_embed_2.", "")),
        ("7", ("", "")),
    ],
)
def test_only_numbers_between_dots_fold(name, folded):
    assert fold(name) == folded


def test_folded_names_are_spelled_with_their_ranges():
    names = [f"b.{number}.w" for number in (0, 1, 2, 5, 7, 8)]
    assert [spell(members) for members in fold_all(names)] == ["b.0-2,5,7-8.w"]
    assert spell(["plain"]) == "plain"


@given(st.lists(st.from_regex(r"[a-z0-9*]{1,3}(\.[a-z0-9*]{1,3}){0,3}", fullmatch=True), min_size=1, max_size=20, unique=True))
def test_folding_loses_no_name(names):
    folded = fold_all(names)
    assert sorted(name for members in folded for name in members) == sorted(names)
    for members in folded:
        assert len({fold(name) for name in members}) == 1
        if len(members) == 1:
            assert spell(members).count(".") == members[0].count(".")
