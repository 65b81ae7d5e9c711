"""What a file is taken for: every spelling by its own name, and what is wrong with it said in words."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from others_layers import EVERY_LAYOUT, bnb4, float8, int8_convrot, json_tensor, legacy_float8, mxfp8, nvfp4, plain_cast, weight
from small_checkpoints import Tensor, floats, noise, save

from streamquant import errors, open_checkpoint
from streamquant.stored import Contents, StoredLayer, read_contents
from streamquant.stored.gguf import read_gguf
from streamquant.stored.layouts import geometry
from streamquant.stored.markers import provenance

NAME = "model.diffusion_model.blocks.0.linear"


def contents(tmp_path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Contents:
    return read_contents(open_checkpoint(save(tmp_path / "file.safetensors", tensors, metadata)))


def only(found: Contents) -> StoredLayer:
    (layer,) = found.layers.values()
    return layer


def in_header(name: str, marker: dict) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {name: marker}})}


@pytest.mark.parametrize(
    ("kind", "format_name", "detail", "loads"),
    [
        ("nvfp4", "nvfp4", "groups of 16", "stock ComfyUI"),
        ("mxfp8", "mxfp8", "groups of 32", "stock ComfyUI"),
        ("int8 convrot", "int8_tensorwise", "row scales, rotated by 64", "stock ComfyUI"),
        ("int4 convrot", "convrot_w4a4", "row scales, rotated by 64", "stock ComfyUI"),
        ("float8", "float8_e4m3fn", "tensor scale", "stock ComfyUI"),
        ("float8 e5m2", "float8_e5m2", "tensor scale", "stock ComfyUI"),
        ("fine-grained float8", "float8_e4m3fn", "128 x 128 blocks", "transformers (fine-grained FP8)"),
        ("llm.int8", "bnb_int8", "row scales", "transformers with bitsandbytes"),
        ("nf4", "bnb_nf4", "blocks of 64", "bitsandbytes, diffusers, Forge; ComfyUI with a node pack"),
        ("fp4", "bnb_fp4", "blocks of 128", "bitsandbytes, diffusers, Forge; ComfyUI with a node pack"),
        ("nf4 nested", "bnb_nf4", "blocks of 64, absmax in 8 bits", "bitsandbytes, diffusers, Forge; ComfyUI with a node pack"),
    ],
)
def test_layouts_by_name(tmp_path, kind, format_name, detail, loads):
    stored = EVERY_LAYOUT[kind](weight(256, 128))
    found = contents(tmp_path, stored.named(NAME))
    layer = only(found)
    assert (layer.name, layer.format, layer.detail, layer.faults) == (NAME, format_name, detail, ())
    assert layer.shape == (256, 128)
    assert found.loaders() == loads
    assert found.plain == {}
    assert layer.nbytes == sum(len(tensor.data) for tensor in stored.named(NAME).values())


def test_the_header_alone_marks_a_layer_and_goes_before_its_tensor(tmp_path):
    stored = int8_convrot(weight(64, 64))
    bare = {f"{NAME}.{suffix}": tensor for suffix, tensor in stored.tensors.items()}
    assert only(contents(tmp_path, bare, in_header(NAME, stored.marker))).detail == "row scales, rotated by 64"
    forgetful = in_header(NAME, {"format": "int8_tensorwise"})
    layer = only(contents(tmp_path, stored.named(NAME), forgetful))
    assert layer.detail == "row scales", "ComfyUI believes the header"
    assert "disagree" in layer.faults[0]


def test_a_marker_padded_with_spaces_is_read(tmp_path):
    stored = int8_convrot(weight(64, 64))
    tensors = stored.named(NAME) | {f"{NAME}.comfy_quant": json_tensor(stored.marker, padding=9)}
    assert only(contents(tmp_path, tensors)).detail == "row scales, rotated by 64"


def test_rotation_may_lie_under_params(tmp_path):
    stored = int8_convrot(weight(64, 64))
    marker = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 64}}
    assert only(contents(tmp_path, stored._replace(marker=marker).named(NAME))).detail == "row scales, rotated by 64"


def test_the_older_comfyui_spelling_is_no_fault_in_its_own_kind_of_file(tmp_path):
    stored = legacy_float8(weight(32, 32)).named(NAME)
    marker = {"model.diffusion_model.scaled_fp8": Tensor("F8_E4M3", (2,), b"\0\0")}
    found = contents(tmp_path, stored | marker)
    assert (only(found).format, only(found).faults) == ("float8_e4m3fn", ())
    assert "scaled_fp8" in only(found).detail and found.loaders() == "stock ComfyUI"
    unmarked = only(contents(tmp_path, stored))
    assert "no marker" in unmarked.faults[0]


def test_a_scale_by_the_wrong_name_is_named(tmp_path):
    stored = float8(weight(32, 32)).named(NAME)
    stored[f"{NAME}.scale_weight"] = stored.pop(f"{NAME}.weight_scale")
    layer = only(contents(tmp_path, stored))
    assert "spelled scale_weight where loaders look for weight_scale" in layer.faults[0]
    del stored[f"{NAME}.scale_weight"]
    assert "weight_scale is missing" in only(contents(tmp_path, stored)).faults[0]


def test_row_scales_under_the_name_of_another_mode_are_a_fault(tmp_path):
    rows = Tensor("F32", (32,), np.ones(32, dtype=np.float32).tobytes())
    tensors = {f"{NAME}.weight": noise("F8_E4M3", 32, 64), f"{NAME}.weight_scale": rows}
    for name, fault in (
        ("float8_e4m3fn", "one scale, and it has 32"),
        ("float8_e4m3fn_blockwise", "scales of blocks, and it has one per row"),
        ("float8_e4m3fn_rowwise", None),
    ):
        marker = {"format": name, "group_size": 16} if "block" in name else {"format": name}
        layer = only(contents(tmp_path, tensors | {f"{NAME}.comfy_quant": json_tensor(marker)}))
        assert layer.detail == "row scales"
        assert (fault in layer.faults[0]) if fault else layer.faults == ()


def test_int8_in_the_order_of_a_gpu_s_tiles_is_not_decoded(tmp_path):
    stored = EVERY_LAYOUT["llm.int8"](weight(32, 64)).named(NAME) | {f"{NAME}.weight_format": Tensor("U8", (), b"\2")}
    layer = only(contents(tmp_path, stored))
    assert layer.layout is None and "older bitsandbytes" in layer.faults[0]


def test_a_plain_float8_cast_has_no_scale_and_no_fault(tmp_path):
    layer = only(contents(tmp_path, plain_cast(weight(16, 16)).named(NAME)))
    assert (layer.detail, layer.faults) == ("no scale, a plain cast", ())


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": noise("I8", 8, 8), "comfy_quant": json_tensor({"format": "future_format"})}, "not known here"),
        ({"weight": noise("I8", 8, 8), "comfy_quant": json_tensor({"group_size": 8})}, "names no format"),
        (nvfp4(weight(32, 64)).tensors | {"comfy_quant": json_tensor({"format": "mxfp8"})}, "not those of the format"),
        (mxfp8(weight(32, 64)).tensors | {"comfy_quant": json_tensor({"format": "nvfp4"})}, "not those of the format"),
        (
            nvfp4(weight(32, 64)).tensors | {"comfy_quant": json_tensor({"format": "nvfp4", "orig_shape": [33, 64]})},
            "does not fit its codes",
        ),
        (
            {
                "weight": noise("I8", 8, 8),
                "weight_scale": noise("F32", 3),
                "comfy_quant": json_tensor({"format": "int8_tensorwise"}),
            },
            "does not fit a weight",
        ),
        (
            int8_convrot(weight(64, 64)).tensors
            | {"comfy_quant": json_tensor({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 48})},
            "rotation by groups of 48",
        ),
        (
            {"weight": noise("I8", 1, 4**10), "weight_scale": noise("F32", 1, 1)}
            | {"comfy_quant": json_tensor({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4**10})},
            "rotation by groups of 1048576",  # more than a tile
        ),
        (
            {k: v for k, v in bnb4(weight(64, 64), nested=True).tensors.items() if "nested_quant_map" not in k},
            "what decodes it is missing",
        ),
        (bnb4(weight(64, 64)).tensors | {"weight.absmax": noise("F32", 7)}, "do not hold a weight of [64, 64]"),
        (bnb4(weight(64, 64)).tensors | {"weight": noise("U8", 100, 1)}, "do not hold a weight of [64, 64]"),
    ],
)
def test_what_cannot_be_decoded_says_why_and_stops_nobody_who_only_looks(tmp_path, tensors, words):
    layer = only(contents(tmp_path, {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()}))
    assert layer.layout is None
    assert words in layer.faults[0]


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[1, 2]", b"{", b"[" * 5000])
def test_a_marker_that_is_no_json_object_is_a_fault_of_its_layer(tmp_path, data):
    tensors = float8(weight(8, 8)).named(NAME) | {f"{NAME}.comfy_quant": Tensor("U8", (len(data),), data)}
    layer = only(contents(tmp_path, tensors))
    assert layer.layout is None and "its comfy_quant is not the JSON object" in layer.faults[0]


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"layers": []}', '{"layers": {"a": 1}}'])
def test_malformed_quantization_metadata_is_an_error(tmp_path, text):
    with pytest.raises(errors.MetadataError, match="_quantization_metadata"):
        contents(tmp_path, float8(weight(8, 8)).named(NAME), {"_quantization_metadata": text})


@pytest.mark.parametrize("text", ["{", "[]", '{"tensor_xxh3_64": "12"}', '{"tensor_xxh3_64": "zzzzzzzzzzzzzzzz"}'])
def test_a_malformed_manifest_is_a_fault(tmp_path, text):
    path = save(tmp_path / "file.safetensors", {"a": floats(2)}, {"streamquant": text})
    found = provenance(open_checkpoint(path).files[0].header, str(path))
    assert re.search(r"streamquant|manifest", found.fault) and not found.hashes


def test_layouts_of_other_tools_are_named(tmp_path):
    names = {
        "a.qweight": "GPTQ or AWQ",
        "b.weight._data": "optimum-quanto",
        "c.weight_packed": "compressed-tensors",
        "d.wscales": "nunchaku SVDQuant",
        "e._weight_qdata": "torchao",
    }
    found = contents(tmp_path, {name: noise("U8", 4, 4) for name in names} | {"f.weight": floats(4, 4)})
    assert found.foreign == names and found.layers == {}
    assert "GPTQ or AWQ" in found.loaders()


def test_names_that_only_look_like_scales_stay_what_they_are(tmp_path):
    found = contents(tmp_path, {"norm.input_scale": floats(4), "attn.norm.scale": floats(8), "x.absmax": floats(3)})
    assert found.layers == {} and len(found.plain) == 3


@pytest.mark.parametrize(
    ("shape", "scale", "declared", "expected"),
    [
        ((256, 512), (), 0, (256, 512)),
        ((256, 512), (1,), 0, (256, 512)),
        ((256, 512), (256,), 0, (1, 512)),
        ((256, 512), (256, 1), 0, (1, 512)),
        ((256, 512), (2, 4), 0, (128, 128)),
        ((256, 512), (256, 4, 1), 128, (1, 128)),
        ((130, 320), (2, 3), 0, (128, 128)),
        ((96, 96), (2, 2), 48, (48, 48)),
        ((256, 512), (3,), 0, None),
        ((256, 512), (257, 1), 0, None),
        ((8, 8, 8), (8,), 0, None),
    ],
)
def test_the_extent_of_a_scale(shape, scale, declared, expected):
    assert geometry(shape, scale, declared) == expected


def test_a_gguf_file_is_summarised_and_others_are_not(tmp_path):
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (0).to_bytes(8, "little") + bytes(32)
    (tmp_path / "model.gguf").write_bytes(header)
    found = read_gguf(tmp_path / "model.gguf")
    assert (found.version, found.tensors) == (3, 0)
    assert read_gguf(save(tmp_path / "plain.safetensors", {"a": floats(2)})) is None


def test_the_dtype_a_layer_was_made_from(tmp_path):
    found = contents(tmp_path, bnb4(weight(64, 64).half()).named("a") | nvfp4(weight(32, 32)).named("b"))
    assert (found.layers["a"].origin, found.layers["b"].origin) == ("F16", None)
