"""The calibration file: there and back, found under any prefix, merged, and refused when it is not one."""

from __future__ import annotations

import os
import stat

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamquant.calibration import Calibration, CalibrationError, LayerStatistics, load, merge
from streamquant.errors import CheckpointError, DestinationWriteError, SourceMissingError, SourceReadError

N, WIDTH = 12, 5


def layer(count: int = 3, seed: int = 0, dense: bool = False, columns: int = N, **changes) -> LayerStatistics:
    x = np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)
    hessian = x.T @ x / count
    moments = {"hessian": hessian} if dense else {"sketch": hessian[:, :WIDTH].copy()}
    parts = {"count": count, "mean": x.mean(0), "diagonal": np.diagonal(hessian).copy(), **moments}
    return LayerStatistics(**(parts | changes))


def saved(path, **layers):
    Calibration({name.replace("__", "."): value for name, value in layers.items()}).save(path)
    return path


def test_there_and_back(tmp_path):
    original = Calibration({"blocks.0.qkv": layer(seed=1), "out": layer(7, 2, dense=True)}, 0)
    original.save(tmp_path / "c.safetensors")
    read = load(tmp_path / "c.safetensors")
    assert (read.kind, read.seed, set(read.layers)) == ("dense", 0, {"blocks.0.qkv", "out"})
    for name, expected in original.layers.items():
        found = read.layers[name]
        assert found.count == expected.count
        for part in ("mean", "diagonal", "sketch", "hessian"):
            if getattr(expected, part) is None:
                assert getattr(found, part) is None
            else:
                np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"], "no temporary file is left"


def test_safetensors_itself_reads_it(tmp_path):
    path = saved(tmp_path / "c.safetensors", a__b=layer(4))
    with safe_open(path, "np") as file:
        assert file.metadata() == {
            "format": "streamquant-calibration",
            "version": "1",
            "kind": "sketch",
            "seed": "0",
            "keys": "module",
        }
        assert set(file.keys()) == {"a.b.count", "a.b.mean", "a.b.diagonal", "a.b.sketch"}
        assert file.get_tensor("a.b.count") == 4


@pytest.mark.parametrize(
    "asked",
    [
        "blocks.0.attn.qkv", "blocks.0.attn.qkv.weight", "model.diffusion_model.blocks.0.attn.qkv.weight",
        "diffusion_model.blocks.0.attn.qkv", "transformer.blocks.0.attn.qkv", "_orig_mod.module.blocks.0.attn.qkv",
    ],
)  # fmt: skip
@pytest.mark.parametrize("stored", ["blocks.0.attn.qkv", "model.diffusion_model.blocks.0.attn.qkv"])
def test_prefixes_do_not_matter(asked, stored):
    calibration = Calibration({stored: layer(seed=1), "blocks.1.attn.qkv": layer(seed=2)})
    assert calibration.find(asked) is calibration.layers[stored]


def test_a_name_that_is_not_there_is_not_found():
    calibration = Calibration({"blocks.0.qkv": layer()})
    for name in ("qkv", "0.qkv", "blocks.0", "blocks.1.qkv", "other.blocks.0.qkv", "weight", ""):
        assert calibration.find(name) is None


def test_a_name_that_could_be_two_layers_is_an_error():
    calibration = Calibration({"model.a": layer(seed=1), "transformer.a": layer(seed=2)})
    assert calibration.find("model.a.weight") is calibration.layers["model.a"]
    with pytest.raises(CalibrationError, match="model.a, transformer.a"):
        calibration.find("a")


def test_merging_weighs_by_count(tmp_path):
    first, second = layer(3, 1), layer(9, 2)
    paths = [saved(tmp_path / "1", model__a=first, b=layer(5)), saved(tmp_path / "2", a=second, c=layer(6))]
    merged = merge(paths)
    assert set(merged.layers) == {"model.a", "b", "c"}
    both = merged.layers["model.a"]
    assert both.count == 12
    for part in ("mean", "diagonal", "sketch"):
        np.testing.assert_allclose(
            getattr(both, part), (3 * getattr(first, part) + 9 * getattr(second, part)) / 12, rtol=1e-6
        )


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (layer(dense=True), "hessian"),
        (layer(columns=8), "8"),
        (layer(sketch=np.zeros((N, 7), np.float32)), "different ranks"),
    ],
)
def test_what_does_not_fit_is_not_merged(tmp_path, other, match):
    paths = [saved(tmp_path / "1", a=layer()), saved(tmp_path / "2", a=other)]
    with pytest.raises(CalibrationError, match=match) as caught:
        merge(paths)
    assert str(paths[1]) in str(caught.value)


def test_seeds_must_agree():
    with pytest.raises(CalibrationError, match="seeds 0 and 1"):
        Calibration({"a": layer()}).merged(Calibration({"a": layer()}, seed=1))
    with pytest.raises(CalibrationError, match="No calibration files"):
        merge([])


