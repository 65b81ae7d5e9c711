"""The tensor layouts alone: decoding against the formulas, and quantizing again on the old grid."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_flux
import torch
from comfy_kitchen.tensor import QuantizedTensor
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_quantops import decode, layouts
from streamquant.formats import FORMATS
from streamquant.formats.bnb4 import encode_dynamic
from streamquant.kernels import bnb4, fp8, int8
from streamquant.kernels.codebooks import CODE_BOOKS, DYNAMIC_MAP

layouts.register({})
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def four_bit(weight, book="nf4", block_size=64, nested=False, dtype=torch.float32, code=None):
    """A weight as a tensor of our 4-bit layout."""
    packed, absmax = bnb4.encode(weight.reshape(-1), block_size, book)
    fields = {}
    if nested:
        offset = float(absmax.mean())
        codes, nested_absmax = encode_dynamic((absmax - offset).numpy())
        fields = {"nested_scale": torch.from_numpy(nested_absmax), "nested_code": torch.from_numpy(DYNAMIC_MAP.copy())}
        fields |= {"nested_offset": offset}
        absmax = torch.from_numpy(codes)
    params = layouts.Bnb4bitLayout.Params(
        scale=absmax, orig_dtype=dtype, orig_shape=tuple(weight.shape), block_size=block_size, book=book,
        code=torch.from_numpy(CODE_BOOKS[book].copy()) if code is None else code, standard_book=code is None,
        quant_state=b"{}", **fields,
    )  # fmt: skip
    return QuantizedTensor(packed.view(-1, 1), layouts.BNB_LAYOUT, params)


def scaled(weight, name, size=0, dtype=torch.float32):
    """A weight as a tensor of our layout for row and block scales."""
    layout = FORMATS[name](block_size=size) if size else FORMATS[name]()
    group = layout.geometry(tuple(weight.shape)).group
    absmax = weight.reshape(-1, group).abs().amax(1)
    if layout.geometry(tuple(weight.shape)).mode == "block":
        absmax = absmax.view(-1, size, weight.shape[1] // size).amax(1)
        spread = absmax.unsqueeze(1).expand(-1, size, -1).reshape(-1)
    else:
        spread = absmax
    if name.startswith("int8"):
        codes, scale = int8.encode(weight.reshape(-1, group), spread / 127), absmax / 127
    else:
        codes, scale = fp8.encode(weight.reshape(-1, group), 448 / spread, "e4m3"), absmax / 448
    params = layouts.ScaledLayout.Params(
        scale=scale.view(layout.scale_shape(tuple(weight.shape))), orig_dtype=dtype, orig_shape=tuple(weight.shape),
        format=layout,
    )  # fmt: skip
    return QuantizedTensor(codes.view(weight.shape), layouts.SCALED_LAYOUT, params)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signed(weight):
    """As rounding may choose it: a block's absmax of either sign, the nearer fit of a book that is not symmetric."""
    packed = four_bit(weight)
    signs = torch.ones(packed._params.scale.numel())
    signs[::3] = -1
    params = replace(packed._params, scale=packed._params.scale * signs)
    return QuantizedTensor(packed._qdata, layouts.BNB_LAYOUT, params)


KINDS = {
    "nf4-signed": signed,
    "nf4": lambda weight: four_bit(weight),
    "nf4-double": lambda weight: four_bit(weight, nested=True),
    "fp4": lambda weight: four_bit(weight, "fp4"),
    "fp8-row": lambda weight: scaled(weight, "float8_e4m3fn_rowwise"),
    "fp8-block": lambda weight: scaled(weight, "float8_e4m3fn_blockwise", 32),
    "fp8-block3d": lambda weight: scaled(weight, "float8_e4m3fn_block3d", 32),
    "int8-block": lambda weight: scaled(weight, "int8_blockwise", 32),
}


@pytest.fixture(params=list(KINDS))
def make(request):
    return KINDS[request.param]


@settings(max_examples=25)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    block_size=st.sampled_from([32, 64, 128]),
    book=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    own=st.booleans(),
)
def test_four_bits_decode_by_the_formula(rows, columns, block_size, book, nested, dtype, own):
    """Whatever decodes here: bitsandbytes is used only where it is right."""
    code = torch.from_numpy(CODE_BOOKS[book]) * 0.75 if own else None
    packed = four_bit(normal(rows, columns), book, block_size, nested, dtype, code)
    params = packed._params
    absmax = decode.decode_absmax(params).numpy()
    nibbles = packed._qdata.flatten().numpy()
    codes = np.stack([nibbles >> 4, nibbles & 15], 1).reshape(-1)[: rows * columns]
    values = params.code.numpy()[codes] * np.repeat(absmax, block_size)[: rows * columns]
    assert torch.equal(packed.dequantize(), torch.from_numpy(values).to(dtype).view(rows, columns))
    in_torch = decode.decode_4bit_in_torch(packed._qdata.flatten(), params, rows * columns)
    assert torch.equal(in_torch.view(rows, columns), packed.dequantize())


def test_pieces_are_decoded_as_a_whole(monkeypatch):
    packed = four_bit(normal(37, 65))
    whole = decode.decode_4bit_in_torch(packed._qdata.flatten(), packed._params, 37 * 65)
    monkeypatch.setattr(decode, "CPU_CHUNK", 128)
    assert torch.equal(decode.decode_4bit_in_torch(packed._qdata.flatten(), packed._params, 37 * 65), whole)


