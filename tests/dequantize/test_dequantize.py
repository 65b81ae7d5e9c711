"""Back to a plain checkpoint: the weights are those that the format, or the other program, decodes to."""

from __future__ import annotations

import errno
import json
import os
import threading

import numpy as np
import pytest
import torch
from others_layers import EVERY_LAYOUT, Tensor, bnb4, legacy_float8, weight
from safetensors.torch import load_file
from small_checkpoints import EVERY_FORMAT, floats, load, metadata_of, noise, sample, save, save_shards

import streamquant
from streamquant import FormatChoice, Recipe, errors
from streamquant.checkpoint import writer
from streamquant.checkpoint.reader import TileReader
from streamquant.dequantize import dequantize
from streamquant.options import Options
from streamquant.verify import verify

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("name", [name for name in EVERY_FORMAT if not name.startswith("cast")])
def test_what_we_write(tmp_path, name):
    tensors = sample()
    source = save(tmp_path / "source.safetensors", tensors, {"modelspec.title": "kept"})
    quantized, plain = tmp_path / "quantized.safetensors", tmp_path / "plain.safetensors"
    streamquant.convert(source, quantized, EVERY_FORMAT[name])
    report = dequantize(quantized, plain, dtype="F32")
    before, after = load(quantized), load(plain)
    assert after.keys() == tensors.keys(), "the names of the original, no scales and no markers"
    assert metadata_of(plain)["modelspec.title"] == "kept" and "_quantization_metadata" not in metadata_of(plain)
    layers = 0
    for key, tensor in after.items():
        if key in before and before[key].dtype == tensors[key].dtype:
            assert tensor == tensors[key], "what was copied is copied"
            continue
        layers += 1
        assert tensor.dtype == "F32" and tensor.shape == tensors[key].shape
    assert layers == sum(report.formats.values()) == len(tensors) - report.copied
    assert verify(quantized, plain).sound, "exactly what it decodes to, and every hash agrees"
    for layer in verify(quantized, plain).layers:
        assert layer.relative_error == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_what_others_write(tmp_path, name, dtype):
    stored = EVERY_LAYOUT[name](weight(96, 128))
    quantized = save(tmp_path / "quantized.safetensors", stored.named("a") | {"a.bias": floats(96)})
    dequantize(quantized, tmp_path / "plain.safetensors", dtype=dtype)
    plain = load_file(tmp_path / "plain.safetensors")
    assert plain.keys() == {"a.weight", "a.bias"} and plain["a.weight"].dtype == DTYPES[dtype]
    exact = not any(word in name for word in ("convrot", "nested", "llm"))
    if exact:
        assert torch.equal(plain["a.weight"], stored.decoded.to(DTYPES[dtype]))
    else:
        torch.testing.assert_close(plain["a.weight"].float(), stored.decoded, rtol=0.01, atol=1e-5)


def test_the_older_comfyui_kind_loses_its_marker(tmp_path):
    stored = legacy_float8(weight(64, 64))
    tensors = stored.named("model.diffusion_model.a") | {"scaled_fp8": Tensor("F8_E4M3", (2,), b"\0\0")}
    dequantize(save(tmp_path / "quantized.safetensors", tensors), tmp_path / "plain.safetensors", dtype="F32")
    plain = load_file(tmp_path / "plain.safetensors")
    assert list(plain) == ["model.diffusion_model.a.weight"]
    assert torch.equal(plain["model.diffusion_model.a.weight"], stored.decoded)


def test_the_dtype_is_the_one_a_layer_was_made_from(tmp_path):
    tensors = bnb4(weight(64, 64).half()).named("half") | bnb4(weight(64, 64).float()).named("single")
    tensors |= EVERY_LAYOUT["float8"](weight(64, 64)).named("unsaid")
    dequantize(save(tmp_path / "quantized.safetensors", tensors), tmp_path / "plain.safetensors")
    dtypes = {key: tensor.dtype for key, tensor in load(tmp_path / "plain.safetensors").items()}
    assert dtypes == {"half.weight": "F16", "single.weight": "F32", "unsaid.weight": "BF16"}


