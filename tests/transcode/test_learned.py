"""Conversions with learned rounding: what lands in the file is what the algorithm says, whatever cuts it into tiles."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import Watcher, interrupt
from safetensors import safe_open
from small_checkpoints import LEARNED_CHOICES, floats, load, metadata_of, of_values, save

from streamquant import FormatChoice, Recipe, budget, errors, pour, transcode
from streamquant.calibration import Calibration, LayerStatistics
from streamquant.calibration.sketch import probe
from streamquant.checkpoint.mapping import why_no_mapping
from streamquant.formats import FORMATS
from streamquant.kernels import TorchBackend
from streamquant.kernels.refine import refine
from streamquant.report import LayerResult, Report
from streamquant.rounding import LayerHessian
from streamquant.transcode import convert

SHAPES = {
    "blocks.0.qkv": (96, 64),
    "blocks.0.up": (37, 33),
    "blocks.1.qkv": (128, 160),
    "blocks.1.up": (7, 65),
    "blocks.2.qkv": (200, 96),
}


def inputs(columns: int, count: int = 400) -> np.ndarray:
    """What a layer sees: a few loud directions, channels of different size, a mean."""
    random = np.random.default_rng(columns)
    channels = np.exp(random.standard_normal(columns))
    low_rank = random.standard_normal((count, 6)) @ random.standard_normal((6, columns))
    return ((0.4 * random.standard_normal((count, columns)) + low_rank + 0.3) * channels).astype(np.float32)


def statistics(columns: int, dense: bool) -> LayerStatistics:
    seen = inputs(columns)
    moment = seen.T @ seen / len(seen)
    kept = {"hessian": moment} if dense else {"sketch": moment @ probe(columns, min(24, columns), 0)}
    return LayerStatistics(len(seen), seen.mean(0), np.diagonal(moment).copy(), **kept)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    tensors = {f"model.{name}.weight": floats(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    tensors |= {"model.blocks.0.qkv.bias": floats(96, dtype="F32"), "model.blocks.3.zeros.weight": of_values(np.zeros((32, 64)))}
    return save(tmp_path_factory.mktemp("source") / "m.safetensors", tensors)


@pytest.fixture(scope="module", params=["sketch", "dense"])
def mode(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def calibration(mode, tmp_path_factory) -> Path:
    """Knows every layer but one, by names without the checkpoint's prefix."""
    path = tmp_path_factory.mktemp("calibration") / f"{mode}.safetensors"
    known = [name for name in SHAPES if name != "blocks.1.up"]
    layers = {name: statistics(SHAPES[name][1], mode == "dense") for name in known}
    Calibration(layers | {"blocks.3.zeros": statistics(64, mode == "dense")}).save(path)
    return path


def recipe(kind: str, calibration: Path | None, **fields) -> Recipe:
    return Recipe(LEARNED_CHOICES[kind], preset=("none",), calibration=calibration, **fields)


def decoded(path: Path, layer: LayerResult) -> torch.Tensor:
    name = layer.key.removesuffix(".weight")
    with safe_open(path, "pt") as file:
        tensors = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}.")}
    return FORMATS[layer.format](**layer.parameters).decode(tensors, torch.float32)


def output_errors(source: Path, path: Path, report: Report) -> dict[str, float]:
    """Squared error of the outputs for the inputs that were calibrated on, per layer, in float64."""
    found = {}
    with safe_open(source, "pt") as file:
        for layer in report.layers:
            name = layer.key.removeprefix("model.").removesuffix(".weight")
            if name in SHAPES and layer.format != "copy":
                error = (decoded(path, layer) - file.get_tensor(layer.key).float()).double().numpy()
                found[name] = float(np.square(inputs(SHAPES[name][1]) @ error.T).sum())
    return found


@pytest.mark.parametrize("kind", LEARNED_CHOICES)
def test_output_error_falls_on_every_layer_that_was_calibrated(source, calibration, mode, tmp_path, kind):
    rtn = Recipe(FormatChoice(**{**vars_of(LEARNED_CHOICES[kind]), "rounding": "rtn"}), preset=("none",))
    plain = convert(source, tmp_path / "plain.safetensors", rtn)
    learned = convert(source, tmp_path / "learned.safetensors", recipe(kind, calibration, calibration_mode=mode))
    before = output_errors(source, tmp_path / "plain.safetensors", plain)
    after = output_errors(source, tmp_path / "learned.safetensors", learned)
    told = {layer.key: layer for layer in learned.layers}
    for name, shape in SHAPES.items():
        layer = told[f"model.{name}.weight"]
        if name == "blocks.1.up" or layer.format == "copy":
            assert not layer.knowledge.startswith("calibration")
            continue
        assert after[name] < 0.8 * before[name], (name, after[name] / before[name])
        assert layer.knowledge.startswith("calibration (") and "400 inputs" in layer.knowledge
        # The report's estimate is of rows sampled from the layer and of H as the file has it.
        assert layer.output_error_after < layer.output_error_before
        if shape[0] <= 128:
            ratio = (after[name] / before[name]) ** 0.5
            assert layer.output_error_after / layer.output_error_before == pytest.approx(ratio, rel=0.35)
    assert not load(tmp_path / "learned.safetensors")["model.blocks.3.zeros.weight"].data.strip(b"\0\x77"), "zeros stay"