def test_the_summary_says_where_the_energy_lies():
    x = np.random.default_rng(0).standard_normal((50, N)).astype(np.float32)
    x[:, 4] = 30.0
    hessian = (x.T @ x / 50).astype(np.float32)
    row = Calibration({"a": LayerStatistics(50, x.mean(0), np.diagonal(hessian).copy(), hessian=hessian)}).summary()[0]
    assert (row["layer"], row["kind"], row["columns"], row["count"]) == ("a", "hessian", N, 50)
    assert row["top_channel"] == pytest.approx(900 / np.trace(hessian), rel=1e-4)
    assert 0.9 < row["energy_in_mean"] <= 1.0


def spoil(path, change):
    """Rewrite a calibration file by safetensors after `change(tensors, metadata)`."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, m: m.update(format="pt"), "not a calibration file"),
        (lambda t, m: m.update(version="2"), "version 2"),
        (lambda t, m: m.pop("seed"), "seed"),
        (lambda t, m: m.update(seed="-1"), "seed"),
        (lambda t, m: m.update(keys="diffusers"), "naming of keys"),
        (lambda t, m: m.update(kind="dense"), "says it is dense"),
        (lambda t, m: t.pop("a.mean"), "a lacks its mean"),
        (lambda t, m: t.pop("a.sketch"), "either a sketch or a hessian"),
        (lambda t, m: t.update({"a.hessian": torch.eye(N)}), "not both"),
        (lambda t, m: t.update({"a.extra": torch.zeros(1)}), "a.extra .* no place"),
        (lambda t, m: t.update({"mean": torch.zeros(1)}), "no place"),
        (lambda t, m: t.update({"a.count": torch.tensor([3])}), "no place"),
        (lambda t, m: t.update({"a.count": torch.tensor(3, dtype=torch.int32)}), "no place"),
        (lambda t, m: t.update({"a.count": torch.tensor(0)}), "counts 0"),
        (lambda t, m: t.update({"a.mean": torch.zeros(N + 1)}), "shapes disagree"),
        (lambda t, m: t.update({"a.mean": torch.zeros(N, dtype=torch.float16)}), "no place"),
        (lambda t, m: t.update({"a.sketch": torch.zeros(N + 1, WIDTH)}), "shapes disagree"),
        (lambda t, m: t.update({"a.sketch": torch.zeros(N)}), "dimension"),
        (lambda t, m: t.update({"a.diagonal": torch.zeros(N, 1)}), "dimension"),
        (lambda t, m: t.update({"a.diagonal": -torch.ones(N)}), "below zero"),
        (lambda t, m: t["a.sketch"].__setitem__((2, 2), torch.nan), "NaN or infinity"),
        (lambda t, m: t["a.mean"].__setitem__(0, torch.inf), "NaN or infinity"),
    ],
)
def test_malformed_files_are_refused_by_name(tmp_path, change, match):
    path = saved(tmp_path / "bad.safetensors", a=layer())
    spoil(path, change)
    with pytest.raises(CalibrationError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 10


def test_files_that_are_not_safetensors_are_refused(tmp_path):
    with pytest.raises(SourceMissingError):
        load(tmp_path / "nothing")
    path = saved(tmp_path / "cut", a=layer())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError):
        load(path)
    with pytest.raises(CalibrationError, match="not a calibration"):
        save_file({"a": torch.zeros(1)}, tmp_path / "weights")
        load(tmp_path / "weights")


def test_what_cannot_be_saved_leaves_nothing(tmp_path):
    with pytest.raises(CalibrationError, match="NaN"):
        saved(tmp_path / "c", a=layer(mean=np.full(N, np.nan, np.float32)))
    with pytest.raises(DestinationWriteError):
        saved(tmp_path / "no folder" / "c", a=layer())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs the permissions of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o002, 0o664)])
def test_a_file_may_be_read_by_whom_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        path = saved(tmp_path / "c.safetensors", a=layer())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_that_is_loaded_may_be_added_to(tmp_path):
    """What is saved is still mapped from the file that it replaces."""
    path = saved(tmp_path / "c.safetensors", a=layer())
    before = load(path)
    before.merged(Calibration({"b": layer()})).save(path)
    after = load(path)
    assert set(after.layers) == {"a", "b"}
    np.testing.assert_array_equal(after.layers["a"].sketch, before.layers["a"].sketch)


def test_a_file_without_layers_is_refused(tmp_path):
    Calibration().save(tmp_path / "c.safetensors")
    with pytest.raises(CalibrationError, match="holds no layer"):
        load(tmp_path / "c.safetensors")


def test_a_file_that_changes_between_loading_and_merging_is_never_saved(tmp_path):
    path = saved(tmp_path / "c.safetensors", a=layer(columns=2000))
    loaded = load(path).merged(Calibration({"b": layer()}))
    if not loaded.readers:
        pytest.skip("files are not mapped here: what was loaded is memory of its own")
    with open(path, "r+b") as file:
        file.truncate(4096)
    with pytest.raises(SourceReadError, match="changed while|truncated"):
        loaded.save(tmp_path / "merged.safetensors")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_let_go_with_the_last_array_of_it(tmp_path):
    path = saved(tmp_path / "c.safetensors", a=layer())
    before = psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0
    calibration = load(path)
    sketch = calibration.layers["a"].sketch
    expected = sketch.copy()
    del calibration
    np.testing.assert_array_equal(sketch, expected)
    del sketch
    assert not hasattr(psutil.Process, "num_fds") or psutil.Process().num_fds() == before