def test_shards_become_one_file(tmp_path):
    index = save_shards(tmp_path / "in", bnb4(weight(64, 64)).named("a"), EVERY_LAYOUT["float8"](weight(32, 64)).named("b"))
    report = dequantize(index, tmp_path / "plain.safetensors")
    assert set(load(tmp_path / "plain.safetensors")) == {"a.weight", "b.weight"}
    assert report.formats == {"bnb_nf4": 1, "float8_e4m3fn": 1}


def test_the_bytes_depend_neither_on_threads_nor_on_io(tmp_path):
    source = save(tmp_path / "source.safetensors", sample())
    streamquant.convert(source, tmp_path / "quantized.safetensors", Recipe(FormatChoice("nf4", double_quant=True)))
    files = []
    for number, (threads, io) in enumerate(((1, "mmap"), (3, "pread"))):
        options = streamquant.options.Options(threads=threads, io=io)
        dequantize(tmp_path / "quantized.safetensors", tmp_path / f"{number}.safetensors", options=options)
        files.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", [None, "F16"])
def test_a_number_that_the_dtype_cannot_hold_is_an_error_with_its_place(tmp_path, dtype):
    stored = EVERY_LAYOUT["float8"](weight(64, 64))
    huge = {"a.weight_scale": Tensor("F32", (), np.float32(1e6 if dtype else np.nan).tobytes())}
    quantized = save(tmp_path / "quantized.safetensors", stored.named("a") | huge)
    with pytest.raises(errors.NonFiniteError, match=r"a\.weight\[\d+, \d+\] decodes to"):
        dequantize(quantized, tmp_path / "plain.safetensors", dtype=dtype)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["quantized.safetensors"], "nothing is left behind"
    dequantize(quantized, tmp_path / "plain.safetensors", dtype=dtype, allow_nonfinite=True)
    assert not torch.isfinite(load_file(tmp_path / "plain.safetensors")["a.weight"]).all()


def test_a_full_disk_is_told_with_what_to_do(tmp_path, monkeypatch):
    """There is no --resume here, and nothing is kept."""
    quantized = save(tmp_path / "quantized.safetensors", bnb4(weight(64, 64)).named("a"))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "write_at", full)
    with pytest.raises(errors.DestinationWriteError, match="No space left on device; nothing is left behind") as caught:
        dequantize(quantized, tmp_path / "plain.safetensors")
    assert "resume" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["quantized.safetensors"]


@pytest.mark.parametrize("io", ["pread", "mmap"])
def test_a_source_that_changes_is_told_without_words_of_what_is_kept(tmp_path, monkeypatch, io):
    quantized = save(tmp_path / "quantized.safetensors", bnb4(weight(64, 64)).named("a"))
    tile = TileReader.tile

    def changed(*arguments):
        os.utime(quantized, ns=(1, 1))
        return tile(*arguments)

    monkeypatch.setattr(TileReader, "tile", changed)
    with pytest.raises(errors.SourceReadError, match="changed while it was being read: start again when nothing writes to it"):
        dequantize(quantized, tmp_path / "plain.safetensors", options=Options(io=io))