def vars_of(choice: FormatChoice) -> dict:
    return {name: getattr(choice, name) for name in choice.__dataclass_fields__}


@pytest.mark.parametrize("kind", ["int8-row", "fp8-tensor", "nf4"])
def test_codes_are_those_of_the_definition(source, calibration, mode, tmp_path, kind):
    """The file holds what the plain reference makes of the whole layer with the scales that are in the file."""
    report = convert(source, tmp_path / "o.safetensors", recipe(kind, calibration, calibration_mode=mode, calibration_rank=16))
    found = load(tmp_path / "o.safetensors")
    for name in ("blocks.0.qkv", "blocks.1.qkv"):
        (layer,) = [layer for layer in report.layers if layer.key == f"model.{name}.weight"]
        rows, columns = SHAPES[name]
        with safe_open(source, "pt") as file:
            weight = file.get_tensor(layer.key).float()
        feedback = LayerHessian.of(statistics(columns, mode == "dense"), 16, mode == "dense").shrunk().feedback()
        suffix = "weight.absmax" if kind == "nf4" else "weight_scale"
        scale = torch.from_numpy(np.frombuffer(found[f"model.{name}.{suffix}"].data, np.float32).copy())
        group = 64 if kind == "nf4" else columns
        if kind == "nf4" and columns % 64:
            scale, group = scale.repeat_interleave(64)[: rows * columns], 1
        scale = scale.view(-1, 1).expand(rows, 1) if scale.numel() == 1 else scale.view(rows, -1)
        # The encoder multiplies by 448 / absmax, of which the stored scale is the reciprocal, rounded.
        multiplier = 448 / weight.abs().max().expand(rows, 1) if kind == "fp8-tensor" else None
        grid = {"int8-row": "int8", "fp8-tensor": "e4m3", "nf4": "nf4"}[kind]
        column_group = torch.arange(columns) // group
        codes = refine(weight, scale.contiguous(), column_group, feedback, grid, multiplier).codes.numpy().view(np.uint8)
        if kind == "nf4":
            codes = codes.reshape(-1)
            codes = (codes[::2] << 4) | codes[1::2]
        assert codes.tobytes() == found[layer.key].data, name


@pytest.mark.parametrize("kind", ["int8-rotated", "fp8-block", "nf4-double", "fp8-row"])
def test_tiles_threads_resume_and_backend_change_no_byte(source, calibration, tmp_path, monkeypatch, kind):
    path = tmp_path / "o.safetensors"
    wanted = recipe(kind, calibration, sweeps=1)
    convert(source, path, wanted, threads=1)
    whole = path.read_bytes()
    for elements, threads, io in [(700, 2, "mmap"), (3000, 3, "pread")]:
        monkeypatch.setattr(budget, "LEARNED_ELEMENTS", elements)
        convert(source, path, wanted, threads=threads, io=io, force=True)
        assert path.read_bytes() == whole, (elements, threads)
    path.unlink()
    monkeypatch.setattr(budget, "TARGET_TILE_BYTES", 700)
    interrupt(source, path, wanted, tiles=5)
    watcher = Watcher()
    report = convert(source, path, wanted, resume=True, observer=watcher)
    assert path.read_bytes() == whole and report.resumed
    known = [layer for layer in report.layers if layer.knowledge.startswith("calib") and "zeros" not in layer.key]
    assert known and all(layer.output_error_after is not None for layer in known)
    if kind == "int8-rotated":  # a searched scale may differ where two are equally good
        monkeypatch.setattr(pour, "select", TorchBackend)
        convert(source, path, wanted, force=True)
        assert path.read_bytes() == whole


def test_another_calibration_is_another_conversion(source, calibration, tmp_path):
    path = tmp_path / "o.safetensors"
    interrupt(source, path, recipe("int8-row", calibration), tiles=3)
    other = tmp_path / "other.safetensors"
    Calibration({"blocks.0.qkv": statistics(64, False)}).save(other)
    with pytest.raises(errors.ResumeError, match="learned"):
        convert(source, path, recipe("int8-row", other), resume=True)


