"""What a plan decides without reading a weight: candidates, fallbacks, what stays and why, what is left out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_checkpoints import Tensor, floats, noise, of_values, save, save_shards

from streamquant import FormatChoice, Recipe, errors, plan

FP8 = Recipe(FormatChoice("fp8"), preset=("none",))


def decided(tmp_path, tensors: dict[str, Tensor], recipe: Recipe = FP8, metadata=None, **options):
    made = plan(save(tmp_path / "m.safetensors", tensors, metadata), recipe, **options)
    return made, {unit.key: unit for unit in made.units}


# -- candidates


def test_only_two_dimensional_floating_weights_are_candidates(tmp_path):
    tensors = {
        "a.weight": floats(4, 4), "half.weight": floats(4, 4, dtype="F16"), "double.weight": floats(4, 4, dtype="F64"),
        "single.weight": floats(4, 4, dtype="F32"), "a.bias": floats(4), "vector.weight": floats(4),
        "scalar.weight": floats(), "conv.weight": floats(4, 4, 1, 1), "matrix": floats(4, 4),
        "x.weight_v": floats(4, 4),
        "ids.weight": noise("I64", 4, 4), "bool.weight": noise("BOOL", 4, 4), "weight": floats(4, 4),
        "weights": floats(4, 4), "rows.weight": floats(0, 4), "columns.weight": floats(4, 0),
    }  # fmt: skip
    _, units = decided(tmp_path, tensors)
    assert {key for key, unit in units.items() if unit.quantized} == {
        "a.weight",
        "half.weight",
        "double.weight",
        "single.weight",
    }
    assert units["ids.weight"].reason == "not floating point (I64)" and units["rows.weight"].reason == "empty"
    assert all(unit.rule == "not a linear weight" for key, unit in units.items() if not unit.quantized)


def test_every_source_tensor_is_a_unit_or_named_as_removed(tmp_path):
    block = "encoder.block.0.layer.0.SelfAttention"
    tensors = {
        f"{block}.q.weight": floats(8, 8), "shared.weight": floats(8, 8),
        "decoder.block.0.layer.0.SelfAttention.q.weight": floats(8, 8), "lm_head.weight": floats(8, 8),
    }  # fmt: skip
    made, units = decided(tmp_path, tensors, Recipe())
    assert made.architecture == "T5 text encoder" and units.keys() == {f"{block}.q.weight", "shared.weight"}
    assert made.removed.keys() == {"decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"}
    assert all("preset t5xxl" in reason for reason in made.removed.values())
    assert any("2 tensors are left out by preset t5xxl" in note for note in made.notes)


def test_a_pattern_that_finds_only_what_the_preset_removes_is_told_so(tmp_path):
    tensors = {"encoder.block.0.layer.0.SelfAttention.q.weight": floats(8, 8), "decoder.x.weight": floats(8, 8)}
    path = save(tmp_path / "m.safetensors", tensors)
    with pytest.raises(errors.PatternError, match=r"leaves out, such as 'decoder\.x\.weight'"):
        plan(path, Recipe(custom_layers="decoder", custom=FormatChoice("fp8")))


# -- fallbacks


@pytest.mark.parametrize(
    ("choice", "shape", "became", "reason"),
    [
        (FormatChoice("fp8", "block", 32), (64, 96), "float8_e4m3fn_blockwise", None),
        (FormatChoice("fp8", "block", 32), (64, 97), "float8_e4m3fn_rowwise", "64 x 97 is not divisible into blocks"),
        (FormatChoice("fp8", "block", 32), (65, 96), "float8_e4m3fn_rowwise", "row scales (float8_e4m3fn_rowwise)"),
        (FormatChoice("fp8", "block3d", 32), (65, 96), "float8_e4m3fn_block3d", None),
        (FormatChoice("fp8", "block3d", 32), (64, 95), "float8_e4m3fn_rowwise", "95 columns are not divisible"),
        (FormatChoice("int8", "block", 32), (64, 96), "int8_blockwise", None),
        (FormatChoice("int8", "block", 32), (1, 1), "int8_tensorwise", "row scales (int8_tensorwise)"),
        (FormatChoice("nf4"), (1, 1), "bnb_nf4", None),
        (FormatChoice("nf4", heur=True), (64, 128), "bnb_nf4", None),
        (FormatChoice("nf4", heur=True), (63, 128), "copy", "a dimension is below 64 (heur)"),
        (FormatChoice("nf4", heur=True), (65, 128), "copy", "a dimension is not divisible by 64 (heur)"),
        (FormatChoice("fp8", heur=True), (127, 256), "copy", "a dimension is below 128 (heur)"),
        (FormatChoice("int8", "block", 32, heur=True), (64, 96), "int8_blockwise", None),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_fall_back_and_say_why(tmp_path, choice, shape, became, reason):
    _, units = decided(
        tmp_path, {"l.weight": floats(*shape), "other.weight": floats(512, 512)}, Recipe(choice, preset=("none",))
    )
    unit = units["l.weight"]
    assert unit.format.name == became
    assert unit.reason is None if reason is None else reason in unit.reason
    assert units["other.weight"].reason is None


def test_a_fallback_is_written_under_its_own_name(tmp_path):
    """Never a row scale under the block format's name."""
    recipe = Recipe(FormatChoice("int8", "block", 32), preset=("none",))
    made, units = decided(tmp_path, {"l.weight": floats(33, 64)}, recipe)
    assert [(o.suffix, o.shape) for o in units["l.weight"].outputs][:2] == [
        ("weight", (33, 64)),
        ("weight_scale", (33, 1)),
    ]
    (file,) = made.files
    assert b"int8_blockwise" not in file.header.split(b"streamquant")[0]