def test_refusals(tmp_path):
    plain = save(tmp_path / "plain.safetensors", {"a.weight": floats(8, 8)})
    quantized = save(tmp_path / "quantized.safetensors", bnb4(weight(64, 64)).named("a"))
    with pytest.raises(errors.NothingToConvertError, match="plain checkpoint already"):
        dequantize(plain, tmp_path / "out.safetensors")
    with pytest.raises(errors.OutputExistsError):
        dequantize(quantized, plain)
    with pytest.raises(errors.OutputIsInputError):
        dequantize(quantized, quantized, force=True)
    with pytest.raises(errors.PreflightError):
        dequantize(quantized, tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(errors.UsageError):
        dequantize(quantized, tmp_path / "out.safetensors", dtype="F64")
    foreign = save(tmp_path / "foreign.safetensors", {"a.qweight": noise("I32", 8, 8)})
    with pytest.raises(errors.CheckpointError, match="GPTQ or AWQ"):
        dequantize(foreign, tmp_path / "out.safetensors")
    marked = {"a.weight": noise("I8", 8, 8), "a.comfy_quant": Tensor("U8", (15,), b'{"format": "x"}')}
    with pytest.raises(errors.CheckpointError, match=r"The layer a \(x\) cannot be decoded"):
        dequantize(save(tmp_path / "unknown.safetensors", marked), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_stopping_and_failing_leave_nothing_behind(tmp_path, monkeypatch):
    quantized = save(tmp_path / "quantized.safetensors", bnb4(weight(64, 64)).named("a"))
    stop = threading.Event()
    stop.set()
    with pytest.raises(errors.InterruptedRunError):
        dequantize(quantized, tmp_path / "out.safetensors", stop=stop)
    assert sorted(os.listdir(tmp_path)) == ["quantized.safetensors"]
    monkeypatch.setattr("streamquant.dequantize.round_to_bf16", lambda values: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dequantize(quantized, tmp_path / "out.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["quantized.safetensors"]


def test_a_name_taken_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    quantized = save(tmp_path / "quantized.safetensors", bnb4(weight(64, 64)).named("a"))
    output = tmp_path / "out.safetensors"
    monkeypatch.setattr("streamquant.dequantize.check_disk", lambda *_: output.write_text("precious"))
    with pytest.raises(errors.OutputExistsError, match="appeared meanwhile"):
        dequantize(quantized, output)
    assert output.read_text() == "precious" and sorted(os.listdir(tmp_path)) == ["out.safetensors", "quantized.safetensors"]
    monkeypatch.undo()
    dequantize(quantized, output, force=True)
    assert set(load(output)) == {"a.weight"}


def test_provenance_says_what_it_is(tmp_path):
    quantized = save(tmp_path / "quantized.safetensors", bnb4(weight(64, 64)).named("a"))
    dequantize(quantized, tmp_path / "out.safetensors")
    entry = json.loads(metadata_of(tmp_path / "out.safetensors")["streamquant"])
    assert entry["dequantized"] is True and entry["source"][0]["name"] == "quantized.safetensors"
    assert len(entry["tensor_xxh3_64"]) == 16


@pytest.mark.parametrize("dtype", [None, "F32", "F16"])
@pytest.mark.parametrize("name", ["nf4", "fp8"])
def test_verified_against_the_original_it_is_compared_as_weights(tmp_path, name, dtype):
    tensors = {f"blocks.{block}.linear.weight": floats(128, 128, seed=block) for block in range(3)} | {"norm.weight": floats(64)}
    source = save(tmp_path / "source.safetensors", tensors)
    quantized, plain = tmp_path / "quantized.safetensors", tmp_path / "plain.safetensors"
    streamquant.convert(source, quantized, Recipe(FormatChoice(name)))
    dequantize(quantized, plain, dtype=dtype)
    found, direct = verify(source, plain), verify(source, quantized)
    assert found.sound, found.findings
    for ours, theirs in zip(found.layers, direct.layers, strict=True):
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=0.01)
        assert ours.detail == f"decoded from {theirs.format}"
    assert "holds no quantized layer: 3 of its weights were decoded from" in found.notes[-1]


def test_damage_to_a_decoded_file_or_to_its_copies_stays_a_fault(tmp_path):
    tensors = {"a.weight": floats(128, 128, seed=1), "b.weight": floats(128, 128, seed=2), "norm.weight": floats(64)}
    source = save(tmp_path / "source.safetensors", tensors)
    quantized, plain = tmp_path / "quantized.safetensors", tmp_path / "plain.safetensors"
    streamquant.convert(source, quantized, Recipe(FormatChoice("fp8")))
    dequantize(quantized, plain)
    stored, said = load(plain), metadata_of(plain)
    wrong = save(tmp_path / "wrong.safetensors", stored | {"a.weight": stored["b.weight"]}, said)
    assert {finding.kind for finding in verify(source, wrong).findings} == {"hash", "layer"}
    copies = save(tmp_path / "copies.safetensors", stored | {"norm.weight": floats(64, seed=9)}, said)
    assert {(finding.kind, finding.tensor) for finding in verify(source, copies).findings} == {
        ("hash", "norm.weight"), ("bytes", "norm.weight"),
    }  # fmt: skip
    unsaid = save(tmp_path / "unsaid.safetensors", stored)
    assert {finding.kind for finding in verify(source, unsaid).findings} == {"bytes"}
    entry = json.loads(said["streamquant"])
    for decoded in (None, 3, {"fp8": 3}, {"fp8": [3]}, {"fp8": ["norm"]}):
        odd = save(tmp_path / "odd.safetensors", stored, {"streamquant": json.dumps(entry | {"decoded": decoded})})
        assert not verify(source, odd).sound
