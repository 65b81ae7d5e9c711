"""Whatever a file claims: it is described, or refused in a sentence; and what is said to be decodable can be decoded."""

from __future__ import annotations

import json
import math

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_checkpoints import Tensor, save

from streamquant import errors, open_checkpoint
from streamquant.checkpoint.header import DTYPE_BITS
from streamquant.checkpoint.reader import TileReader
from streamquant.inspect import inspect
from streamquant.stored import read_contents, tiles

DTYPES = ["F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "F32", "BF16", "F16", "I32", "BOOL"]
SIZES = st.sampled_from([0, 1, 2, 3, 8, 16, 31, 32, 64, 128, 130])
SHAPES = st.lists(SIZES, max_size=3).map(tuple).filter(lambda shape: math.prod(shape) <= 20_000)
SUFFIXES = [
    "weight_scale", "weight_scale_2", "weight_scale_inv", "scale_weight", "SCB", "weight_format", "input_scale", "weight_code",
    "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
]  # fmt: skip
NAMES = [
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise", "int8_tensorwise", "int8_blockwise", "nvfp4",
    "mxfp8", "hybrid_mxfp8", "convrot_w4a4", "nf4", "bnb_nf4", "unheard_of", 7, None,
]  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-300, 5000), st.floats(), st.text(max_size=3), st.lists(SIZES, max_size=3)
)
FIELDS = ["convrot", "convrot_groupsize", "group_size", "orig_shape", "orig_dtype", "per_row", "params", "shape", "blocksize"]
MARKERS = st.fixed_dictionaries({"format": st.sampled_from(NAMES)}, optional=dict.fromkeys(FIELDS, VALUES))
STATES = st.fixed_dictionaries(
    {"quant_type": st.sampled_from(["nf4", "fp4", 4]), "blocksize": st.sampled_from([64, 32, 1, 7, 0, -64, "64"]),
     "shape": st.one_of(st.tuples(SIZES, SIZES).map(list), VALUES)},
    optional={"dtype": VALUES, "nested_blocksize": st.sampled_from([256, 2, 0, "x"]), "nested_offset": VALUES},
)  # fmt: skip


def of_bytes(data: bytes) -> Tensor:
    return Tensor("U8", (len(data),), data)


@st.composite
def layers(draw) -> dict[str, Tensor]:
    """A weight with anything beside it."""

    def tensor() -> Tensor:
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        return Tensor(dtype, shape, np.random.default_rng(draw(st.integers(0, 9))).bytes(nbytes))

    found = {"l.weight": tensor()}
    for suffix in draw(st.lists(st.sampled_from(SUFFIXES), unique=True, max_size=5)):
        found[f"l.{suffix}"] = tensor()
    if draw(st.booleans()):
        found["l.comfy_quant"] = of_bytes(json.dumps(draw(MARKERS)).encode())
    if draw(st.booleans()):
        book = draw(st.sampled_from(["nf4", "fp4", "other"]))
        found[f"l.weight.quant_state.bitsandbytes__{book}"] = of_bytes(json.dumps(draw(STATES)).encode())
    if draw(st.booleans()):
        found["scaled_fp8"] = Tensor("F8_E4M3", (0,), b"")
    return found


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(layers(), st.one_of(st.none(), MARKERS))
def test_any_file_is_described_or_refused_and_what_is_decodable_decodes(tmp_path_factory, tensors, listed):
    metadata = {} if listed is None else {"_quantization_metadata": json.dumps({"layers": {"l": listed}})}
    path = save(tmp_path_factory.mktemp("any") / "file.safetensors", tensors, metadata)
    try:
        contents = read_contents(open_checkpoint(path))
    except errors.CheckpointError:
        return
    json.dumps(inspect(path).as_json(), allow_nan=False)
    for layer in contents.layers.values():
        assert layer.layout is not None or layer.faults, "what cannot be decoded says why"
        if layer.layout is None:
            continue
        with TileReader(contents.checkpoint) as reader, np.errstate(all="ignore"):
            decoded = sum(layer.layout.decode(reader.tile, begin, end).values.size for begin, end in tiles(layer.shape, 64))
        assert decoded == math.prod(layer.shape)
