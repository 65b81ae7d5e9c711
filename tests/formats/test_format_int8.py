"""INT8 layers against their definition in plain numpy, and against comfy-kitchen in both directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout
from encode_whole import encode_whole
from hypothesis import given
from hypothesis import strategies as st
from tiles import JIT, QUICK, TORCH, dtypes, kinds, seeds, weights

from streamquant.formats.int8 import Int8BlockWise, Int8TensorWise

BACKENDS = pytest.mark.parametrize("backend", [JIT, TORCH], ids=lambda backend: backend.name)
backends = st.sampled_from([JIT, TORCH])
TENSOR, ROW = Int8TensorWise(per_row=False), Int8TensorWise()
layouts = st.one_of(st.sampled_from([TENSOR, ROW]), st.builds(Int8BlockWise, block_size=st.sampled_from([1, 3, 8, 16])))


def edge_of(layout) -> int:
    return getattr(layout, "block_size", 1)


def tiled(weight: np.ndarray, size: int) -> np.ndarray:
    rows, columns = weight.shape
    return weight.reshape(rows // size, size, columns // size, size)


def definition(layout, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales: amax / 127 with a floor, then divide, round half to even, clamp. All zeros: scale 1."""
    weight = weight.astype(np.float32)
    if isinstance(layout, Int8BlockWise):
        size = layout.block_size
        amax, floor = np.abs(tiled(weight, size)).max(axis=(1, 3)), 1e-8
        spread = lambda scale: np.kron(scale, np.ones((size, size), np.float32))
    elif layout.per_row:
        amax, floor, spread = np.abs(weight).max(axis=1, keepdims=True), 1e-12, lambda scale: scale
    else:
        amax, floor, spread = np.abs(weight).max(), 1e-12, lambda scale: scale
    scale = np.maximum(amax / np.float32(127), np.float32(floor)).astype(np.float32)
    codes = np.clip(np.rint(weight / spread(scale)), -127, 127).astype(np.int8)
    return codes, scale if weight.any() else np.ones_like(scale)


@QUICK
@given(layouts, kinds, dtypes, st.integers(1, 5), st.integers(1, 40), backends, seeds)
def test_codes_and_scales_follow_the_definition(layout, kind, dtype, rows, columns, backend, seed):
    edge = edge_of(layout)
    weight = weights(kind, rows * edge * columns * edge, dtype, seed).view(rows * edge, columns * edge)
    tensors = encode_whole(layout, weight, backend).tensors
    codes, scale = definition(layout, weight.float().numpy())
    assert tensors["weight"].dtype == torch.int8
    assert np.array_equal(tensors["weight"].numpy(), codes)
    assert tensors["weight_scale"].shape == scale.shape and tensors["weight_scale"].dtype == torch.float32
    assert tensors["weight_scale"].numpy().tobytes() == scale.tobytes()


def test_scale_shapes():
    """What readers tell the modes apart by."""
    weight = weights("gauss", 48 * 32, "BF16", seed=0).view(48, 32)
    for layout, shape in {TENSOR: (), ROW: (48, 1), Int8BlockWise(block_size=16): (3, 2)}.items():
        assert encode_whole(layout, weight, JIT).tensors["weight_scale"].shape == shape


def test_block_layers_carry_an_input_scale_of_one():
    weight = weights("gauss", 256 * 128, "BF16", seed=0).view(256, 128)
    tensors = encode_whole(Int8BlockWise(), weight, JIT).tensors
    assert tensors["input_scale"].shape == () and tensors["input_scale"].dtype == torch.float32
    assert tensors["input_scale"].item() == 1.0
    assert "input_scale" not in encode_whole(ROW, weight, JIT).tensors


@QUICK
@given(layouts, kinds, dtypes, st.integers(1, 5), st.integers(1, 40), seeds)
def test_decode_is_code_times_scale_rounded_once_more(layout, kind, dtype, rows, columns, seed):
    edge = edge_of(layout)
    weight = weights(kind, rows * edge * columns * edge, dtype, seed).view(rows * edge, columns * edge)
    tensors = encode_whole(layout, weight, JIT).tensors
    codes, scale = tensors["weight"].numpy().astype(np.float32), tensors["weight_scale"].numpy()
    if isinstance(layout, Int8BlockWise):
        scale = np.kron(scale, np.ones((edge, edge), np.float32))
    expected = torch.from_numpy(codes * scale)
    for target in (torch.float32, torch.bfloat16, torch.float16):
        decoded = layout.decode(tensors, target)
        assert decoded.dtype == target and torch.equal(decoded, expected.to(target))


@QUICK
@given(layouts, kinds, dtypes, st.integers(1, 5), st.integers(1, 40), seeds)
def test_no_weight_is_off_by_more_than_half_a_step(layout, kind, dtype, rows, columns, seed):
    edge = edge_of(layout)
    weight = weights(kind, rows * edge * columns * edge, dtype, seed).view(rows * edge, columns * edge)
    tensors = encode_whole(layout, weight, JIT).tensors
    step = tensors["weight_scale"].double()
    if isinstance(layout, Int8BlockWise):
        step = step.repeat_interleave(edge, 0).repeat_interleave(edge, 1)
    error = (layout.decode(tensors, torch.float32).double() - weight.float().double()).abs()
    assert (error <= step * 0.50002).all()


