"""What is not quantized: copies are the same bytes, casts are torch's casts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from encode_whole import encode_whole
from hypothesis import given
from hypothesis import strategies as st
from tiles import JIT, QUICK, TORCH_DTYPES, all_bf16, dtypes, kinds, raw_bytes, seeds, weights, with_neighbours

from streamquant.formats.plain import Cast, Copy, round_to_bf16, to_float32

TARGETS = {"BF16": torch.bfloat16, "F16": torch.float16}
COPIED = [torch.bool, torch.int8, torch.int64, torch.float8_e4m3fn, *TORCH_DTYPES.values()]
targets = st.sampled_from(sorted(TARGETS))


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits, but for the payload of a NaN."""
    nan = expected.isnan()
    bits = [tensor.view(torch.int16)[~nan] for tensor in (found, expected)]
    return torch.equal(found.isnan(), nan) and torch.equal(*bits)


@QUICK
@given(kinds, dtypes, targets, st.integers(1, 5000), seeds)
def test_cast_is_torch_s(kind, dtype, target, elements, seed):
    source = weights(kind, elements, dtype, seed)
    layer = encode_whole(Cast(target), source, JIT)
    expected = source.to(TARGETS[target])
    assert layer.tensors[""].dtype == TARGETS[target]
    assert same_bits(layer.tensors[""], expected)
    assert layer.finite == bool(expected.isfinite().all())


@pytest.mark.parametrize("target", TARGETS)
def test_every_rounding_decision(target):
    """Each value of the target, each midpoint of two, and the float32 on either side of each; of both signs."""
    bits = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(TARGETS[target])
    values = bits[bits.isfinite()].double().numpy()
    points = with_neighbours(np.concatenate([values, (values[:-1] + values[1:]) / 2]))
    source = torch.from_numpy(np.concatenate([points, -points]))
    assert same_bits(encode_whole(Cast(target), source, JIT).tensors[""], source.to(TARGETS[target]))


def test_float64_is_rounded_through_float32():
    """As torch does it; a midpoint of BF16 missed by less than float32 sees is therefore a tie."""
    source = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40, 1e300, -1e-300], dtype=torch.float64)
    layer = encode_whole(Cast("BF16"), source, JIT)
    assert torch.equal(layer.tensors[""], source.to(torch.bfloat16))
    assert layer.tensors[""][:2].tolist() == [1.0, 1 + 4 * 2.0**-8]
    assert not layer.finite  # 1e300


@pytest.mark.parametrize("value", [65504.0, 65519.0, 65520.0, -1e5, 3e38])
def test_overflow_to_f16_is_said(value):
    layer = encode_whole(Cast("F16"), torch.tensor([1.0, value, 2.0]), JIT)
    overflows = abs(value) >= 65520
    assert layer.finite != overflows
    assert bool(layer.tensors[""][1].isinf()) == overflows


def test_overflow_to_bf16_is_said():
    """float32 reaches half a BF16 step beyond BF16."""
    largest = torch.finfo(torch.float32).max
    assert not encode_whole(Cast("BF16"), torch.tensor([largest]), JIT).finite
    assert encode_whole(Cast("BF16"), torch.tensor([3.38e38]), JIT).finite


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("special", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_special_value_is_kept_and_said(target, special):
    layer = encode_whole(Cast(target), torch.tensor([1.0, special]), JIT)
    assert not layer.finite
    assert layer.tensors[""][0] == 1
    assert math.isnan(special) == bool(layer.tensors[""][1].isnan())
    assert math.isnan(special) or layer.tensors[""][1] == special


def test_every_nan_stays_a_nan():
    """Rounding up the bits of a NaN must not make an infinity, or a zero, of it."""
    patterns = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000, 0x7F80FFFF], dtype=np.uint32)
    rounded = round_to_bf16(patterns.view(np.float32))
    assert torch.from_numpy(rounded).view(torch.bfloat16).isnan().all()


def test_to_float32_of_every_bf16_pattern():
    patterns = all_bf16()
    found = torch.from_numpy(to_float32(np.frombuffer(raw_bytes(patterns), np.uint8), "BF16"))
    number = ~patterns.isnan()
    assert torch.equal(found[number].view(torch.int32), patterns[number].float().view(torch.int32))
    assert found[~number].isnan().all()


@QUICK
@given(kinds, dtypes, targets, seeds)
def test_cast_reports_its_error(kind, dtype, target, seed):
    source = weights(kind, 3000, dtype, seed)
    layer = encode_whole(Cast(target), source, JIT)
    if layer.finite:
        single = source.float().double()
        error = (layer.tensors[""].double() - single).norm() ** 2
        assert layer.sums.weight == pytest.approx(float(single.norm() ** 2), rel=1e-4)
        assert layer.sums.error == pytest.approx(float(error), rel=1e-4, abs=1e-13 * layer.sums.weight)


@QUICK
@given(st.binary(max_size=200), st.integers(1, 50))
def test_copy_passes_every_byte_through(data, tile):
    source = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    layer = encode_whole(Copy(), source, JIT, tile_elements=tile)
    assert layer.raw() == {"": data}
    assert layer.finite and (layer.sums.error, layer.sums.weight) == (0, 0)


@pytest.mark.parametrize("dtype", COPIED, ids=str)
def test_copy_keeps_dtype_and_shape(dtype):
    source = torch.arange(24).reshape(2, 3, 4).to(dtype)
    tensor = encode_whole(Copy(), source, JIT, tile_elements=5).tensors[""]
    assert (tensor.dtype, tensor.shape) == (source.dtype, source.shape)
    assert raw_bytes(tensor) == raw_bytes(source)


def test_copy_keeps_nan_payloads_and_says_nothing_of_them():
    source = torch.tensor([0x7FC01234, -1], dtype=torch.int32).view(torch.float32)
    layer = encode_whole(Copy(), source, JIT)
    assert layer.raw() == {"": bytes(raw_bytes(source))} and layer.finite


def test_plain_layers_have_no_marker():
    for layout in (Copy(), Cast()):
        assert layout.comfy_quant() is None and not layout.in_quantization_metadata()
