"""What is sound passes: every format, shards, casts, removed tensors, other programs' files, samples."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from broken_outputs import LAYER, broken, change, write_source
from others_layers import EVERY_LAYOUT, Tensor, legacy_float8, of_torch, weight
from small_checkpoints import EVERY_FORMAT, floats, of_values, sample, save, save_shards

import streamquant
from streamquant import FormatChoice, Recipe, errors
from streamquant.calibration import Calibration, LayerStatistics
from streamquant.dequantize import dequantize
from streamquant.verdict import Unwatched
from streamquant.verify import verify


@pytest.mark.parametrize("share", [1.0, 0.05])
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_every_format_we_write(tmp_path, name, share):
    source = save(tmp_path / "source.safetensors", sample())
    output = tmp_path / "output.safetensors"
    report = streamquant.convert(source, output, EVERY_FORMAT[name])
    found = verify(source, output, sample=share)
    assert found.sound, found.findings
    assert found.hashed[0] == found.hashes_known == found.tensors
    assert found.notes == ()
    if share == 1.0:
        ours = {layer.key: layer.relative_error for layer in found.layers}
        theirs = {layer.key: layer.relative_error for layer in report.layers if layer.format not in ("copy", "cast")}
        # A conversion measures its codes, and not what storing absmax in 8 bits adds.
        assert ours == pytest.approx(theirs, rel=1e-2 if "double" in name else 1e-3, abs=1e-7)


# One to a row and one to a layer are scales of blocks too, where a block is as wide as the row or as large as the layer.
@pytest.mark.parametrize("shape", [(2, 128), (1, 128), (128, 128), (129, 128), (256, 256), (3, 1024), (1024, 1), (1024, 1024), (1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("mode", ["fp8 block", "fp8 block3d", "int8 block"])
@pytest.mark.parametrize("block_size", [1, 128, 1024])
def test_blocks_as_large_as_the_layer(tmp_path, shape, mode, block_size):
    kind, mode = mode.split()
    source = save(tmp_path / "source.safetensors", {"a.weight": floats(*shape), "b.weight": floats(2048, 1024, seed=2)})
    output = tmp_path / "output.safetensors"
    recipe = Recipe(FormatChoice(kind, scaling_mode=mode, block_size=block_size, rounding="rtn"), preset=("none",))
    streamquant.convert(source, output, recipe)
    found = verify(source, output)
    assert found.sound, found.findings


@pytest.mark.parametrize("shape", [(1, 1), (1, 128), (128, 1), (2, 128), (64, 64)])
@pytest.mark.parametrize("block_size", [1, 64])
@pytest.mark.parametrize("size", [1e-5, 1e-7, 1e-9])
def test_small_weights_in_blocks_of_any_layer(tmp_path, shape, block_size, size):
    layer = np.random.default_rng(1).standard_normal(shape) * size
    source = save(tmp_path / "source.safetensors", {"a.weight": of_values(layer, "F32")})
    output = tmp_path / "output.safetensors"
    recipe = Recipe(FormatChoice("int8", scaling_mode="block", block_size=block_size, rounding="rtn"), preset=("none",))
    streamquant.convert(source, output, recipe)
    found = verify(source, output)
    assert found.sound, found.findings


@pytest.mark.parametrize("shape", [(512, 1), (1, 512), (32, 16)])
@pytest.mark.parametrize("seed", range(31))
def test_few_values_of_float16_under_one_scale(tmp_path, shape, seed):
    layer = np.random.default_rng(seed).standard_normal(shape) * 1e-7
    source = save(tmp_path / "source.safetensors", {"a.weight": of_values(layer, "F16")})
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, Recipe(FormatChoice("int8", scaling_mode="tensor", rounding="rtn"), preset=("none",)))
    found = verify(source, output)
    assert found.sound, found.findings


@pytest.mark.parametrize("size", [1e-7, 1e-9, 1e-11, 1e-13, 1e-20, 1e-30, 1e-41, 1e30])
@pytest.mark.parametrize("name", [name for name in EVERY_FORMAT if "cast" not in name])
def test_weights_below_the_smallest_scale_and_beyond_what_can_be_squared(tmp_path, name, size):
    """Every format has a smallest scale, below which a layer becomes zeros: that is what the format does, and no fault."""
    layer = np.random.default_rng(5).standard_normal((64, 128)) * size
    source = save(tmp_path / "source.safetensors", {"a.weight": of_values(layer, "F32"), "b.weight": of_values(layer)})
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, EVERY_FORMAT[name])
    found = verify(source, output)
    assert found.sound, found.findings


@pytest.mark.parametrize("largest", range(2, 16))
@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-row", "fp8-e5m2", "nf4", "fp4"])
def test_few_different_weights_are_all_rounded_the_same_way(tmp_path, name, largest):
    """Then the whole layer comes out a little too small or too large, which is no wrong scale."""
    random = np.random.default_rng(largest)
    layer = random.choice([-1, 0, 1, largest - 1, largest], p=[0.05, 0.05, 0.05, 0.8, 0.05], size=(64, 128)) * 2.0**-8
    source = save(tmp_path / "source.safetensors", {"a.weight": of_values(layer, "F16")})
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, EVERY_FORMAT[name])
    found = verify(source, output)
    assert found.sound, found.findings


@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_files_of_other_programs(tmp_path, name):
    w = weight(96, 128)
    source = save(tmp_path / "source.safetensors", {"a.weight": of_torch(w), "a.bias": floats(96)})
    stored = EVERY_LAYOUT[name](w)
    output = save(tmp_path / "output.safetensors", stored.named("a") | {"a.bias": floats(96)})
    found = verify(source, output)
    assert found.sound, found.findings
    relative = float(torch.linalg.norm(stored.decoded - w.float()) / torch.linalg.norm(w.float()))
    assert found.layers[0].relative_error == pytest.approx(relative, rel=1e-3)
    assert found.layers[0].signal_to_noise == pytest.approx(-20 * math.log10(relative), abs=0.01)
    assert found.hashes_known == 0 and "no manifest" in found.notes[0]


def test_a_file_of_the_older_comfyui_kind(tmp_path):
    w = weight(64, 64)
    source = save(tmp_path / "source.safetensors", {"a.weight": of_torch(w)})
    stored = legacy_float8(w).named("a") | {"scaled_fp8": Tensor("F8_E4M3", (2,), b"\0\0")}
    assert verify(source, save(tmp_path / "output.safetensors", stored)).sound


def test_shards_on_either_side(tmp_path):
    tensors = sample()
    names = list(tensors)
    shards = [{name: tensors[name] for name in names[:7]}, {name: tensors[name] for name in names[7:]}]
    index = save_shards(tmp_path / "sharded", *shards)
    whole = save(tmp_path / "whole.safetensors", tensors)
    (tmp_path / "out").mkdir()
    streamquant.convert(index, tmp_path / "out" / "model.safetensors", Recipe(FormatChoice("nf4")), shard_size=20_000)
    output = tmp_path / "out" / "model.safetensors.index.json"
    assert verify(index, output).sound
    found = verify(whole, tmp_path / "out")
    assert found.sound
    assert "made from another file" in found.notes[0], "the same weights in one file are another file"


def test_what_a_preset_leaves_out_is_no_fault(tmp_path):
    keys = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.0.layer.0.SelfAttention.k",
        "decoder.block.0.layer.0.DenseReluDense.wi",
    ]
    tensors = {f"{key}.weight": floats(64, 64, seed=number) for number, key in enumerate(keys)}
    tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = floats(32, 4)
    source = save(tmp_path / "source.safetensors", tensors)
    output = tmp_path / "output.safetensors"
    report = streamquant.convert(source, output, Recipe(FormatChoice("fp8"), preset=("t5xxl",)))
    assert report.removed
    found = verify(source, output)
    assert found.sound and found.removed == dict.fromkeys(report.removed, "preset t5xxl")
    plain = tmp_path / "plain.safetensors"
    streamquant.convert(source, plain, Recipe(FormatChoice("fp8"), preset=("none",)))
    assert verify(source, plain).removed == {}


@pytest.mark.parametrize("objective", ["output", "svd"])
@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_rounding_that_looks_beyond_the_weights_is_no_fault(tmp_path, kind, objective):
    """Learned rounding makes weights worse to make outputs better."""
    source = save(tmp_path / "source.safetensors", {"a.weight": floats(192, 64), "b.weight": floats(64, 256)})
    output = tmp_path / "output.safetensors"
    calibration = None
    if objective == "output":
        calibration = tmp_path / "calibration.safetensors"
        Calibration({name: _seen(columns) for name, columns in (("a", 64), ("b", 256))}).save(calibration)
    recipe = Recipe(
        FormatChoice(kind), calibration=calibration, calibration_mode="dense" if calibration else "sketch", objective=objective,
        sweeps=2,
    )  # fmt: skip
    streamquant.convert(source, output, recipe)
    found = verify(source, output)
    assert found.sound, found.findings


def _seen(columns: int) -> LayerStatistics:
    """Inputs with a few loud directions, which draw errors out of themselves."""
    random = np.random.default_rng(columns)
    seen = random.standard_normal((400, 4)) @ random.standard_normal((4, columns)) + 0.3 * random.standard_normal(
        (400, columns)
    )
    moment = (seen.T @ seen / len(seen)).astype(np.float32)
    return LayerStatistics(len(seen), seen.mean(0).astype(np.float32), np.diagonal(moment).copy(), hessian=moment)


def test_heavy_tails_under_one_scale_are_no_fault(tmp_path):
    values = np.random.default_rng(0).standard_t(2.1, (256, 256))
    source = save(tmp_path / "source.safetensors", {"a.weight": of_values(values)})
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, Recipe(FormatChoice("int8", "tensor", rounding="simple")))
    found = verify(source, output)
    assert found.layers[0].relative_error > 0.1 and found.sound


def _one_outlier_in_each_block(values: np.ndarray) -> None:
    values[100::128, 5::128] = 150 * values.std()


def _one_loud_row(values: np.ndarray) -> None:
    values[133] *= 40


def _from_quiet_to_loud(values: np.ndarray) -> None:
    values *= np.geomspace(0.01, 10, len(values))[:, None]


def _one_loud_column(values: np.ndarray) -> None:
    values[:, 777] *= 100


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("disturb", [_one_outlier_in_each_block, _one_loud_row, _from_quiet_to_loud, _one_loud_column])
@pytest.mark.parametrize("name", [*(name for name in EVERY_FORMAT if "cast" not in name), "int8 64", "int8 320"])
def test_outliers_of_a_layer_that_is_looked_at_in_many_pieces_are_no_fault(tmp_path, name, disturb, share):
    """What one piece of the layer is rounded by, a scale, a block or a rotation, may be owed to another piece."""
    values = np.random.default_rng(1).standard_normal((640, 6400))
    disturb(values)
    source = save(tmp_path / "source.safetensors", {"a.weight": of_values(values)})
    output = tmp_path / "output.safetensors"
    recipe = EVERY_FORMAT.get(name) or Recipe(FormatChoice("int8", "block", block_size=int(name.split()[1]), rounding="rtn"))
    streamquant.convert(source, output, recipe)
    found = verify(source, output, sample=share)
    assert found.sound, found.findings


def test_an_outlier_that_a_sample_does_not_see_is_no_fault(tmp_path):
    """It makes the scale so coarse that hardly any other weight is more than zero."""
    values = np.random.default_rng(1).standard_normal((2048, 1024))
    values[1333, 333] = 700
    source = save(tmp_path / "source.safetensors", {"a.weight": of_values(values)})
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, Recipe(FormatChoice("int8", "tensor", rounding="rtn")))
    found = verify(source, output, sample=0.1)
    assert found.layers[0].relative_error > 0.9 and found.sound, found.findings


def test_one_scale_for_an_outlier_may_cost_most_of_a_layer_that_is_decoded_again(tmp_path):
    values = np.random.default_rng(1).standard_normal((512, 1024))
    values[333, 333] = 400
    source = save(tmp_path / "source.safetensors", {"a.weight": of_values(values)})
    streamquant.convert(source, tmp_path / "int8.safetensors", Recipe(FormatChoice("int8", "tensor", rounding="rtn")))
    dequantize(tmp_path / "int8.safetensors", tmp_path / "output.safetensors")
    found = verify(source, tmp_path / "output.safetensors")
    assert found.layers[0].relative_error > 0.7 and found.sound, found.findings


def test_weights_that_are_not_finite_in_the_source_are_left_out_of_the_judgement(tmp_path):
    values = np.random.default_rng(0).standard_normal((64, 64))
    values[3, 5], values[7, 7] = np.nan, np.inf
    source = save(tmp_path / "source.safetensors", {"a.weight": of_values(values, "F32")})
    for name in ("fp8-tensor", "int8-row"):
        output = tmp_path / f"{name}.safetensors"
        recipe = EVERY_FORMAT[name]
        streamquant.convert(source, output, Recipe(recipe.base, allow_nonfinite=True))
        assert verify(source, output).sound, name


def test_an_already_quantized_source_is_compared_with_what_became_of_it(tmp_path):
    w = weight(64, 128)
    source = save(tmp_path / "source.safetensors", EVERY_LAYOUT["nf4"](w).named("a"))
    assert verify(source, source).sound
    decoded = EVERY_LAYOUT["nf4"](w).decoded
    plain = save(tmp_path / "plain.safetensors", {"a.weight": of_torch(decoded.bfloat16())})
    found = verify(source, plain)
    assert found.sound and found.layers[0].detail == "decoded"
    wrong = save(tmp_path / "wrong.safetensors", {"a.weight": of_torch((decoded * 1.5).bfloat16())})
    assert "1.5 times too large" in verify(source, wrong).findings[0].text


def test_the_verdict_depends_neither_on_threads_nor_on_io(tmp_path):
    source = write_source(tmp_path)
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, Recipe(FormatChoice("nf4", double_quant=True)))
    verdicts = [
        verify(source, output, options=streamquant.transcode.Options(threads=threads, io=io)).layers
        for threads, io in ((1, "mmap"), (3, "pread"))
    ]
    assert verdicts[0] == verdicts[1]


def test_a_sample_reads_part_and_says_so(tmp_path):
    tensors = {"a.weight": floats(4096, 1024)}
    source = save(tmp_path / "source.safetensors", tensors)
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, Recipe(FormatChoice("fp8", rounding="simple")))

    class Watcher(Unwatched):
        nbytes = 0

        def progress(self, name: str, nbytes: int) -> None:
            self.nbytes += nbytes

    watcher = Watcher()
    found = verify(source, output, sample=0.1, watcher=watcher)
    assert found.sound and found.sampled == 0.1
    assert 0 < watcher.nbytes <= 0.2 * len(tensors["a.weight"].data)
    assert found.hashed[0] < found.hashes_known, "large tensors are not hashed in a quick look"


def test_a_fault_in_a_sampled_layer_is_still_found(tmp_path):
    write_source(tmp_path)
    found = broken(
        tmp_path, Recipe(FormatChoice("fp8")), lambda tensors, _: change(tensors, f"{LAYER}.weight_scale", lambda s: s * 3)
    )
    sampled = verify(tmp_path / "source.safetensors", tmp_path / "broken.safetensors", sample=0.01)
    assert [finding.tensor for finding in sampled.findings] == [finding.tensor for finding in found.findings]


def test_stopping_is_an_error_of_its_own(tmp_path):
    source = write_source(tmp_path)
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, Recipe())
    stop = threading.Event()
    stop.set()
    with pytest.raises(errors.InterruptedRunError):
        verify(source, output, stop=stop)


def test_a_damaged_output_is_refused_by_its_header(tmp_path):
    source = write_source(tmp_path)
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, Recipe())
    output.write_bytes(output.read_bytes()[:-10])
    with pytest.raises(errors.TruncatedFileError):
        verify(source, output)


def test_the_verdict_as_json_holds_only_what_json_has(tmp_path):
    import json

    zeros = of_values(np.zeros((64, 64)))
    source = save(tmp_path / "source.safetensors", {"a.weight": zeros, "b.weight": floats(64, 64)})
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, Recipe())
    document = json.dumps(verify(source, output).as_json(), allow_nan=False)
    assert json.loads(document)["sound"] is True