# -- sources that are quantized already

SCALED = {
    "q.weight": noise("F8_E4M3", 8, 8), "q.weight_scale": of_values(np.float32(0.5), "F32"),
    "q.comfy_quant": Tensor("U8", (27,), b'{"format": "float8_e4m3fn"}'), "q.bias": floats(8, dtype="F32"),
    "i.weight": noise("I8", 8, 8), "i.weight_scale": floats(8, 1, dtype="F32"), "i.input_scale": floats(dtype="F32"),
    "n.weight": noise("U8", 32, 1), "n.weight.absmax": floats(1, dtype="F32"),
    "n.weight.quant_map": floats(16, dtype="F32"),
    "n.weight.nested_absmax": floats(1, dtype="F32"), "n.weight.nested_quant_map": floats(256, dtype="F32"),
    "old.weight": noise("F8_E4M3", 8, 8), "old.scale_weight": floats(1, dtype="F32"),
    "scaled_fp8": floats(2, dtype="F32"),
    "plain.weight": floats(8, 8, dtype="F32"),
}  # fmt: skip


def test_quantized_layers_that_stay_are_copied_and_their_scales_not_cast(tmp_path):
    recipe = Recipe(FormatChoice("fp8"), preset=("none",), cast="BF16", exclude_layers="^[in]$")
    made, units = decided(tmp_path, SCALED, recipe)
    assert {key for key, unit in units.items() if unit.format.name != "copy"} == {"plain.weight", "q.bias"}
    assert units["q.weight"].reason == units["old.weight"].reason == "is float8_e4m3fn already"
    assert units["i.weight"].reason == units["n.weight"].reason == "excluded"
    assert any("4 layers are quantized already and copied" in note for note in made.notes)


