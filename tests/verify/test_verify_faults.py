"""Each way in which an output goes wrong is caught and called by its name, and nothing sound is blamed with it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from broken_outputs import LAYER, SIZE, broken, cause, change, mark
from small_checkpoints import Tensor, floats, load, metadata_of, save

import streamquant
from streamquant import FormatChoice, Recipe
from streamquant.verify import verify

FP8 = Recipe(FormatChoice("fp8", rounding="simple"))
FP8_ROWS = Recipe(FormatChoice("fp8", "row", rounding="simple"))
INT8_BLOCKS = Recipe(FormatChoice("int8", "block", 64, rounding="simple"))
INT8_ROWS = Recipe(FormatChoice("int8", "row", rounding="simple", convrot=False))
INT8_ROTATED = Recipe(FormatChoice("int8", "row", rounding="simple", convrot=True))
NF4 = Recipe(FormatChoice("nf4", rounding="simple"))
SCALED = {"fp8": FP8, "fp8 rows": FP8_ROWS, "int8 blocks": INT8_BLOCKS, "int8 rows": INT8_ROWS, "int8 rotated": INT8_ROTATED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("broken")


@pytest.mark.parametrize("recipe", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda scale: 1 / scale, "stored as the reciprocal"),
        (lambda scale: scale * 2, "all of it decodes 2"),
        (lambda scale: scale * 0.9, "times too small"),
        (lambda scale: scale * 1.05, "all of it decodes 1.05 times too large"),
        (lambda scale: -scale, "its signs are inverted"),
        (lambda scale: scale * np.nan, "decode to NaN or infinity"),
        (lambda scale: scale * 0, "nothing but zeros"),
    ],
)
def test_a_wrong_scale(folder, recipe, edit, words):
    found = broken(folder, recipe, lambda tensors, _: change(tensors, f"{LAYER}.weight_scale", edit))
    assert words in cause(found)


@pytest.mark.parametrize("recipe", [FP8_ROWS, INT8_ROWS, INT8_ROTATED], ids=["fp8", "int8", "rotated"])
def test_one_wrong_row_scale_among_many(folder, recipe):
    def edit(scales: np.ndarray) -> np.ndarray:
        scales[100] *= 5
        return scales

    found = cause(broken(folder, recipe, lambda tensors, _: change(tensors, f"{LAYER}.weight_scale", edit)))
    said = re.fullmatch(r"its scales are wrong: 1 of the 256 looked at, the worst by a factor of ([\d.]+)", found)
    assert float(said[1]) == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("recipe", [FP8_ROWS, INT8_ROWS], ids=["fp8", "int8"])
def test_scales_of_other_rows(folder, recipe):
    def edit(scales: np.ndarray) -> np.ndarray:
        return scales[::-1]

    found = broken(folder, recipe, lambda tensors, _: change(tensors, "blocks.0.b.weight_scale", edit))
    assert cause(found, "blocks.0.b") == "its scales are stored in reverse order"


@pytest.mark.parametrize("recipe", SCALED.values(), ids=SCALED)
def test_a_scale_by_the_wrong_name(folder, recipe):
    def edit(tensors, _):
        tensors[f"{LAYER}.scale_weight"] = tensors.pop(f"{LAYER}.weight_scale")

    assert "spelled scale_weight where loaders look for weight_scale" in cause(broken(folder, recipe, edit))


@pytest.mark.parametrize("recipe", SCALED.values(), ids=SCALED)
def test_nothing_but_zeros(folder, recipe):
    found = broken(folder, recipe, lambda tensors, _: change(tensors, f"{LAYER}.weight", np.zeros_like, np.uint8))
    assert cause(found) == "it decodes to nothing but zeros"


@pytest.mark.parametrize("recipe", [FP8, FP8_ROWS, INT8_BLOCKS], ids=["fp8", "fp8 rows", "int8 blocks"])
def test_transposed(folder, recipe):
    def edit(codes: np.ndarray) -> np.ndarray:
        return codes.reshape(SIZE, SIZE).T

    assert (
        cause(broken(folder, recipe, lambda tensors, _: change(tensors, f"{LAYER}.weight", edit, np.uint8)))
        == "it is stored transposed"
    )


@pytest.mark.parametrize("recipe", [*SCALED.values(), NF4], ids=[*SCALED, "nf4"])
def test_the_data_of_another_layer(folder, recipe):
    def edit(tensors, _):
        for name in list(tensors):
            if name.startswith(f"{LAYER}."):
                tensors[name] = tensors[name.replace(LAYER, "blocks.2.b")]

    assert cause(broken(folder, recipe, edit)) == "it holds the weights of blocks.2.b.weight"


def test_rotated_but_not_marked(folder):
    found = broken(folder, INT8_ROTATED, lambda *file: mark(*file, {"format": "int8_tensorwise", "per_row": True}))
    assert cause(found) == "its codes are rotated in groups of 256, but it is not marked so"


def test_marked_but_not_rotated(folder):
    marker = {"format": "int8_tensorwise", "per_row": True, "convrot": True, "convrot_groupsize": 256}
    found = broken(folder, INT8_ROWS, lambda *file: mark(*file, marker))
    assert cause(found) == "it is marked as rotated, but its codes are not"


def test_swapped_nibbles(folder):
    found = broken(folder, NF4, lambda tensors, _: change(tensors, f"{LAYER}.weight", lambda b: (b << 4) | (b >> 4), np.uint8))
    assert "the two codes of every byte are swapped" in cause(found)


def test_the_other_code_book(folder):
    def edit(tensors, _):
        del tensors[f"{LAYER}.weight.quant_map"]
        state = tensors.pop(f"{LAYER}.weight.quant_state.bitsandbytes__nf4")
        tensors[f"{LAYER}.weight.quant_state.bitsandbytes__fp4"] = state._replace(data=state.data.replace(b'"nf4"', b'"fp4"'))

    assert cause(broken(folder, NF4, edit)) == "its codes are NF4, but it is marked FP4"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda absmax: absmax * 3, "all of it decodes 3 times too large"),
        (lambda absmax: absmax * 1.1, "times too large"),
        (lambda absmax: absmax * 0, "nothing but zeros"),
        (lambda absmax: np.roll(absmax, 1), "its scales are shifted by one, each is one behind"),
    ],
)
def test_wrong_absmax(folder, edit, words):
    layer = "blocks.0.b"
    assert words in cause(broken(folder, NF4, lambda tensors, _: change(tensors, f"{layer}.weight.absmax", edit)), layer)


def test_codes_that_are_all_the_same(folder):
    found = broken(folder, NF4, lambda tensors, _: change(tensors, f"{LAYER}.weight", np.zeros_like, np.uint8))
    assert cause(found) == "all its codes are the same"


def test_clipped_weights(folder):
    def edit(tensors, _):
        scale = np.frombuffer(tensors[f"{LAYER}.weight_scale"].data, dtype=np.float32) / 5
        change(tensors, f"{LAYER}.weight", lambda codes: np.clip(codes.astype(np.int32) * 5, -127, 127), np.int8)
        change(tensors, f"{LAYER}.weight_scale", lambda _: scale)

    assert "its weights were clipped" in cause(broken(folder, INT8_ROWS, edit))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda part: part * 0, "256 of the 2,048 rows looked at, 1,024 to 1,279, hold nothing but zeros"),
        (lambda part: part[::-1], "1,024 to 1,279, do not resemble their source"),
    ],
)
def test_a_damaged_part_is_located(tmp_path, edit, words):
    """A stretch of a large layer lost, as a writer that gave up leaves it."""

    def damage(codes: np.ndarray) -> np.ndarray:
        codes[1024 * 1024 : 1280 * 1024] = edit(codes[1024 * 1024 : 1280 * 1024])
        return codes

    source = save(tmp_path / "source.safetensors", {"a.weight": floats(2048, 1024)})
    streamquant.convert(source, tmp_path / "output.safetensors", INT8_ROWS)
    tensors, metadata = load(tmp_path / "output.safetensors"), metadata_of(tmp_path / "output.safetensors")
    metadata.pop("streamquant")
    change(tensors, "a.weight", damage, np.uint8)
    found = verify(source, save(tmp_path / "broken.safetensors", tensors, metadata))
    assert words in cause(found, "a")


def test_weights_from_nowhere(folder):
    def edit(codes: np.ndarray) -> np.ndarray:
        return np.random.default_rng(5).integers(0, 120, codes.size)

    found = broken(folder, INT8_ROWS, lambda tensors, _: change(tensors, f"{LAYER}.weight", edit, np.uint8))
    assert "nothing tried explains how" in cause(found)


def test_a_missing_layer_and_an_extra_one(folder):
    def edit(tensors, _):
        for name in list(tensors):
            if name.startswith(f"{LAYER}."):
                del tensors[name]
        tensors["stray.weight"] = floats(3, 4)

    found = broken(folder, NF4, edit)
    texts = {finding.tensor: finding.text for finding in found.findings}
    assert texts == {
        f"{LAYER}.weight": "it is missing from the output",
        "stray.weight": "it is in the output, but nothing of the source explains it",
    }


def test_a_stray_scale_is_not_overlooked(folder):
    found = broken(folder, FP8, lambda tensors, _: tensors.update({"blocks.9.weight_scale": floats(1, dtype="F32")}))
    assert [finding.tensor for finding in found.findings] == ["blocks.9.weight_scale"]


def test_another_shape(folder):
    def edit(tensors, _):
        codes = tensors[f"{LAYER}.weight"]
        tensors[f"{LAYER}.weight"] = codes._replace(shape=(SIZE // 2, SIZE * 2))

    assert "its shape was [256, 256] and is [128, 512]" in cause(broken(folder, FP8, edit))


def test_a_changed_bias_and_a_bias_of_another_kind(folder):
    def edit(bias: np.ndarray) -> np.ndarray:
        bias[7] ^= 1
        return bias

    name = "blocks.0.a.bias"
    found = broken(folder, FP8, lambda tensors, _: change(tensors, name, edit, np.uint8))
    assert [(finding.tensor, finding.kind) for finding in found.findings] == [(name, "bytes")]
    assert "1 byte differs" in found.findings[0].text
    other = Tensor("I16", (SIZE,), bytes(2 * SIZE))
    found = broken(folder, FP8, lambda tensors, _: tensors.update({name: other}))
    assert "which is no cast" in found.findings[0].text


def test_a_cast_that_rounds_the_wrong_way(folder):
    def edit(values: np.ndarray) -> np.ndarray:
        values[3] += 1
        return values

    recipe = Recipe(FormatChoice("fp8", rounding="simple"), cast="F16")
    found = broken(folder, recipe, lambda tensors, _: change(tensors, "blocks.0.a.bias", edit, np.uint16))
    assert [finding.kind for finding in found.findings] == ["cast"]
    assert "1 of its values" in found.findings[0].text


def test_a_flipped_bit_that_no_error_shows_is_found_by_its_hash(folder):
    def edit(codes: np.ndarray) -> np.ndarray:
        codes[12345] ^= 1
        return codes

    found = broken(folder, INT8_ROWS, lambda tensors, _: change(tensors, f"{LAYER}.weight", edit, np.uint8), keep_manifest=True)
    assert [(finding.kind, finding.tensor) for finding in found.findings] == [("hash", f"{LAYER}.weight")]


def test_what_is_left_of_a_missing_layer_is_not_complained_of_again(folder):
    found = broken(folder, FP8, lambda tensors, _: tensors.pop(f"{LAYER}.weight"))
    assert cause(found) == "it is missing from the output"


WRONG_WAY_ROUND = "says that it was made of this output: name the original first, and second what was made of it"


def test_source_and_output_the_wrong_way_round(folder):
    broken(folder, NF4, lambda *_: None, keep_manifest=True)
    found = verify(folder / "output.safetensors", folder / "source.safetensors")
    assert [finding.text for finding in found.findings] == [f"this source {WRONG_WAY_ROUND}"]


def test_what_was_decoded_back_may_have_the_header_of_the_original(folder):
    """Then nothing is wrong with it, but what was said of it is."""
    broken(folder, INT8_ROWS, lambda *_: None, keep_manifest=True)
    found = verify(folder / "output.safetensors", folder / "source.safetensors")
    assert found.sound and f"The source {WRONG_WAY_ROUND}." in found.notes
    assert not any("made of" in note for note in verify(folder / "source.safetensors", folder / "output.safetensors").notes)
