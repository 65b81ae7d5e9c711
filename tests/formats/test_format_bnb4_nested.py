"""Double quantization: absmax in 8 bits, as bitsandbytes lays it out and reads it back.

Encoding cannot be the same byte for byte: bitsandbytes takes the mean in float32 in an order that depends on threads,
and its CPU kernel does not always find the nearest map entry (0.50.2: one code off near a tie; below 2e-5 of the
largest it never uses the seven codes about zero). Decoding can be, and is.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction

import bitsandbytes_oracle
import numpy as np
import pytest
import torch
from encode_whole import encode_whole
from hypothesis import given
from hypothesis import strategies as st
from tiles import JIT, QUICK, TORCH, kinds, raw_bytes, seeds, weights, with_neighbours

from streamquant.formats.bnb4 import BLOCK_SIZES, OFFSET_LENGTH, BnbFP4, BnbNF4, encode_dynamic, exact_sum
from streamquant.kernels.codebooks import DYNAMIC_BOUNDARIES, DYNAMIC_MAP

LAYOUTS = {"nf4": BnbNF4, "fp4": BnbFP4}
books = st.sampled_from(sorted(LAYOUTS))
backends = st.sampled_from([JIT, TORCH])
block_sizes = st.sampled_from(BLOCK_SIZES)
sources = st.sampled_from(["BF16", "F16", "F32"])
# Where bitsandbytes' own float32 mean overflows or its products underflow there is nothing to compare with.
ordinary_kinds = st.sampled_from(["gauss", "wide", "outlier", "sparse", "ties"])


def quant_state(tensors: dict[str, torch.Tensor], book: str) -> dict:
    return json.loads(bytes(tensors[f"weight.quant_state.bitsandbytes__{book}"].tolist()))


@QUICK
@given(ordinary_kinds, sources, block_sizes, books, st.integers(1, 40), st.integers(1, 700), backends, seeds)
def test_layer_is_bitsandbytes_s_to_the_last_digit(kind, source, block_size, book, rows, columns, backend, seed):
    weight = weights(kind, rows * columns, source, seed).view(rows, columns)
    ours = encode_whole(LAYOUTS[book](block_size=block_size, double_quant=True), weight, backend).tensors
    theirs = bitsandbytes_oracle.quantized(weight, block_size, book, nested=True)
    assert ours.keys() == theirs.keys()

    our_state, their_state = quant_state(ours, book), quant_state(theirs, book)
    assert list(our_state) == list(their_state)
    offset = their_state.pop("nested_offset")
    assert our_state.pop("nested_offset") == pytest.approx(offset, rel=1e-6, abs=1e-44)
    assert our_state == their_state

    for suffix in ("weight", "weight.quant_map", "weight.nested_quant_map"):
        assert raw_bytes(ours[suffix]) == raw_bytes(theirs[suffix]), suffix
    for suffix in ("weight.absmax", "weight.nested_absmax"):
        assert (ours[suffix].shape, ours[suffix].dtype) == (theirs[suffix].shape, theirs[suffix].dtype)

    # nested_absmax is the largest |absmax - offset|: it moves with the offset's last digit.
    ulp = float(np.spacing(np.float32(offset)))
    largest = theirs["weight.nested_absmax"].double().clamp(min=1e-38)
    assert ((ours["weight.nested_absmax"].double() - largest).abs() <= 1e-6 * largest + 2 * ulp).all()

    # Codes are comparable where neither the offset's last digit nor their kernel's lack of small codes decides them.
    scale = largest.repeat_interleave(256)[: ours["weight.absmax"].numel()].numpy()
    plain = bitsandbytes_oracle.quantized(weight, block_size, book)["weight.absmax"].double().numpy()
    trusted = (np.abs(plain - offset) > np.maximum(3e-5 * scale, 1000 * ulp)) & (scale > 1e-30)
    apart = (ours["weight.absmax"].int() - theirs["weight.absmax"].int()).abs().numpy()
    assert apart[trusted].max(initial=0) <= 1


@QUICK
@given(kinds, sources, block_sizes, books, st.integers(1, 40), st.integers(1, 700), backends, seeds)
def test_bitsandbytes_decodes_our_layer_as_we_do(kind, source, block_size, book, rows, columns, backend, seed):
    """Each step rounds to float32: map[code] * nested_absmax, + offset, * book value; the last then to the dtype."""
    layout = LAYOUTS[book](block_size=block_size, double_quant=True)
    weight = weights(kind, rows * columns, source, seed).view(rows, columns)
    tensors = encode_whole(layout, weight, backend).tensors
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        theirs = bitsandbytes_oracle.decoded(tensors, dtype)
        bitsandbytes_oracle.assert_same_weight(layout.decode(tensors, dtype), theirs)


@QUICK
@given(kinds, st.integers(1, 2000), seeds)
def test_absmax_codes_are_the_nearest_map_entries(kind, elements, seed):
    """The definition in plain numpy; on a float32 midpoint the lower entry."""
    values = weights(kind, elements, "F32", seed).numpy()
    codes, absmax = encode_dynamic(values)
    assert codes.dtype == np.uint8 and absmax.dtype == np.float32
    for block in range(math.ceil(elements / 256)):
        part = values[block * 256 : (block + 1) * 256]
        largest = np.abs(part).max()
        if part.size < 256:
            largest = max(largest, np.float32(1e-38))
            steps = part / largest
        else:
            steps = part * (np.float32(1) / max(largest, np.float32(1e-38)))
        assert absmax[block] == largest
        expected = [(DYNAMIC_BOUNDARIES < step).sum() for step in steps]
        assert codes[block * 256 : (block + 1) * 256].tolist() == expected
        # And that is nearest, up to the rounding of the float32 midpoints.
        distance = np.abs(DYNAMIC_MAP.astype(np.float64)[None, :] - steps.astype(np.float64)[:, None])
        chosen = distance[np.arange(part.size), codes[block * 256 : (block + 1) * 256]]
        assert (chosen <= distance.min(axis=1) + 1e-7 * np.abs(steps)).all()


@pytest.mark.parametrize("largest", [1.0, 2.0**-30, -(2.0**100)])
def test_an_absmax_on_a_midpoint_takes_the_lower_map_entry(largest):
    """A block of all 255 midpoints and one that sets the scale; then of the float32 above and below each."""
    at, above, below = np.split(with_neighbours(DYNAMIC_BOUNDARIES), 3)
    for points, expected in ((at, range(255)), (above, range(1, 256)), (below, range(255))):
        block = np.append(points, np.float32(1)) * np.float32(abs(largest))
        if largest < 0:
            block[-1] *= -1
        codes, absmax = encode_dynamic(block)
        assert absmax.tolist() == [abs(largest)]
        assert codes[:-1].tolist() == list(expected)
        assert codes[-1] == (0 if largest < 0 else 255)


@QUICK
@given(kinds, st.integers(1, 3000), seeds)
def test_exact_sum_is_exact(kind, elements, seed):
    values = np.abs(weights(kind, elements, "F32", seed).numpy())
    total = exact_sum(values)
    assert total == sum(Fraction(float(value)) for value in values) * 2**149
    # Rounded once it is what math.fsum gives.
    assert float(Fraction(total, 1 << 149)) == math.fsum(values.tolist())


def test_exact_sum_of_extremes():
    tiny, largest = np.float32(2.0**-149), np.finfo(np.float32).max
    assert exact_sum(np.array([tiny, largest, tiny], dtype=np.float32)) == 2 + int(Fraction(float(largest)) * 2**149)
    assert exact_sum(np.array([np.nan, np.inf, 1], dtype=np.float32)) == 1 << 149
    assert exact_sum(np.empty(0, dtype=np.float32)) == 0


def test_the_offset_is_the_mean_rounded_once():
    """Not a float32 running mean, and no float32 overflow: thousands of blocks of nearly the largest value."""
    weight = torch.full((256, 1024), 3e38)
    weight[0, 0] = 1e30
    tensors = encode_whole(BnbNF4(block_size=32, double_quant=True), weight, JIT).tensors
    absmax = bitsandbytes_oracle.quantized(weight, 32, "nf4")["weight.absmax"]
    mean = sum(Fraction(value) for value in absmax.tolist()) / absmax.numel()
    assert quant_state(tensors, "nf4")["nested_offset"] == float(np.float32(float(mean)))


@pytest.mark.parametrize("value", [1.0, 0.02, 3e38, 1e-45, 1.1754943508222875e-38, 0.00010001, 0.0])
def test_the_quant_state_s_length_does_not_depend_on_the_weights(value):
    layout = BnbFP4(double_quant=True)
    weight = torch.full((10, 100), value)
    planned = next(output for output in layout.outputs((10, 100), "F32") if "quant_state" in output.suffix)
    tensors = encode_whole(layout, weight, JIT).tensors
    text = bytes(tensors["weight.quant_state.bitsandbytes__fp4"].tolist())
    assert planned.shape == (len(text),) and planned.constant is None
    assert text.rstrip(b" ").endswith(b"}")
    state = bitsandbytes_oracle.read_state(tensors)
    # Fifteen whole blocks and a short one, whose absmax has a floor that shows in the mean.
    absmax, floored = float(np.float32(value)), max(float(np.float32(value)), float(np.float32(1e-38)))
    assert state.offset.item() == np.float32((15 * absmax + floored) / 16)


def test_no_float32_is_longer_than_the_space_kept_for_it():
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 0x7F800000, 200_000, dtype=np.uint32).view(np.float32)
    assert max(len(json.dumps(value)) for value in patterns.tolist()) <= OFFSET_LENGTH


def test_one_block_or_equal_blocks_lose_nothing():
    """All absmax equal: the differences are zero, and decoding gives absmax back."""
    weight = torch.full((64, 128), 0.75)
    for rows in (1, 2, 64):
        layout = BnbNF4(block_size=128, double_quant=True)
        tensors = encode_whole(layout, weight[:rows], JIT).tensors
        assert torch.equal(layout.decode(tensors, torch.float32), weight[:rows])
        assert torch.equal(bitsandbytes_oracle.decoded(tensors, torch.float32), weight[:rows])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_a_special_value_is_said_and_leaves_the_offset_finite(special):
    weight = weights("gauss", 64 * 600, "BF16", seed=1).view(600, 64)
    weight[300, 3] = special
    layer = encode_whole(BnbNF4(double_quant=True), weight, JIT)
    assert not layer.finite
    assert math.isfinite(quant_state(layer.tensors, "nf4")["nested_offset"])
    decoded = BnbNF4(double_quant=True).decode(layer.tensors, torch.float32)
    # Blocks 0…255 share nothing with row 300's block but the offset.
    assert decoded[:256].isfinite().all()