def test_layers_asked_for_in_another_format_are_decoded_and_it_is_said(tmp_path):
    made, units = decided(tmp_path, SCALED, Recipe(FormatChoice("nf4"), preset=("none",), exclude_layers="^n$"))
    decoded = {key: unit.decoded.format for key, unit in units.items() if unit.decoded}
    assert decoded == {"q.weight": "float8_e4m3fn", "i.weight": "int8", "old.weight": "float8_e4m3fn"}
    (note,) = [note for note in made.notes if "decoded on the way" in note]
    assert "3 layers are decoded on the way (2 float8_e4m3fn, 1 int8)" in note
    assert not {"q.weight_scale", "q.comfy_quant", "i.input_scale", "old.scale_weight"} & units.keys()
    assert made.removed == {"scaled_fp8": "the spelling of today, in which each layer has a marker of its own"}
    made, _ = decided(tmp_path, SCALED, Recipe(FormatChoice("nf4"), preset=("none",), exclude_layers="^[in]$|^old"))
    assert any("1 layer is decoded on the way (float8_e4m3fn)" in note for note in made.notes), made.notes


@pytest.mark.parametrize("elements", [0, 2])
def test_the_older_spelling_is_written_anew(tmp_path, elements):
    """A list of layers in the header would make ComfyUI overlook the layers of the older spelling."""
    tensors = {key: tensor for key, tensor in SCALED.items() if key.startswith(("old", "plain"))}
    tensors |= {"old.scale_input": floats(1, dtype="F32"), "scaled_fp8": noise("F8_E4M3", elements)}
    made, units = decided(tmp_path, tensors, FP8)
    names = {unit.output_name(output) for unit in units.values() for output in unit.outputs}
    assert {name for name in names if name.startswith("old")} == {
        "old.weight", "old.weight_scale", "old.input_scale", "old.comfy_quant"
    }  # fmt: skip
    marker = {"format": "float8_e4m3fn"} | ({"full_precision_matrix_mult": True} if elements == 2 else {})
    listed = json.loads(json.loads(made.files[0].header[8:])["__metadata__"]["_quantization_metadata"])["layers"]
    assert listed == {"old": marker, "plain": {"format": "float8_e4m3fn"}}


def test_header_entries_of_copied_layers_are_kept_and_of_others_dropped(tmp_path):
    """A header alone can mark a layer; an entry for a layer that is not in the file says something false."""
    listed = {
        "q": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, "gone": {"format": "nvfp4"},
        "i": {"format": "int8_tensorwise"},
    }  # fmt: skip
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": listed}), "other": "kept"}
    tensors = {key: tensor for key, tensor in SCALED.items() if key[0] in "qip" and key != "q.comfy_quant"}
    recipe = Recipe(FormatChoice("fp8"), custom_layers="^i$", custom=FormatChoice("nf4"), preset=("none",))
    made, _ = decided(tmp_path, tensors, recipe, metadata)
    found = json.loads(made.files[0].header[8:])["__metadata__"]
    assert json.loads(found["_quantization_metadata"])["layers"] == {
        "q": listed["q"],
        "plain": {"format": "float8_e4m3fn"},
    }
    assert found["other"] == "kept"
    made, _ = decided(tmp_path, {"plain.weight": floats(8, 8)}, Recipe(FormatChoice("nf4"), preset=("none",)), metadata)
    assert "_quantization_metadata" not in json.loads(made.files[0].header[8:])["__metadata__"]


def test_header_entries_of_every_shard_are_kept(tmp_path):
    one = {"q.weight": SCALED["q.weight"], "q.weight_scale": SCALED["q.weight_scale"]}
    two = {"r.weight": SCALED["q.weight"], "r.weight_scale": SCALED["q.weight_scale"], "plain.weight": floats(8, 8)}
    index = save_shards(tmp_path, one, two)
    for layer, tensors, name in (("q", one, "model-00001-of-00002"), ("r", two, "model-00002-of-00002")):
        marker = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"}}}
        save(tmp_path / f"{name}.safetensors", tensors, {"_quantization_metadata": json.dumps(marker)})
    header = json.loads(plan(index, FP8).files[0].header[8:])["__metadata__"]
    assert json.loads(header["_quantization_metadata"])["layers"].keys() == {"q", "r", "plain"}


