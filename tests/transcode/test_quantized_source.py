"""A source that is quantized already: decoded on the way, as if it had been dequantized to a file first."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conversions import Watcher, files, interrupt, whole
from others_layers import EVERY_LAYOUT, bnb4, float8, json_tensor, legacy_float8, plain_cast, weight
from small_checkpoints import EVERY_FORMAT, Tensor, floats, load, metadata_of, noise, of_values, sample, save

import streamquant
from streamquant import FormatChoice, Recipe, budget, errors
from streamquant.checkpoint.reader import TileReader
from streamquant.dequantize import dequantize
from streamquant.stored import elements, read_contents
from streamquant.transcode import convert
from streamquant.verify import verify

TARGETS = {
    "fp8": FormatChoice("fp8", rounding="rtn"),
    "fp8 blocks": FormatChoice("fp8", "block", 32, rounding="rtn"),
    "int8 rows, rotated": FormatChoice("int8", convrot=True, convrot_group_size=16, rounding="rtn"),
    "int8 rows": FormatChoice("int8"),
    "nf4": FormatChoice("nf4", block_size=128, rounding="rtn"),
    "nf4 nested": FormatChoice("nf4", block_size=32, double_quant=True, rounding="rtn"),
    "nf4 searched": FormatChoice("nf4", block_size=256),
}
OURS = [name for name in EVERY_FORMAT if not name.startswith("cast")]


def weights_of(path) -> dict[str, Tensor]:
    """Codes and scales; the markers name the dtype that a layer was made from, which a detour by float32 changes."""
    return {key: tensor for key, tensor in load(path).items() if "quant_state" not in key and tensor.dtype != "F16"}


def as_by_a_detour(source, tmp_path, recipe: Recipe, **options) -> dict[str, Tensor]:
    dequantize(source, tmp_path / "plain.safetensors", dtype="F32")
    convert(tmp_path / "plain.safetensors", tmp_path / "detour.safetensors", recipe, **options)
    return weights_of(tmp_path / "detour.safetensors")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", OURS)
def test_what_we_wrote_in_any_format_becomes_any_other(tmp_path, name, target):
    quantized = tmp_path / "quantized.safetensors"
    streamquant.convert(save(tmp_path / "source.safetensors", sample()), quantized, EVERY_FORMAT[name])
    recipe = Recipe(TARGETS[target], preset=("none",))
    report = convert(quantized, tmp_path / "out.safetensors", recipe)
    expected = as_by_a_detour(quantized, tmp_path, recipe)
    found = weights_of(tmp_path / "out.safetensors")
    kept = {layer.key.removesuffix(".weight") for layer in report.layers if (layer.reason or "").endswith(" already")}
    assert found.keys() >= {key for key in expected if key.rpartition(".")[0] not in kept}
    for key, tensor in expected.items():
        if not any(key.startswith(f"{layer}.") for layer in kept):
            assert found[key] == tensor, key
    verdict = verify(quantized, tmp_path / "out.safetensors")
    assert verdict.sound, verdict.findings


@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_what_others_wrote(tmp_path, name):
    tensors = EVERY_LAYOUT[name](weight(192, 256)).named("a") | {"a.bias": floats(192)}
    quantized = save(tmp_path / "quantized.safetensors", tensors)
    recipe = Recipe(FormatChoice("int8", "block", 64, rounding="rtn"))
    report = convert(quantized, tmp_path / "out.safetensors", recipe)
    assert weights_of(tmp_path / "out.safetensors") == as_by_a_detour(quantized, tmp_path, recipe)
    assert [layer.decoded_from is not None for layer in report.layers] == [layer.key == "a.weight" for layer in report.layers]
    assert verify(quantized, tmp_path / "out.safetensors").sound


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["fp8-block", "int8-row-rotated", "nf4-double", "fp4"])
def test_tiles_and_interruptions_change_nothing(tmp_path, monkeypatch, name, target):
    quantized = tmp_path / "quantized.safetensors"
    streamquant.convert(save(tmp_path / "source.safetensors", sample()), quantized, EVERY_FORMAT[name])
    recipe = Recipe(TARGETS[target], preset=("none",))
    expected = whole(quantized, tmp_path, recipe)
    monkeypatch.setattr(budget, "TARGET_TILE_BYTES", 512)
    (tmp_path / "small").mkdir()
    out = tmp_path / "small" / "out.safetensors"
    interrupt(quantized, out, recipe, 9, threads=2, io="pread")
    report = convert(quantized, out, recipe, resume=True, threads=3)
    assert report.resumed and files(out.parent) == expected


def test_any_range_decodes_to_the_same(tmp_path):
    dice = np.random.default_rng(0)
    for name, make in EVERY_LAYOUT.items():
        contents = read_contents(str(save(tmp_path / "q.safetensors", make(weight(160, 192)).named("a"))))
        layout = contents.layers["a"].layout
        with TileReader(contents.checkpoint, "pread") as reader:
            every = elements(layout, reader.tile, 0, 160 * 192)
            for _ in range(50):
                begin, end = np.sort(dice.integers(0, 160 * 192 // layout.alignment + 1, 2)) * layout.alignment
                if begin < end:
                    np.testing.assert_array_equal(
                        elements(layout, reader.tile, int(begin), int(end)), every[begin:end], err_msg=name
                    )


def test_dtype_of_the_original_is_what_loaders_are_told(tmp_path):
    tensors = bnb4(weight(64, 64).half()).named("half") | float8(weight(64, 64)).named("unsaid")
    recipe = Recipe(FormatChoice("fp4"), preset=("none",))
    convert(save(tmp_path / "q.safetensors", tensors), tmp_path / "out.safetensors", recipe)
    found = load(tmp_path / "out.safetensors")
    state = ".weight.quant_state.bitsandbytes__fp4"
    assert [json.loads(found[name + state].data)["dtype"] for name in ("half", "unsaid")] == ["float16", "bfloat16"]


def test_what_is_in_the_format_already_stays_byte_for_byte(tmp_path):
    """Encoding it anew could only lose. The older spelling is written as loaders look for it now."""
    older, cast = legacy_float8(weight(64, 64)), plain_cast(weight(64, 64))
    tensors = float8(weight(64, 128)).named("a") | older.named("b") | cast.named("c")
    tensors |= {"scaled_fp8": Tensor("F8_E4M3", (0,), b""), "d.weight": floats(64, 64)}
    recipe = Recipe(FormatChoice("fp8"), preset=("none",))
    source = save(tmp_path / "q.safetensors", tensors)
    convert(source, tmp_path / "out.safetensors", recipe)
    found = load(tmp_path / "out.safetensors")
    for key in ("a.weight", "a.weight_scale", "a.comfy_quant", "b.weight", "c.weight"):
        assert found[key] == tensors[key]
    assert found["b.weight_scale"] == tensors["b.scale_weight"] and "scaled_fp8" not in found
    layers = json.loads(metadata_of(tmp_path / "out.safetensors")["_quantization_metadata"])["layers"]
    assert layers == dict.fromkeys("bd", {"format": "float8_e4m3fn"})
    contents = read_contents(str(tmp_path / "out.safetensors"))
    assert not any(layer.faults for layer in contents.layers.values())
    assert verify(source, tmp_path / "out.safetensors").sound


@pytest.mark.parametrize("nested", [False, True])
def test_4bit_layers_that_stay_are_marked_for_comfyui_if_asked(tmp_path, nested):
    tensors = bnb4(weight(64, 64), nested=nested).named("a") | {"b.weight": floats(64, 64)}
    recipe = Recipe(FormatChoice("nf4", double_quant=nested), preset=("none",), comfy_quant=True)
    convert(save(tmp_path / "q.safetensors", tensors), tmp_path / "out.safetensors", recipe)
    found = load(tmp_path / "out.safetensors")
    assert all(found[key] == tensor for key, tensor in tensors.items() if key != "b.weight")
    assert json.loads(found["a.comfy_quant"].data) == json.loads(found["b.comfy_quant"].data)


@pytest.mark.parametrize(
    ("choice", "stays"),
    [
        (FormatChoice("nf4"), True),
        (FormatChoice("nf4", block_size=128), False),
        (FormatChoice("nf4", double_quant=True), False),
        (FormatChoice("fp4"), False),
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "nf4 in bf16"])
def test_another_block_size_is_another_format(tmp_path, kind, choice, stays):
    tensors = EVERY_LAYOUT[kind](weight(64, 64)).named("a") | {"b.weight": floats(64, 64)}
    report = convert(
        save(tmp_path / "q.safetensors", tensors), tmp_path / "out.safetensors", Recipe(choice, preset=("none",))
    )
    (layer,) = [layer for layer in report.layers if layer.key == "a.weight"]
    assert (layer.format == "copy") == stays and (layer.decoded_from is None) == stays


@pytest.mark.parametrize("fault", ["shape of the scale", "no scale", "unknown format", "state"])
def test_a_layer_that_cannot_be_decoded_is_an_error_unless_it_stays(tmp_path, fault):
    found = float8(weight(64, 64))
    tensors = found.named("a")
    if fault == "shape of the scale":
        tensors["a.weight_scale"] = floats(3, dtype="F32")
    elif fault == "no scale":
        del tensors["a.weight_scale"]
    elif fault == "unknown format":
        tensors["a.comfy_quant"] = json_tensor({"format": "of the future"})
    else:
        tensors = bnb4(weight(64, 64)).named("a")
        tensors["a.weight.quant_state.bitsandbytes__nf4"] = json_tensor({"quant_type": "nf4"})
    source = save(tmp_path / "q.safetensors", tensors | {"b.weight": floats(64, 64)})
    with pytest.raises(errors.CheckpointError, match=r"layer a .*cannot be decoded: .*--exclude-layers"):
        convert(source, tmp_path / "out.safetensors", Recipe(FormatChoice("int8"), preset=("none",)))
    assert not (tmp_path / "out.safetensors").exists()
    recipe = Recipe(FormatChoice("int8"), preset=("none",), exclude_layers="^a$")
    convert(source, tmp_path / "out.safetensors", recipe)
    copied = load(tmp_path / "out.safetensors")
    assert all(copied[key] == tensor for key, tensor in tensors.items())


def test_nan_among_the_codes_is_named(tmp_path):
    codes = np.zeros((8, 8), dtype=np.uint8)
    codes[3, 5] = 0x7F
    tensors = {"a.weight": Tensor("F8_E4M3", (8, 8), codes.tobytes()), "a.weight_scale": of_values(np.float32(1), "F32")}
    tensors["a.comfy_quant"] = json_tensor({"format": "float8_e4m3fn"})
    with pytest.raises(errors.NonFiniteError, match=r"a\.weight\[3, 5\] is nan"):
        convert(save(tmp_path / "q.safetensors", tensors), tmp_path / "out.safetensors", Recipe(FormatChoice("int8")))


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "SCB", "weight_code", "weight.nested_absmax"])
def test_scales_of_what_is_not_known_are_never_cast(tmp_path, suffix):
    tensors = {"u.weight": noise("F8_E4M3FNUZ", 64, 64), f"u.{suffix}": floats(64, dtype="F32"), "a.weight": floats(64, 64)}
    recipe = Recipe(FormatChoice("fp8"), preset=("none",), cast="BF16")
    convert(save(tmp_path / "s.safetensors", tensors), tmp_path / "out.safetensors", recipe)
    assert load(tmp_path / "out.safetensors")[f"u.{suffix}"] == tensors[f"u.{suffix}"]


FOREIGN = {
    "gptq": {"g.qweight": noise("I32", 8, 64), "g.scales": floats(1, 64, dtype="F16"), "g.g_idx": noise("I32", 64)},
    "quanto": {"q.weight._data": noise("I8", 64, 64), "q.weight._scale": floats(64, 1, dtype="F16"), "q.input_scale": floats(dtype="F16")},
    "nunchaku": {"n.qweight": noise("I8", 64, 32), "n.wscales": floats(1, 64, dtype="F16")},
    "quanto 4-bit": {"q.weight._data._data": noise("U8", 64, 64), "q.weight._scale": floats(64, 1, dtype="F16")},
}  # fmt: skip
TOOLS = {
    "gptq": "GPTQ or AWQ", "quanto": "optimum-quanto", "nunchaku": "nunchaku SVDQuant", "quanto 4-bit": "optimum-quanto",
}  # fmt: skip


@pytest.mark.parametrize("tool", FOREIGN)
def test_layers_of_other_tools_are_copied_as_they_are_and_never_cast(tmp_path, tool):
    """Their scales in another dtype would be other weights."""
    tensors = FOREIGN[tool] | {"a.weight": floats(64, 64), "a.bias": floats(64, dtype="F16")}
    watcher = Watcher()
    recipe = Recipe(FormatChoice("fp8"), preset=("none",), cast="BF16")
    convert(save(tmp_path / "s.safetensors", tensors), tmp_path / "out.safetensors", recipe, observer=watcher)
    found = load(tmp_path / "out.safetensors")
    assert {name: found[name] for name in FOREIGN[tool]} == FOREIGN[tool] and found["a.bias"].dtype == "BF16"
    (note,) = [note for note in watcher.notes if "cannot be decoded here, and copied as they are" in note]
    assert note.startswith(f"1 layer is of {TOOLS[tool]}, "), note


@pytest.mark.parametrize("tool", FOREIGN)
def test_a_source_of_another_tool_is_called_by_its_name(tmp_path, tool):
    source = save(tmp_path / "s.safetensors", FOREIGN[tool])
    with pytest.raises(errors.NothingToConvertError, match=f"it was quantized by {TOOLS[tool]}"):
        convert(source, tmp_path / "out.safetensors", Recipe(FormatChoice("fp8"), preset=("none",)))
