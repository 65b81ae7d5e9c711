"""The same model in every guise a file can have: prefixes, markers here or there, shards, other writers' layouts."""

from __future__ import annotations

import json

import pytest
import running
import tiny_flux
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import streamquant
from comfyui_quantops.loader import load_diffusion_model
from streamquant import FormatChoice, Recipe


def check(path, expected_from=None, limit=tiny_flux.EXACT):
    expected = running.reference(expected_from or path)
    assert running.difference(running.output(load_diffusion_model(str(path))), expected) <= limit


def rewrite(path, name, change, metadata=None):
    """A copy of a file, its tensors changed by `change`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() if metadata is None else metadata
    target = path.with_name(name)
    save_file(change(load_file(path)), target, metadata)
    return target


def without_markers(tensors):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".comfy_quant")}


def test_a_prefix_before_every_name(source, headline):
    prefixed = tiny_flux.write(source.with_name("prefixed.safetensors"), load_file(source), tiny_flux.PREFIX)
    converted = tiny_flux.convert(prefixed, tiny_flux.HEADLINE, "headline")
    assert all(key.startswith(tiny_flux.PREFIX) for key in load_file(converted))
    check(converted, headline)


def test_markers_in_the_header_alone(headline):
    check(rewrite(headline, "header-only.safetensors", without_markers), headline)


def test_markers_in_the_header_alone_and_a_prefix(source, headline):
    prefixed = tiny_flux.write(source.with_name("prefixed2.safetensors"), load_file(source), tiny_flux.PREFIX)
    converted = tiny_flux.convert(prefixed, tiny_flux.HEADLINE, "headline")
    check(rewrite(converted, "prefixed-header-only.safetensors", without_markers), headline)


def test_markers_in_the_tensors_alone(headline):
    check(rewrite(headline, "tensors-only.safetensors", dict, metadata={}), headline)


def test_markers_followed_by_spaces(headline):
    def pad(tensors):
        return {
            key: torch.cat([tensor, torch.full((7,), 32, dtype=torch.uint8)]) if key.endswith(".comfy_quant") else tensor
            for key, tensor in tensors.items()
        }

    path = rewrite(headline, "padded.safetensors", pad, metadata={})
    check(path, headline)
    assert running.differing(load_diffusion_model(str(path)), path) == []


def test_legacy_scaled_fp8(source):
    """The layout that older converters write: `scaled_fp8`, `scale_weight`, `scale_input`."""
    fp8 = tiny_flux.convert(source, Recipe(FormatChoice("fp8"), preset=("none",)), "for-legacy")

    def legacy(tensors):
        renamed = {key.replace(".weight_scale", ".scale_weight"): t for key, t in without_markers(tensors).items()}
        renamed["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        renamed["img_in.scale_input"] = torch.tensor(1.0)
        return renamed

    check(rewrite(fp8, "legacy.safetensors", legacy, metadata={}), fp8)


@pytest.mark.parametrize("chosen", [1, 2])
@pytest.mark.parametrize("indexed", [True, False])
def test_any_shard_stands_for_all(source, headline, chosen, indexed, tmp_path):
    target = tmp_path / "sharded.safetensors"
    report = streamquant.convert(source, target, tiny_flux.HEADLINE, shard_size=400_000)
    shards = sorted(path for path in report.outputs if path.suffix == ".safetensors")
    assert len(shards) > 1
    if not indexed:
        next(path for path in report.outputs if path.suffix == ".json").unlink()
    check(shards[chosen - 1], headline)


def test_a_file_that_bitsandbytes_made(source):
    """Quantized and named by bitsandbytes itself, double quantization included; no marker of ours anywhere."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes to compare with")
    tensors = {}
    for number, (key, weight) in enumerate(load_file(source).items()):
        if weight.dim() != 2:
            tensors[key] = weight
            continue
        book = ("nf4", "fp4")[number % 2]
        packed, state = functional.quantize_4bit(weight, quant_type=book, compress_statistics=number % 3 == 0)
        tensors |= {key: packed} | {f"{key}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    path = source.with_name("bitsandbytes.safetensors")
    save_file(tensors, path)
    check(path)
    assert running.differing(load_diffusion_model(str(path)), path) == []


def test_codes_kept_in_wider_words(headline):
    """`bnb_4bit_quant_storage` of other writers: the same bytes under another dtype."""

    def widen(tensors):
        packed = {key.split(".quant_state")[0] for key in tensors if ".quant_state." in key}
        return {key: t.flatten().view(torch.bfloat16).view(-1, 1) if key in packed else t for key, t in tensors.items()}

    path = rewrite(headline, "wide.safetensors", widen)
    check(path, headline)
    assert running.differing(load_diffusion_model(str(path)), path) == []


def test_a_code_book_of_the_files_own(headline):
    """A file's quant_map counts, also where it is not the table that bitsandbytes has built in."""

    def bend(tensors):
        return {key: tensor * 0.5 if key.endswith(".quant_map") else tensor for key, tensor in tensors.items()}

    check(rewrite(headline, "own-book.safetensors", bend))


def test_row_scales_under_a_blocks_name(source):
    """What a widespread converter writes where a layer does not divide into blocks."""
    rows = tiny_flux.convert(source, Recipe(FormatChoice("fp8", "row"), preset=("none",)), "rows")
    marker = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn_blockwise", "group_size": 128}'), dtype=torch.uint8)

    def rename(tensors):
        return {key: marker.clone() if key.endswith(".comfy_quant") else tensor for key, tensor in tensors.items()}

    check(rewrite(rows, "row-scales-as-blocks.safetensors", rename, metadata={}), rows)


def test_rotated_int8_rows(source):
    """INT8 rows stored rotated, as stock ComfyUI reads them, beside NF4."""
    h4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.ones(1, 1)
    for _ in range(3):
        matrix = torch.kron(matrix, h4)
    matrix /= 8.0
    headline = tiny_flux.convert(source, Recipe(FormatChoice("nf4"), comfy_quant=True, preset=("none",)), "for-rotation")
    originals = load_file(source)

    def rotate(tensors):
        for layer in ("double_blocks.0.img_mlp.0", "single_blocks.0.linear2"):
            for key in [key for key in tensors if key.startswith(f"{layer}.")]:
                del tensors[key]
            weight = originals[f"{layer}.weight"]
            rotated = (weight.view(weight.shape[0], -1, 64) @ matrix).view(weight.shape)
            scale = rotated.abs().amax(1, keepdim=True) / 127
            marker = json.dumps(
                {"format": "int8_tensorwise", "per_row": True, "convrot": True, "convrot_groupsize": 64}
            ) + " " * 5  # fmt: skip
            tensors |= {
                f"{layer}.weight": (rotated / scale).round().clamp(-127, 127).to(torch.int8),
                f"{layer}.weight_scale": scale,
                f"{layer}.comfy_quant": torch.frombuffer(bytearray(marker.encode()), dtype=torch.uint8),
            }
        return tensors

    path = rewrite(headline, "rotated.safetensors", rotate, metadata={})
    check(path, limit=tiny_flux.EIGHT_BIT)
    assert running.differing(load_diffusion_model(str(path)), path) == []
