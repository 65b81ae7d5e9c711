"""NF4 and FP4 layers, byte for byte what bitsandbytes writes, and decoded bit for bit as it decodes."""

from __future__ import annotations

import json

import bitsandbytes_oracle
import pytest
import torch
from encode_whole import encode_whole
from hypothesis import given
from hypothesis import strategies as st
from tiles import JIT, QUICK, TORCH, TORCH_DTYPES, kinds, raw_bytes, seeds, weights

from streamquant.formats.bnb4 import BLOCK_SIZES, BnbFP4, BnbNF4

LAYOUTS = {"nf4": BnbNF4, "fp4": BnbFP4}
BACKENDS = [JIT, TORCH]
books = st.sampled_from(sorted(LAYOUTS))
backends = st.sampled_from(BACKENDS)
sources = st.sampled_from(["BF16", "F16", "F32"])


def check(weight: torch.Tensor, block_size: int, book: str, backend) -> None:
    """Every tensor of the layer has the name, dtype, shape and bytes bitsandbytes gives it; decoding agrees too."""
    layout = LAYOUTS[book](block_size=block_size)
    layer = encode_whole(layout, weight, backend)
    theirs = bitsandbytes_oracle.quantized(weight, block_size, book)
    assert layer.tensors.keys() == theirs.keys()
    for suffix, tensor in theirs.items():
        assert (layer.tensors[suffix].shape, layer.tensors[suffix].dtype) == (tensor.shape, tensor.dtype), suffix
        assert raw_bytes(layer.tensors[suffix]) == raw_bytes(tensor), suffix
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        ours = layout.decode(layer.tensors, dtype)
        assert (ours.dtype, ours.shape) == (dtype, weight.shape)
        bitsandbytes_oracle.assert_same_weight(ours, bitsandbytes_oracle.decoded(theirs, dtype))


@QUICK
@given(kinds, sources, st.sampled_from(BLOCK_SIZES), books, st.integers(1, 12), st.integers(1, 700), backends, seeds)
def test_any_weight_is_as_bitsandbytes_has_it(kind, source, block_size, book, rows, columns, backend, seed):
    check(weights(kind, rows * columns, source, seed).view(rows, columns), block_size, book, backend)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("source", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(block_size, book, source, backend):
    """An even layer whose rows hold whole blocks, one whose blocks cross row ends, an odd one, one below a block."""
    for rows, columns in ((3, 4096), (7, 1000), (5, 1231), (1, 17)):
        check(weights("gauss", rows * columns, source, seed=rows).view(rows, columns), block_size, book, backend)


def test_the_quant_state_says_what_bitsandbytes_says():
    layout = BnbNF4(block_size=128)
    for source, name in {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.items():
        weight = weights("gauss", 300, source, seed=1).view(20, 15)
        tensors = encode_whole(layout, weight, JIT).tensors
        text = bytes(tensors["weight.quant_state.bitsandbytes__nf4"].tolist()).decode()
        assert text == f'{{"quant_type": "nf4", "blocksize": 128, "dtype": "{name}", "shape": [20, 15]}}'
        state = bitsandbytes_oracle.read_state(tensors)
        assert (state.blocksize, state.shape, state.dtype) == (128, (20, 15), TORCH_DTYPES[source])


def test_float64_is_written_as_its_float32():
    """bitsandbytes has no float64: the layer says float32, and its bytes are those of the narrowed weight."""
    weight = weights("gauss", 4000, "F64", seed=1).view(40, 100)
    assert encode_whole(BnbNF4(), weight, JIT).raw() == encode_whole(BnbNF4(), weight.float(), JIT).raw()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_not_finite_is_said_and_only_then(special, backend):
    weight = weights("gauss", 6400, "BF16", seed=1).view(64, 100)
    assert encode_whole(BnbNF4(), weight, backend).finite
    weight[40, 3] = special
    layer = encode_whole(BnbNF4(), weight, backend)
    assert not layer.finite
    # What is written then is what bitsandbytes writes: that one block is lost.
    theirs = bitsandbytes_oracle.quantized(weight, 64, "nf4")
    assert torch.equal(layer.tensors["weight"], theirs["weight"])
    assert torch.equal(layer.tensors["weight.absmax"].isnan(), theirs["weight.absmax"].isnan())


@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_comfy_quant_is_offered_but_never_in_the_header(book):
    layout = LAYOUTS[book](block_size=32)
    assert json.dumps(layout.comfy_quant()) == f'{{"format": "bnb_{book}", "group_size": 32}}'
    assert not layout.in_quantization_metadata()
    # Loaders hand everything under `weight.` on to bitsandbytes, which refuses what it does not know.
    assert all(output.suffix.startswith("weight") for output in layout.outputs((8, 8), "BF16"))
    assert not any("comfy" in output.suffix for output in layout.outputs((8, 8), "BF16"))


def test_linear4bit_takes_the_layer():
    """Its own loader, with the names the custom node passes on."""
    import bitsandbytes as bnb

    weight = weights("gauss", 64 * 128, "BF16", seed=3).view(64, 128)
    layout = BnbNF4()
    tensors = encode_whole(layout, weight, JIT).tensors
    inside = {suffix: value for suffix, value in tensors.items() if suffix != "weight"}
    loaded = bnb.nn.Params4bit.from_prequantized(tensors["weight"], inside, device="cpu")
    assert loaded.quant_state.shape == weight.shape
    decoded = bnb.functional.dequantize_4bit(loaded.data, loaded.quant_state)
    assert torch.equal(decoded, layout.decode(tensors, torch.bfloat16))
