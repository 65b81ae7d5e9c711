"""Two outputs side by side: the errors are those that verifying each alone finds."""

from __future__ import annotations

import json

import pytest
import torch
from others_layers import bnb4, float8, of_torch, weight
from small_checkpoints import floats, save

import streamquant
from streamquant import FormatChoice, Recipe, errors
from streamquant.compare import compare
from streamquant.verify import verify


@pytest.fixture
def files(tmp_path):
    tensors = {f"blocks.{block}.w.weight": floats(128, 64, seed=block) for block in range(3)} | {"norm.weight": floats(64)}
    source = save(tmp_path / "source.safetensors", tensors)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    streamquant.convert(source, a, Recipe(FormatChoice("int8", rounding="simple")))
    streamquant.convert(source, b, Recipe(FormatChoice("nf4", rounding="simple"), exclude_layers=r"blocks\.2"))
    return source, a, b


def test_each_side_s_error_is_the_one_that_verify_finds(files):
    source, a, b = files
    found = compare(a, b, source)
    for side, path in (("a", a), ("b", b)):
        truth = {layer.key: layer.relative_error for layer in verify(source, path).layers}
        for layer in found.layers:
            assert getattr(layer, side).relative_error == pytest.approx(truth.get(layer.key, 0.0), rel=1e-9), layer.key
    assert [layer.better for layer in found.layers] == ["a", "a", "b"], "what stays in bf16 is exact"
    assert (found.count("a"), found.count("b")) == (2, 1)
    assert (found.bytes_a, found.bytes_b) == (a.stat().st_size, b.stat().st_size)
    assert found.alike == 1 and found.only_in_a == found.only_in_b == ()
    document = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert document["layers"][0]["better"] == "a"


def test_without_a_source_there_is_only_the_difference(files):
    _, a, b = files
    found = compare(a, b)
    assert all(layer.better is None and layer.a.relative_error is None for layer in found.layers)
    assert found.layers[0].difference > 0.05
    assert all(layer.difference == 0 for layer in compare(a, a).layers)


def test_the_difference_is_relative_to_the_first(tmp_path):
    w = weight(64, 64)
    first, second = bnb4(w), float8(w)
    a = save(tmp_path / "a.safetensors", first.named("l"))
    b = save(tmp_path / "b.safetensors", second.named("l") | {"extra": floats(2)})
    found = compare(a, b, save(tmp_path / "source.safetensors", {"l.weight": of_torch(w)}))
    truth = torch.linalg.norm(first.decoded - second.decoded) / torch.linalg.norm(first.decoded)
    assert found.layers[0].difference == pytest.approx(float(truth), rel=1e-4)
    assert found.only_in_b == ("extra",) and found.count("b") == 1


def test_equal_errors_are_a_draw(tmp_path):
    w = weight(64, 64)
    source = save(tmp_path / "source.safetensors", {"l.weight": of_torch(w)})
    a = save(tmp_path / "a.safetensors", bnb4(w).named("l"))
    assert compare(a, a, source).count("=") == 1


def test_files_that_cannot_be_compared(tmp_path):
    a = save(tmp_path / "a.safetensors", bnb4(weight(64, 64)).named("l"))
    other = save(tmp_path / "other.safetensors", bnb4(weight(64, 64)).named("m"))
    with pytest.raises(errors.CheckpointError, match="no quantized weight in common"):
        compare(a, other)
    shape = save(tmp_path / "shape.safetensors", bnb4(weight(32, 64)).named("l"))
    with pytest.raises(errors.CheckpointError, match="different shapes"):
        compare(a, shape)
    with pytest.raises(errors.CheckpointError, match="is missing from"):
        compare(a, a, save(tmp_path / "source.safetensors", {"x.weight": floats(64, 64)}))


def test_a_weight_that_cannot_be_read_is_named_and_the_others_are_compared(files, tmp_path):
    """Not an error: the file is still worth comparing."""
    from small_checkpoints import load, metadata_of

    _, a, b = files
    stored = load(b)
    name = next(name for name in stored if f"{name}.absmax" in stored)
    del stored[f"{name}.absmax"]
    broken = save(tmp_path / "broken.safetensors", stored, {k: v for k, v in metadata_of(b).items() if k != "streamquant"})
    found = compare(a, broken)
    assert list(found.unreadable) == [name]
    assert "cannot be decoded in B" in found.unreadable[name]
    assert found.layers and name not in {layer.key for layer in found.layers}