@BACKENDS
@pytest.mark.parametrize("layout, scale_shape", [(TENSOR, ()), (ROW, (16, 1)), (Int8BlockWise(block_size=8), (2, 3))])
def test_an_all_zero_layer_has_codes_0_and_scales_1_in_the_proper_shape(layout, scale_shape, backend):
    tensors = encode_whole(layout, torch.zeros(16, 24), backend, tile_elements=8 * 24).tensors
    assert not tensors["weight"].any()
    assert tensors["weight_scale"].shape == scale_shape
    assert (tensors["weight_scale"] == 1).all()


@BACKENDS
@pytest.mark.parametrize("layout, floor", [(ROW, 1e-12), (Int8BlockWise(block_size=8), 1e-8)])
def test_zero_rows_of_another_layer_get_the_floor(layout, floor, backend):
    weight = weights("gauss", 16 * 24, "BF16", seed=1).view(16, 24)
    weight[8:] = 0
    scale = encode_whole(layout, weight, backend).tensors["weight_scale"]
    half = scale.shape[0] // 2
    assert (scale[half:] == float(np.float32(floor))).all() and (scale[:half] > 1e-6).all()


@BACKENDS
@pytest.mark.parametrize("layout", [TENSOR, ROW, Int8BlockWise(block_size=8)], ids=["tensor", "row", "block"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_nan_encodes_as_0_infinities_saturate_and_scales_stay_finite(layout, backend, dtype):
    weight = weights("gauss", 16 * 24, dtype, seed=1).view(16, 24)
    weight[0, :4] = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf")])
    layer = encode_whole(layout, weight, backend)
    assert not layer.finite
    assert layer.tensors["weight"][0, :4].tolist() == [0, 0, 127, -127]
    weight[0, :4] = 0
    clean = encode_whole(layout, weight, backend).tensors
    assert torch.equal(layer.tensors["weight_scale"], clean["weight_scale"])
    assert torch.equal(layer.tensors["weight"].view(-1)[4:], clean["weight"].view(-1)[4:])


@QUICK
@given(st.sampled_from([TENSOR, ROW]), kinds, dtypes, st.integers(1, 9), st.integers(1, 99), seeds)
def test_comfy_kitchen_decodes_what_we_decode(layout, kind, dtype, rows, columns, seed):
    weight = weights(kind, rows * columns, dtype, seed).view(rows, columns)
    tensors = encode_whole(layout, weight, JIT).tensors
    for target in (torch.float32, torch.bfloat16, torch.float16):
        params = TensorWiseINT8Layout.Params(tensors["weight_scale"], target, tuple(weight.shape))
        theirs = QuantizedTensor(tensors["weight"], "TensorWiseINT8Layout", params).dequantize()
        assert theirs.dtype == target and torch.equal(theirs, layout.decode(tensors, target))


@QUICK
@given(
    st.sampled_from([TENSOR, ROW]),
    st.sampled_from(["gauss", "wide", "outlier", "ties", "constant"]),
    st.integers(1, 9),
    st.integers(1, 99),
    backends,
    seeds,
)
def test_codes_are_those_of_comfy_kitchen_s_quantizer(layout, kind, rows, columns, backend, seed):
    """From float32, where its definition is ours (its floor is 1e-30, and 16-bit weights it divides in 16 bits)."""
    weight = weights(kind, rows * columns, "F32", seed).view(rows, columns)
    tensors = encode_whole(layout, weight, backend).tensors
    codes, params = TensorWiseINT8Layout.quantize(weight, per_channel=layout.per_row)
    above_floor = params.scale >= 1e-12
    assert tensors["weight_scale"].shape == params.scale.shape
    assert torch.equal(tensors["weight_scale"][above_floor], params.scale[above_floor])
    same_scale = above_floor.expand(weight.shape)
    assert torch.equal(tensors["weight"][same_scale], codes[same_scale])


@pytest.mark.parametrize("layout", [TENSOR, ROW], ids=["tensor", "row"])
def test_exact_ties_are_those_of_comfy_kitchen(layout):
    """Every half between -127 and 127 over powers of two: rows of nothing but ties and the 127 that sets the scale."""
    halves = torch.arange(-127, 127, dtype=torch.float32) + 0.5
    rows = [torch.cat([halves, torch.tensor([127.0])]) * 2.0**exponent for exponent in range(-20, 20)]
    for row in [torch.stack(rows)] if layout.per_row else [row.view(1, -1) for row in rows]:
        codes, _ = TensorWiseINT8Layout.quantize(row, per_channel=layout.per_row)
        tensors = encode_whole(layout, row, JIT).tensors
        assert torch.equal(tensors["weight"], codes)
        assert not (tensors["weight"][:, :-1] % 2).any()  # half to even: every tie went to an even code


@pytest.mark.parametrize(
    "layout, text",
    [
        (TENSOR, {"format": "int8_tensorwise"}),
        (ROW, {"format": "int8_tensorwise", "per_row": True}),
        (Int8BlockWise(), {"format": "int8_blockwise", "group_size": 128}),
        (Int8BlockWise(block_size=64), {"format": "int8_blockwise", "group_size": 64}),
    ],
    ids=str,
)
def test_comfy_quant(layout, text):
    assert layout.comfy_quant() == text
    assert list(layout.comfy_quant()) == list(text)
    assert layout.in_quantization_metadata()
