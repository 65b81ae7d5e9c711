"""The plan against the file, for random checkpoints and recipes: every byte of the header, every size, every offset."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
import xxhash
from conversions import Watcher
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from small_checkpoints import EVERY_FORMAT, SEARCHED_FORMATS, Tensor, floats, load, metadata_of, noise, sample, save

import streamquant
from streamquant import FormatChoice, Recipe, budget, errors
from streamquant.checkpoint.header import DTYPE_BITS
from streamquant.output_file import HASH_DIGITS
from streamquant.plan import Plan, plan
from streamquant.transcode import convert

names = st.sampled_from(
    ["blocks.0.attn.qkv.weight", "blocks.0.mlp.weight", "blocks.1.qkv.weight", "z.weight", "weight", ".weight",
     "a.bias",
     "model.diffusion_model.blocks.3.weight", "img_in.weight", "norm.weight", "é.weight", "a b.weight", "scale",
     "blocks.2.qkv.weight", "blocks.0.attn.qkv.weight_norm", "x.weight.weight"]
)  # fmt: skip
dimensions = st.sampled_from([0, 1, 2, 3, 5, 16, 31, 32, 33, 63, 64, 65, 96, 128])
shapes = st.one_of(
    st.tuples(dimensions, dimensions),
    st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=4).map(tuple),
)


@st.composite
def tensors(draw) -> Tensor:
    shape, seed = draw(shapes), draw(st.integers(0, 9))
    if draw(st.booleans()):
        return floats(*shape, dtype=draw(st.sampled_from(["BF16", "F16", "F32", "F64"])), seed=seed)
    dtype = draw(st.sampled_from(list(DTYPE_BITS)))
    if dtype in ("BF16", "F16", "F32", "F64"):
        return floats(*shape, dtype=dtype, seed=seed)
    return noise(dtype, *shape, *((4,) if DTYPE_BITS[dtype] < 8 else ()), seed=seed)


weights = st.builds(
    lambda rows, columns, dtype, seed: floats(rows, columns, dtype=dtype, seed=seed),
    dimensions.filter(bool), dimensions.filter(bool), st.sampled_from(["BF16", "F16", "F32", "F64"]), st.integers(0, 9),
)  # fmt: skip
# What the recipes' expressions find is always there; what else there is may be anything.
checkpoints = st.builds(
    lambda candidates, others: others | candidates,
    st.fixed_dictionaries(
        dict.fromkeys(["blocks.0.attn.qkv.weight", "blocks.3.mlp.weight", "img_in.weight", "z.weight"], weights)
    ),
    st.dictionaries(names, tensors(), max_size=6),
)
FORMATS = EVERY_FORMAT | SEARCHED_FORMATS
roundings = st.sampled_from(["learned", "simple", "rtn"])
choices = st.one_of(
    st.builds(
        FormatChoice, st.just("fp8"), st.sampled_from([None, "tensor", "row", "block", "block3d"]),
        st.sampled_from([None, 1, 3, 16, 32]),
    ),
    st.builds(FormatChoice, st.just("fp8_e5m2")),
    st.builds(
        FormatChoice, st.just("int8"), st.sampled_from([None, "tensor", "row", "block"]),
        st.sampled_from([None, 1, 5, 32]), rounding=roundings,
    ),
    st.builds(
        FormatChoice, st.just("int8"), convrot=st.sampled_from([None, True]), rounding=roundings,
        convrot_group_size=st.sampled_from([None, 4, 16]),
    ),
    st.builds(
        FormatChoice, st.sampled_from(["nf4", "fp4"]), st.none(), st.sampled_from([None, 32, 64, 4096]), st.booleans(),
        rounding=roundings, heur=st.booleans(),
    ),
    st.just(FormatChoice("keep")),
)  # fmt: skip


@st.composite
def recipes(draw) -> Recipe:
    custom = draw(st.none() | choices)
    config = draw(st.lists(st.tuples(st.sampled_from(["mlp", "qkv", r"\.3\.", "^z"]), choices), max_size=2))
    return Recipe(
        draw(choices if custom or config else choices.filter(lambda choice: choice.kind != "keep")),
        draw(st.sampled_from(["qkv", "blocks", "z"])) if custom else None,
        custom,
        draw(st.none() | st.sampled_from(["img_in", "mlp"])),
        tuple(config),
        draw(st.sampled_from([("auto",), ("none",), ("flux2", "t5xxl")])),
        draw(st.booleans()),
        draw(st.sampled_from([None, "BF16", "F16"])),
        allow_nonfinite=True,  # some of the sources are FP8 already, of random codes, and NaN is one of them
    )


def written_header(raw: bytes, planned) -> bytes:
    """The file's header with zeros where the hashes are, as it is planned."""
    header = bytearray(raw[: len(planned.header)])
    digits = HASH_DIGITS * len(planned.tensors)
    header[planned.hash_offset : planned.hash_offset + digits] = b"0" * digits
    return bytes(header)