def test_a_calibration_replaced_after_it_was_hashed_is_an_error(source, calibration, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    path.write_bytes(calibration.read_bytes())
    know = transcode.LayerKnowledge

    def replaced(*arguments):
        """Between the plan, which has the file's hash in it, and the loading."""
        whole = path.read_bytes()
        path.write_bytes(whole)
        os.utime(path, ns=(1, 1))
        return know(*arguments)

    monkeypatch.setattr(transcode, "LayerKnowledge", replaced)
    with pytest.raises(errors.SourceReadError, match=r"c\.safetensors changed after .*convert again"):
        convert(source, tmp_path / "o.safetensors", recipe("int8-row", path))
    assert list(tmp_path.iterdir()) == [path]


def test_a_calibration_changed_while_it_is_used_is_an_error(source, calibration, tmp_path, monkeypatch):
    if why_no_mapping():
        pytest.skip("files are not mapped here: what was loaded is memory of its own")
    path = tmp_path / "c.safetensors"
    path.write_bytes(calibration.read_bytes())
    begin = transcode.open_session

    def changed(*arguments, **named):
        os.utime(path, ns=(1, 1))
        return begin(*arguments, **named)

    monkeypatch.setattr(transcode, "open_session", changed)
    with pytest.raises(errors.SourceReadError, match=r"c\.safetensors changed while"):
        convert(source, tmp_path / "o.safetensors", recipe("int8-row", path))
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("objective", ["svd"])
def test_the_peers_objective_is_there_and_called_by_its_name(source, tmp_path, monkeypatch, objective):
    wanted = recipe("int8-rotated", None, objective=objective)
    path = tmp_path / "o.safetensors"
    report = convert(source, path, wanted)
    assert {layer.knowledge for layer in report.layers if layer.format != "copy"} == {"svd objective"}
    whole = path.read_bytes()
    monkeypatch.setattr(budget, "LEARNED_ELEMENTS", 1)
    convert(source, path, wanted, force=True)
    assert path.read_bytes() == whole, "tiles of one group of rows"


# -- what is known, and said


def test_what_is_not_known_is_said(source, tmp_path):
    watcher = Watcher()
    report = convert(source, tmp_path / "o.safetensors", recipe("nf4", None), observer=watcher)
    assert any("Nothing is known of the inputs of 6 layers" in note for note in watcher.notes)
    assert {layer.knowledge for layer in report.layers if layer.format != "copy"} == {"searched scales"}
    watcher = Watcher()
    simple = Recipe(FormatChoice("nf4", rounding="simple"), preset=("none",))
    harder = convert(source, tmp_path / "simple.safetensors", simple, observer=watcher)
    assert not watcher.notes, "who asks for no learning needs no advice"
    # Less weight error for scales that clip more, which is asked for with --simple alone.
    for careful, searched in zip(report.layers, harder.layers, strict=True):
        assert careful.relative_error is None or searched.relative_error <= careful.relative_error
    absmax = {name: np.frombuffer(tensor.data, np.float32) for name, tensor in load(tmp_path / "o.safetensors").items()
              if name.endswith("absmax")}  # fmt: skip
    plain = Recipe(FormatChoice("nf4", rounding="rtn"), preset=("none",))
    convert(source, tmp_path / "plain.safetensors", plain)
    for name, tensor in load(tmp_path / "plain.safetensors").items():
        if name in absmax:
            assert (absmax[name] >= np.float32(0.9499) * np.frombuffer(tensor.data, np.float32)).all()


@pytest.mark.parametrize(
    ("base", "custom", "words"),
    [
        ("nf4", None, "of 6 layers: rounded to nearest, with searched scales. --calib"),
        ("int8", None, "of 6 layers: rounded to nearest. --calib"),
        ("fp8", "nf4", "of 6 layers: rounded to nearest, 2 of them with searched scales. --calib"),
    ],
)
def test_searched_scales_are_told_of_only_where_they_are(source, tmp_path, base, custom, words):
    layers = r"blocks\.1\." if custom else None
    wanted = Recipe(FormatChoice(base), preset=("none",), custom_layers=layers, custom=custom and FormatChoice(custom))
    watcher = Watcher()
    convert(source, tmp_path / "o.safetensors", wanted, observer=watcher)
    (note,) = (note for note in watcher.notes if note.startswith("Nothing is known"))
    assert words in note


@pytest.mark.parametrize("mode", ["row", "block"])
def test_fp8_keeps_absmax_where_nothing_is_known(source, tmp_path, mode):
    for rounding in ("learned", "rtn"):
        recipe = Recipe(FormatChoice("fp8", mode, 32 if mode == "block" else None, rounding=rounding), preset=("none",))
        convert(source, tmp_path / f"{rounding}.safetensors", recipe)
    assert load(tmp_path / "learned.safetensors") == load(tmp_path / "rtn.safetensors")


@pytest.mark.parametrize(
    ("layers", "fields", "words"),
    [
        ({"blocks.0.qkv": 65}, {}, "has 65 inputs in it, and 64 in the checkpoint"),
        ({"other.0.qkv": 64}, {}, "none of its layers is in this checkpoint"),
        ({"blocks.0.qkv": 64}, {"calibration_mode": "dense"}, "holds sketches"),
        ({"a.blocks.0.qkv": 64, "blocks.0.qkv": 64}, {}, None),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused_before_anything_is_written(source, tmp_path, layers, fields, words):
    path = tmp_path / "c.safetensors"
    Calibration({name: statistics(columns, False) for name, columns in layers.items()}).save(path)
    if words is None:
        convert(source, tmp_path / "o.safetensors", recipe("int8-row", path, **fields))
        return
    with pytest.raises(errors.CalibrationError, match=words):
        convert(source, tmp_path / "o.safetensors", recipe("int8-row", path, **fields))
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_budget_too_small_for_a_dense_h_names_what_is_needed(tmp_path):
    source = save(tmp_path / "m.safetensors", {"a.weight": floats(8, 2048)})
    path = tmp_path / "c.safetensors"
    Calibration({"a": statistics(2048, True)}).save(path)
    wanted = Recipe(FormatChoice("int8"), preset=("none",), calibration=path, calibration_mode="dense")
    with pytest.raises(errors.BudgetError, match=r"give --memory-budget (\d+)MiB"):
        convert(source, tmp_path / "o.safetensors", wanted, memory_budget=256 << 20)
    convert(source, tmp_path / "o.safetensors", wanted, memory_budget=1 << 30)


# -- which rows of INT8 are rotated


def test_rows_are_rotated_where_that_lowers_the_error(tmp_path):
    random = np.random.default_rng(5)
    hot = random.standard_normal((64, 256)) * np.where(np.arange(256) % 40 == 0, 30, 1)
    flat = random.choice([-1.0, 1.0], (64, 256)) * random.uniform(0.9, 1.0, (64, 256))
    source = save(tmp_path / "m.safetensors", {"hot.weight": of_values(hot), "flat.weight": of_values(flat)})
    watcher = Watcher()
    report = convert(source, tmp_path / "o.safetensors", Recipe(FormatChoice("int8"), preset=("none",)), observer=watcher)
    assert any("of 1 layer are rotated" in note and "1 are better" in note for note in watcher.notes), watcher.notes
    rotated = {layer.key: layer.parameters["convrot_group_size"] for layer in report.layers}
    assert rotated == {"hot.weight": 256, "flat.weight": 0}
    header = metadata_of(tmp_path / "o.safetensors")["_quantization_metadata"]
    assert '"flat": {"format": "int8_tensorwise", "per_row": true}' in header and header.endswith(" ")
    found = load(tmp_path / "o.safetensors")
    assert found["flat.comfy_quant"].data.rstrip() == b'{"format": "int8_tensorwise", "per_row": true}'
    assert len(found["flat.comfy_quant"].data) == len(found["hot.comfy_quant"].data)
    errors_of = {}
    for convrot in (True, False):
        forced = Recipe(FormatChoice("int8", convrot=convrot), preset=("none",))
        report = convert(source, tmp_path / "f.safetensors", forced, force=True)
        errors_of[convrot] = {layer.key: layer.relative_error for layer in report.layers}
    assert errors_of[True]["hot.weight"] < 0.3 * errors_of[False]["hot.weight"]
    assert errors_of[False]["flat.weight"] < errors_of[True]["flat.weight"]


def test_comfy_kitchen_decodes_rotated_rows_as_we_do(tmp_path):
    layouts = pytest.importorskip("comfy_kitchen.tensor", reason="needs comfy-kitchen to compare with")
    source = save(tmp_path / "m.safetensors", {"a.weight": floats(48, 512, seed=3)})
    recipe = Recipe(FormatChoice("int8", convrot=True), preset=("none",))
    report = convert(source, tmp_path / "o.safetensors", recipe)
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        codes, scale = file.get_tensor("a.weight"), file.get_tensor("a.weight_scale")
    ours = decoded(tmp_path / "o.safetensors", report.layers[0])
    parameters = layouts.TensorWiseINT8Layout.Params(
        scale=scale, orig_dtype=torch.float32, orig_shape=(48, 512), convrot=True, convrot_groupsize=256
    )
    theirs = layouts.TensorWiseINT8Layout.dequantize(codes, parameters)
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