@pytest.mark.parametrize(
    "entry", ["", "{", "[]", "1", '{"layers": []}', '{"layers": null}', '{"layers": "q"}', "[" * 99_999]
)
def test_a_header_entry_that_is_no_table_of_layers(tmp_path, entry):
    with pytest.raises(errors.MetadataError, match="_quantization_metadata"):
        decided(tmp_path, {"l.weight": floats(8, 8)}, FP8, {"_quantization_metadata": entry})


def test_a_name_that_would_come_twice(tmp_path):
    with pytest.raises(
        errors.CheckpointError, match=r"already has a tensor 'l\.weight_scale'.*quantized already"
    ) as caught:
        decided(tmp_path, {"l.weight": floats(8, 8), "l.weight_scale": floats(1, dtype="F32")})
    assert caught.value.exit_code == 5


# -- nothing to do


@pytest.mark.parametrize(
    ("tensors", "recipe", "told"),
    [
        ({}, FP8, "no 2-D *.weight tensor"),
        ({"a.bias": floats(4)}, FP8, "no 2-D *.weight tensor"),
        ({"img_in.weight": floats(4, 4)}, Recipe(), "--preset none"),
        ({"a.weight": floats(4, 4)}, Recipe(FormatChoice("keep")), "every candidate stays"),
        ({"q.weight": noise("F8_E4M3", 4, 4), "q.weight_scale": floats(dtype="F32")}, FP8, "1 is float8_e4m3fn already"),
        ({"q.weight": noise("U8", 4, 4)}, FP8, "1 layer is quantized already, in a way that is not known here"),
        ({"a.weight": floats(4, 4)}, Recipe(FormatChoice("keep"), cast="BF16"), "every candidate stays"),
    ],
)  # fmt: skip
def test_nothing_to_convert(tmp_path, tensors, recipe, told):
    with pytest.raises(errors.NothingToConvertError) as caught:
        decided(tmp_path, tensors, recipe)
    assert told in str(caught.value) and caught.value.exit_code == 4


def test_a_cast_alone_is_something_to_convert(tmp_path):
    _, units = decided(
        tmp_path, {"a.weight": floats(4, 4, dtype="F32"), "b": floats(4)}, Recipe(FormatChoice("keep"), cast="BF16")
    )
    assert {key: unit.format.name for key, unit in units.items()} == {"a.weight": "cast", "b": "copy"}


# -- the plan as data


def test_a_plan_reads_no_weight(tmp_path):
    """The data may be a hole: only headers are opened."""
    path = save(tmp_path / "m.safetensors", {"l.weight": floats(64, 64)})
    reads = []
    import builtins

    real = builtins.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", lambda *a, **k: reads.append(a[0]) or real(*a, **k))
        made = plan(path, FP8)
    assert set(map(str, reads)) <= {str(path)}
    assert made.source_bytes == 64 * 64 * 2 and made.output_size == sum(file.size for file in made.files)


def test_one_fingerprint_per_plan(tmp_path):
    path = save(tmp_path / "m.safetensors", {"l.weight": floats(64, 64), "m.weight": floats(64, 64)})
    seen = [
        json.dumps(plan(path, recipe, name=name, shard_size=size).fingerprint(), sort_keys=True)
        for recipe in (FP8, Recipe(FormatChoice("int8"), preset=("none",)))
        for name in ("a.safetensors", "b.safetensors")
        for size in (None, 5000)
    ]
    assert len(set(seen)) == len(seen)
    assert json.dumps(plan(path, FP8, name="a.safetensors").fingerprint(), sort_keys=True) == seen[0]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer.", "net."])
def test_names_keep_their_prefix(tmp_path, prefix):
    made, units = decided(tmp_path, {f"{prefix}blocks.0.qkv.weight": floats(8, 8)})
    listed = json.loads(json.loads(made.files[0].header[8:])["__metadata__"]["_quantization_metadata"])["layers"]
    assert list(listed) == [f"{prefix}blocks.0.qkv"]
    assert {f"{prefix}blocks.0.qkv.{suffix}" for suffix in ("weight", "weight_scale", "comfy_quant")} == set(
        made.placement
    )
