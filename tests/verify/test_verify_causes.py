"""Causes that the weights alone must tell, for every format: each called by its name, without the help of a manifest."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from broken_outputs import LAYER, SIZE, broken, cause, change, mark, source_tensors, write_source
from small_checkpoints import Tensor, load, metadata_of, of_values, save

import streamquant
from streamquant import FormatChoice, Recipe
from streamquant.verify import verify

RECIPES = {
    "fp8": Recipe(FormatChoice("fp8", rounding="simple")),
    "fp8 rows": Recipe(FormatChoice("fp8", "row", rounding="simple")),
    "fp8 blocks": Recipe(FormatChoice("fp8", "block", 64, rounding="simple")),
    "int8 tensor": Recipe(FormatChoice("int8", "tensor", rounding="simple")),
    "int8 rows": Recipe(FormatChoice("int8", "row", rounding="simple", convrot=False)),
    "int8 rotated": Recipe(FormatChoice("int8", "row", rounding="simple", convrot=True)),
    "int8 blocks": Recipe(FormatChoice("int8", "block", 64, rounding="simple")),
    "nf4": Recipe(FormatChoice("nf4", rounding="simple")),
    "fp4": Recipe(FormatChoice("fp4", rounding="simple")),
    "nf4 nested": Recipe(FormatChoice("nf4", double_quant=True, rounding="simple")),
}
FP8 = [name for name in RECIPES if name.startswith("fp8")]
INT8 = [name for name in RECIPES if name.startswith("int8")]
BYTES = FP8 + INT8
MANY_SCALES = ["fp8 rows", "int8 rows", "int8 rotated"]
BLOCKS = ["fp8 blocks", "int8 blocks"]
BOOKS = ["nf4", "fp4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("causes")


def codes(edit):
    return lambda tensors, _: change(tensors, f"{LAYER}.weight", edit, np.uint8)


def rows(edit):
    """Edit the codes as a matrix of SIZE rows."""
    return codes(lambda flat: edit(flat.reshape(SIZE, -1)).reshape(-1))


def name_of_scales(tensors) -> str:
    return f"{LAYER}.weight_scale" if f"{LAYER}.weight_scale" in tensors else f"{LAYER}.weight.absmax"


def scales(edit):
    return lambda tensors, _: change(tensors, name_of_scales(tensors), edit)


def put(position: int, value: int):
    def edit(flat: np.ndarray) -> np.ndarray:
        flat[position] = value
        return flat

    return codes(edit)


def flip(position: int, bit: int):
    def edit(flat: np.ndarray) -> np.ndarray:
        flat[position] ^= 1 << bit
        return flat

    return codes(edit)


def replaced_rows(first: int, last: int, shift: int):
    def edit(matrix: np.ndarray) -> np.ndarray:
        other = np.roll(matrix, shift, axis=0)
        matrix[first:last] = other[first:last]
        return matrix

    return rows(edit)


def zeros_from(first: int):
    def edit(matrix: np.ndarray) -> np.ndarray:
        matrix[first:] = 0
        return matrix

    return rows(edit)


def scales_of(other: str):
    def edit(tensors, _):
        name = name_of_scales(tensors)
        tensors[name] = tensors[name.replace(LAYER, other)]

    return edit


def scales_as(dtype: str):
    def edit(tensors, _):
        name = name_of_scales(tensors)
        tensors[name] = of_values(np.frombuffer(tensors[name].data, np.float32).reshape(tensors[name].shape), dtype)

    return edit


def dtype_of_codes(dtype: str):
    def edit(tensors, _):
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"]._replace(dtype=dtype)

    return edit


def marker(**fields):
    def edit(tensors, metadata):
        listed = json.loads(metadata["_quantization_metadata"])["layers"][LAYER]
        mark(tensors, metadata, {key: value for key, value in (listed | fields).items() if value is not None})

    return edit


def state(**fields):
    def edit(tensors, _):
        name = next(name for name in tensors if name.startswith(f"{LAYER}.weight.quant_state"))
        data = json.dumps(json.loads(tensors[name].data) | fields).encode()
        tensors[name] = Tensor("U8", (len(data),), data)

    return edit


def without(*suffixes: str):
    def edit(tensors, _):
        for name in [name for name in tensors if name.startswith(f"{LAYER}.") and any(part in name for part in suffixes)]:
            del tensors[name]

    return edit


CHANGED = "further from its source than rounding puts it: it was changed"
FAULTS = [
    ("a sign", BYTES, flip(1000, 7), CHANGED),
    ("a high bit", BYTES, flip(1000, 5), "was changed|were changed|do not resemble their source"),
    ("one code of the largest value", ["int8 rows", "int8 rotated"], put(1000, 0x7F), CHANGED),
    ("an infinity", FP8, put(1000, 0x7F), r"^1 of the 65,536 elements looked at decode to NaN or infinity.*first at \[3, 232\]"),
    ("two codes of a byte", BOOKS, flip(1003, 6), "was changed|were changed"),
    ("one absmax", BOOKS, scales(lambda s: np.where(np.arange(s.size) == 99, 4 * s, s)), "its scales are wrong: 1 of the 4"),
    ("one absmax far off", BOOKS, scales(lambda s: np.where(np.arange(s.size) == 99, 300 * s, s)), "its scales are wrong: 1 of the 1,024"),
    ("rows of an older version", [*BYTES, *BOOKS, "nf4 nested"], replaced_rows(40, 48, 17), "part of it is damaged"),
    ("one row", [*BYTES, *BOOKS], replaced_rows(40, 41, 17), "part of it is damaged"),
    ("zeros at the end", BYTES, zeros_from(240), "hold nothing but zeros"),
    ("scale of 1 %", INT8, scales(lambda s: s * 1.01), r"all of it decodes 1\.01\d* times too large"),
    ("scales behind", [*MANY_SCALES, *BLOCKS, "nf4"], scales(lambda s: np.roll(s, 1)), "shifted by one, each is one behind"),
    ("scales ahead", [*MANY_SCALES, *BLOCKS, "nf4"], scales(lambda s: np.roll(s, -1)), "shifted by one, each is one ahead"),
    ("scales transposed", BLOCKS, scales(lambda s: s.reshape(4, 4).T.reshape(-1)), "its scales are stored transposed"),
    ("scales of another layer", [*MANY_SCALES, *BLOCKS, "nf4"], scales_of("blocks.2.b"), "its scales are those of blocks.2.b"),
    ("absmax as reciprocals", BOOKS, scales(lambda s: 1 / s), "its scales are stored as the reciprocal"),
    ("scales in BF16", BYTES, scales_as("BF16"), "its scale is stored as BF16, where loaders want F32"),
    ("absmax in F16", BOOKS, scales_as("F16"), "its absmax is stored as F16, where loaders want F32"),
    ("transposed", BYTES, rows(lambda m: m.T), "it is stored transposed"),
    ("E5M2", FP8, dtype_of_codes("F8_E5M2"), "its codes are F8_E5M2, where float8_e4m3fn"),
    ("signs of INT8", ["int8 tensor", "int8 rows", "int8 rotated", "int8 blocks"],
     codes(lambda c: np.abs(c.view(np.int8)).view(np.uint8)), "the signs of its weights are lost"),
    ("signs of FP8", FP8, codes(lambda c: c & 0x7F), "the signs of its weights are lost"),
    ("unsigned codes", INT8, codes(lambda c: c ^ 0x80), "its codes are unsigned"),
    ("rows shifted", BYTES, rows(lambda m: np.roll(m, 1, axis=0)), r"its rows are shifted by \+1: row \d+ holds row \d+"),
    ("rows reversed", BYTES, rows(lambda m: m[::-1]), "its rows are in another order: row 0 holds row 255"),
    ("halves exchanged", BYTES, rows(lambda m: np.roll(m, SIZE // 2, axis=0)), "its rows are"),
    ("columns shifted", ["fp8", "fp8 rows", "int8 tensor", "int8 rows"], rows(lambda m: np.roll(m, 5, axis=1)), r"its columns are shifted by \+5"),
    ("codes of another layer", ["fp8 rows", "int8 rows", "nf4"],
     lambda tensors, _: tensors.update({f"{LAYER}.weight": tensors["blocks.2.b.weight"]}),
     "it holds the (weights|codes, but not the scales,) of blocks.2.b.weight"),
    ("a format nobody knows", BYTES, marker(format="float8_e4m3fn_new"), "its format is not known here"),
    ("a format of other codes", FP8, marker(format="int8_blockwise"), "its codes are F8_E4M3, where int8_blockwise has I8"),
    ("blocks of another size", BLOCKS, marker(group_size=32), "its marker says blocks of 32, and its scales are of blocks of 64 x 64"),
    ("another rotation", ["int8 rotated"], marker(convrot_groupsize=64), "rotated in groups of 256, but it is marked with groups of 64"),
    ("rotated FP8", FP8, marker(convrot=True, convrot_groupsize=64), "marked as rotated, which loaders undo for int8_tensorwise only"),
    ("no quant_state", [*BOOKS, "nf4 nested"], without("quant_state"), "its quant_state is missing"),
    ("another block size", BOOKS, state(blocksize=128), r"do not hold a weight of \[256, 256\] in blocks of 128"),
    ("another offset", ["nf4 nested"], state(nested_offset=0.5), r"its nested_offset is wrong: it says 0\.5 where about"),
    ("another quant_map", ["nf4"],
     lambda tensors, _: change(tensors, f"{LAYER}.weight.quant_map", lambda m: np.sort(-np.abs(m))), "its quant_map is not that of NF4"),
    ("no scale", BYTES, without("weight_scale"), "its weight_scale is missing"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "edit", "words"),
    [pytest.param(RECIPES[kind], edit, words, id=f"{name}, {kind}") for name, kinds, edit, words in FAULTS for kind in kinds],
)
def test_it_is_caught_and_called_by_name(folder, recipe, edit, words):
    found = cause(broken(folder, recipe, edit))
    assert re.search(words, found), found


def test_a_damaged_marker_is_a_fault_of_its_layer(folder):
    def edit(tensors, metadata):
        tensors[f"{LAYER}.comfy_quant"] = Tensor("U8", (5,), b'{"for')
        metadata.pop("_quantization_metadata")

    assert "its comfy_quant is not the JSON object" in cause(broken(folder, RECIPES["fp8"], edit))


def test_a_tensor_taken_away_leaves_a_manifest_that_says_so(folder):
    found = broken(folder, RECIPES["fp8"], lambda tensors, _: tensors.pop("blocks.0.a.bias"), keep_manifest=True)
    texts = {finding.tensor: finding.text for finding in found.findings}
    assert texts["blocks.0.a.bias"] == "it is missing from the output"
    assert "its manifest lists the hashes of" in texts[""]


def test_a_bias_of_another_layer_is_named(tmp_path):
    tensors = source_tensors() | {"blocks.1.a.bias": of_values(np.arange(SIZE))}
    source = save(tmp_path / "source.safetensors", tensors)
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, RECIPES["fp8"])
    stored, metadata = load(output), metadata_of(output)
    stored["blocks.0.a.bias"] = stored["blocks.1.a.bias"]
    found = verify(source, save(tmp_path / "broken.safetensors", stored, metadata))
    assert "it should be a copy, and holds the bytes of blocks.1.a.bias" in [finding.text for finding in found.findings]


def test_a_relative_of_the_source_is_said_of_the_file(tmp_path):
    """A fine-tune of the same shape."""
    output = tmp_path / "output.safetensors"
    streamquant.convert(write_source(tmp_path), output, RECIPES["int8 rows"])
    random = np.random.default_rng(0)
    tuned = {}
    for name, tensor in source_tensors().items():
        values = (np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
        tuned[name] = of_values(values + 0.2 * values.std() * random.standard_normal(values.shape))
    found = verify(save(tmp_path / "tuned.safetensors", tuned), output)
    assert found.findings[0].tensor == "" and "another version of the model" in found.findings[0].text