def check(folder: Path, made: Plan, source: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Everything the plan promises of the files in `folder`."""
    expected = {file.name for file in made.files} | ({made.index_name} if made.index_name else set())
    assert {path.name for path in folder.iterdir()} == expected
    for planned in made.files:
        raw = (folder / planned.name).read_bytes()
        assert len(raw) == planned.size and written_header(raw, planned) == planned.header
        found, header = load(folder / planned.name), metadata_of(folder / planned.name)
        assert [(i.name, i.dtype, i.shape) for i in planned.tensors] == [
            (n, t.dtype, t.shape) for n, t in found.items()
        ]
        check_metadata(header, found, made, metadata)
        check_safetensors_opens(folder / planned.name, found)
    check_units(folder, made, source)


def check_metadata(header: dict[str, str], found: dict[str, Tensor], made: Plan, metadata: dict[str, str]) -> None:
    assert header.items() >= metadata.items()
    provenance = json.loads(header["streamquant"])
    assert (provenance["tool"], provenance["version"]) == ("streamquant", streamquant.__version__)
    assert provenance["recipe"] == json.loads(json.dumps(made.recipe.describe()))
    (file,) = made.checkpoint.files
    assert provenance["source"] == [{"name": file.path.name, "header_sha256": file.header.sha256}]
    assert provenance["tensor_xxh3_64"] == "".join(xxhash.xxh3_64_hexdigest(tensor.data) for tensor in found.values())
    markers = {
        name.removesuffix(".comfy_quant"): json.loads(t.data)
        for name, t in found.items()
        if name.endswith(".comfy_quant")
    }
    listed = json.loads(header.get("_quantization_metadata", '{"layers": {}}'))["layers"]
    assert listed == {layer: marker for layer, marker in markers.items() if not marker["format"].startswith("bnb_")}
    assert made.recipe.comfy_quant or listed == markers


def check_safetensors_opens(path: Path, found: dict[str, Tensor]) -> None:
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(found)
        for name, tensor in found.items():
            if tensor.dtype in ("BF16", "F16", "F32", "I8", "F8_E4M3", "U8", "I64") and tensor.data:
                assert file.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes() == tensor.data


def check_units(folder: Path, made: Plan, source: dict[str, Tensor]) -> None:
    """Every source tensor is there as the plan says, or named as removed; what is copied is byte-identical."""
    output = {}
    for planned in made.files:
        output |= load(folder / planned.name)
    assert {tensor.name for unit in made.units for tensor in unit.sources} | made.removed.keys() == set(source)
    promised = {made_output: unit for unit in made.units for made_output in map(unit.output_name, unit.outputs)}
    assert promised.keys() == output.keys()
    for unit in made.units:
        if unit.format.name == "copy":
            assert output[unit.key] == source[unit.key]
        assert made.output_bytes(unit) == sum(len(output[unit.output_name(part)].data) for part in unit.outputs)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    checkpoints,
    recipes(),
    st.none() | st.integers(1, 20_000),
    st.dictionaries(st.text('ab ü"\\\n', max_size=4), st.text(max_size=9), max_size=2),
    st.sampled_from([512, 1 << 23]),
)
def test_the_file_is_what_was_planned(source, recipe, shard_size, metadata, tile_bytes):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "TARGET_TILE_BYTES", tile_bytes)
        path = save(Path(folder) / "m.safetensors", source, metadata)
        out = Path(folder) / "out"
        out.mkdir()
        try:
            made = plan(path, recipe, name="o.safetensors", shard_size=shard_size)
        except (errors.PatternError, errors.NothingToConvertError, errors.CheckpointError):
            assume(False)
        watcher = Watcher()
        convert(path, out / "o.safetensors", recipe, shard_size=shard_size, threads=2, observer=watcher)
        check(out, as_poured(made, watcher.plan), source, metadata)


def as_poured(planned: Plan, poured: Plan) -> Plan:
    """The plan that was poured: which rows of INT8 are rotated is decided after the layout, which it cannot change."""
    assert poured.placement == planned.placement
    assert [(file.name, file.size, file.tensors) for file in poured.files] == [
        (file.name, file.size, file.tensors) for file in planned.files
    ]
    return poured


@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize("shard_size", [None, 40_000])
def test_the_sample_in_every_format_is_what_was_planned(tmp_path, recipe, shard_size):
    path = save(tmp_path / "m.safetensors", sample(), {"modelspec.title": "ü"})
    made = plan(path, FORMATS[recipe], name="o.safetensors", shard_size=shard_size)
    (tmp_path / "out").mkdir()
    watcher = Watcher()
    out = tmp_path / "out" / "o.safetensors"
    convert(path, out, FORMATS[recipe], shard_size=shard_size, observer=watcher)
    check(tmp_path / "out", as_poured(made, watcher.plan), sample(), {"modelspec.title": "ü", "format": "pt"})


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_every_dtype_passes_through_byte_for_byte(tmp_path, io):
    """Also those of less than a byte and those that torch does not know; as vectors, matrices, scalars, nothing."""
    tensors = {"blocks.0.qkv.weight": floats(8, 8)}
    for tag in DTYPE_BITS:
        last = () if DTYPE_BITS[tag] >= 8 else (4,)
        for shape in [(3, 5), (7,), (), (0, 2), (2, 3, 4)]:
            tensors[f"{tag}.{len(shape)}.{'x'.join(map(str, shape))}"] = noise(tag, *shape, *last, seed=len(tensors))
        if tag not in ("BF16", "F16", "F32", "F64"):
            tensors[f"{tag}.weight"] = noise(tag, 4, 4, *last, seed=len(tensors))
    path = save(tmp_path / "m.safetensors", tensors)
    convert(path, tmp_path / "o.safetensors", Recipe(FormatChoice("int8"), exclude_layers="^F8"), io=io)
    found = load(tmp_path / "o.safetensors")
    for name, tensor in tensors.items():
        assert name == "blocks.0.qkv.weight" or found[name] == tensor, name
    with contextlib.ExitStack() as stack:
        assert set(stack.enter_context(safe_open(tmp_path / "o.safetensors", "pt")).keys()) == set(found)