@pytest.mark.parametrize("chunk", [decode.CPU_CHUNK, 1, 2000])
def test_scaled_codes_decode_by_the_formula(make, chunk, monkeypatch):
    monkeypatch.setattr(decode, "CPU_CHUNK", chunk)
    packed = make(normal(64, 96))
    if packed._layout_cls == layouts.SCALED_LAYOUT:
        expected = packed._qdata.float() * tiny_flux._spread(packed._params.scale, (64, 96))
        assert torch.equal(packed.dequantize(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_did_not_change_keeps_its_bits(make, seed, dtype):
    """Merging a patch into a part of a layer leaves the rest alone, though everything is rounded by lot."""
    packed = make(normal(64, 96))
    same = packed.requantize_from_float(packed.dequantize().to(dtype), scale="recalculate", stochastic_rounding=seed)
    # Values as such: of two codes for one number (FP4's zeros) either may come back.
    again = layouts.moved(same, None, torch.float32)
    assert torch.equal(again.dequantize(), packed.dequantize())
    for name, tensor in packed.state_dict("").items():
        assert same.state_dict("")[name].shape == tensor.shape and same.state_dict("")[name].dtype == tensor.dtype


def test_to_nearest_no_weight_is_off_by_more_than_half_a_step(make):
    packed, changed = make(normal(64, 96)), normal(64, 96, seed=3)
    again = packed.requantize_from_float(changed, stochastic_rounding=0)
    error = (again.dequantize() - changed).abs()
    steps = {layouts.BNB_LAYOUT: 0.34, layouts.SCALED_LAYOUT: 0.08}[packed._layout_cls]
    assert error.max() <= steps * changed.abs().max() / 2


def test_by_lot_the_mean_is_right(make):
    """A change far below a step survives on average; rounding to nearest would lose it."""
    packed = make(normal(64, 96))
    base = packed.dequantize()
    change = 0.01 * normal(64, 96, seed=5)
    drawn = sum(
        packed.requantize_from_float(base + change, stochastic_rounding=seed).dequantize() for seed in range(1, 65)
    )  # fmt: skip
    gain = ((drawn / 64 - base) * change).sum() / (change * change).sum()
    nearest = packed.requantize_from_float(base + change, stochastic_rounding=0).dequantize() - base
    lost = (nearest * change).sum() / (change * change).sum()
    assert abs(gain - 1) < 0.15
    assert abs(gain - 1) < abs(lost - 1)


def test_larger_weights_find_room(make):
    packed = make(normal(64, 96))
    changed = packed.dequantize().clone()
    changed[3, 5], changed[60, 90] = 40.0, -55.0
    again = packed.requantize_from_float(changed, stochastic_rounding=1)
    result = again.dequantize()
    assert math.isclose(result[3, 5], 40.0, rel_tol=0.15) and math.isclose(result[60, 90], -55.0, rel_tol=0.15)
    # Rows and blocks that did not need the room are as they were.
    untouched = (slice(8, 24), slice(32, 64))
    nested = packed._params.scale.dtype == torch.uint8  # where 256 blocks share a scale of their scales
    assert nested or torch.equal(result[untouched], packed.dequantize()[untouched])


def test_a_patch_of_nothing_but_zeros(make):
    packed = make(normal(64, 96))
    assert torch.equal(packed.requantize_from_float(torch.zeros(64, 96), stochastic_rounding=7).dequantize(), torch.zeros(64, 96))


def test_moving_takes_every_part(make):
    packed = make(normal(64, 96))
    there = layouts.moved(packed, "meta", torch.bfloat16)
    parts, _ = there.__tensor_flatten__()
    assert {getattr(there, part).device.type for part in parts} == {"meta"}
    assert there.dtype == torch.bfloat16 and there.shape == packed.shape


def test_a_linear_layer_is_that_of_the_decoded_weight(make):
    packed, bias, inputs = make(normal(64, 96)), normal(64), normal(5, 96, seed=9)
    with torch.inference_mode():
        result = torch.nn.functional.linear(inputs, packed, bias)
    assert torch.equal(result, torch.nn.functional.linear(inputs, packed.dequantize(), bias))


class TestFused:
    def packed(self, nested=False, columns=128):
        return four_bit(normal(64, columns), nested=nested)

    def test_never_on_the_cpu(self):
        from comfyui_quantops import fused

        assert not fused.fits(normal(1, 128), self.packed(), None)

    @pytest.mark.parametrize("nested", [False, True])
    def test_what_the_product_is_given(self, monkeypatch, nested):
        """bitsandbytes' own product takes the same arguments on the CPU, where it decodes first."""
        from comfyui_quantops import fused

        if fused.gemm_4bit() is None:
            pytest.skip("this bitsandbytes has no product with 4-bit weights")
        packed, bias, inputs = self.packed(nested), normal(64), normal(3, 128, seed=4)
        expected = torch.nn.functional.linear(inputs, packed.dequantize(), bias)
        torch.testing.assert_close(fused.linear(inputs, packed, bias), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_on_cuda(self, nested, dtype):
        from comfyui_quantops import fused

        packed = layouts.moved(self.packed(nested), torch.device("cuda"), dtype)
        inputs = normal(2, 128, seed=4).to("cuda", dtype)
        assert fused.fits(inputs, packed, None) == (fused.gemm_4bit() is not None)
        result = torch.nn.functional.linear(inputs, packed)
        expected = torch.nn.functional.linear(inputs.float(), packed.dequantize().float())
        torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=2e-2)
        assert not fused.fits(normal(1, 100).cuda(), self.packed(columns=100), None)
