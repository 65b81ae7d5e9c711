"""What every format promises, over all of them and whatever shape: the plan is exact, and tiles change nothing."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from encode_whole import encode_whole, nbytes
from hypothesis import assume, given
from hypothesis import strategies as st
from tiles import JIT, QUICK, TORCH, TORCH_DTYPES, kinds, seeds, weights

from streamquant.formats import FORMATS
from streamquant.formats.bnb4 import BLOCK_SIZES, BnbFP4, BnbNF4
from streamquant.formats.fp8 import Float8Block3d, Float8BlockWise, Float8E5M2, Float8RowWise, Float8TensorWise
from streamquant.formats.int8 import Int8BlockWise, Int8TensorWise
from streamquant.formats.plain import Cast, Copy

edges = st.sampled_from([1, 2, 5, 8, 32])
layouts = st.one_of(
    st.sampled_from([Float8TensorWise(), Float8E5M2(), Float8RowWise(), Int8TensorWise(), Int8TensorWise(False)]),
    st.sampled_from([Copy(), Cast("BF16"), Cast("F16")]),
    st.builds(Float8BlockWise, edges),
    st.builds(Float8Block3d, edges),
    st.builds(Int8BlockWise, block_size=edges),
    st.builds(BnbNF4, st.sampled_from(BLOCK_SIZES), st.booleans()),
    st.builds(BnbFP4, st.sampled_from(BLOCK_SIZES), st.booleans()),
)
shapes = st.tuples(st.integers(1, 70), st.integers(1, 200))
sources = st.sampled_from(["BF16", "F16", "F32"])


def fitted(layout, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape, cut to whole blocks where the layout wants them."""
    rows, columns = shape
    edge = getattr(layout, "block_size", 1)
    if isinstance(layout, (Float8BlockWise, Int8BlockWise)):
        rows, columns = max(rows // edge, 1) * edge, max(columns // edge, 1) * edge
    assert layout.misfit((rows, columns)) is None
    return rows, columns


def elements_of(layout, shape: tuple[int, int], dtype: str) -> int:
    """A copy's elements are its bytes."""
    return math.prod(shape) * (TORCH_DTYPES[dtype].itemsize if isinstance(layout, Copy) else 1)


def test_every_registered_format_is_tested_here():
    tested = [Float8TensorWise, Float8E5M2, Float8RowWise, Float8BlockWise, Float8Block3d]
    tested += [Int8TensorWise, Int8BlockWise, BnbNF4, BnbFP4, Cast, Copy]
    ours = {layout for layout in FORMATS.values() if layout.__module__.startswith("streamquant.")}
    assert ours == set(tested)
    assert all(FORMATS[layout.name] is layout for layout in tested)


@QUICK
@given(layouts, shapes, sources, st.integers(1, 12), st.data())
def test_streamed_extents_of_consecutive_tiles_tile_each_tensor(layout, shape, dtype, tiles, data):
    shape = fitted(layout, shape)
    elements, grain = elements_of(layout, shape, dtype), layout.granularity(shape, dtype)
    cuts = data.draw(st.lists(st.integers(0, elements // grain), max_size=tiles).map(sorted))
    edges = [0, *(cut * grain for cut in cuts), elements]
    for output in layout.outputs(shape, dtype):
        if not output.streamed:
            # Either the plan knows its bytes, all of them, or the encoder delivers them at the end.
            assert output.constant is None or len(output.constant) == nbytes(output)
            continue
        at = 0
        for begin, end in itertools.pairwise(edges):
            if begin == end:
                continue
            first, last = output.extent(begin, end)
            assert first == at and last > first
            at = last
        assert at == nbytes(output), output.suffix


@QUICK
@given(layouts, shapes, sources, kinds, st.integers(1, 8), st.sampled_from([JIT, TORCH]), seeds)
def test_tiles_do_not_change_a_byte(layout, shape, dtype, kind, grains, backend, seed):
    """Nor does the order in which workers finish, nor an interruption after any tile."""
    shape = fitted(layout, shape)
    weight = weights(kind, math.prod(shape), dtype, seed).view(shape)
    grain, elements = layout.granularity(shape, dtype), elements_of(layout, shape, dtype)
    # Whole grains, few enough tiles to be quick.
    tile = grain * max(grains, math.ceil(elements / grain / 40))
    tiles = math.ceil(elements / tile)
    whole = encode_whole(layout, weight, JIT)
    split = encode_whole(layout, weight, backend, tile, shuffle=seed, interrupt_at=seed % (tiles + 1))
    assert split.raw() == whole.raw()
    assert split.finite == whole.finite
    if whole.finite:
        assert split.sums.error == pytest.approx(whole.sums.error, rel=1e-3, abs=1e-9 * whole.sums.weight + 1e-60)


@QUICK
@given(layouts, shapes, sources)
def test_the_encoder_delivers_just_what_the_plan_left_open(layout, shape, dtype):
    """No output is forgotten: constant, streamed, or final; only scales may be replaced by an all-zero layer's."""
    shape = fitted(layout, shape)
    encoder = layout.encoder(shape, dtype)
    outputs = layout.outputs(shape, dtype)
    final = set(encoder.finish())  # of a layer with nothing in it
    planned = {output.suffix for output in outputs if output.streamed or output.constant is not None}
    assert len({output.suffix for output in outputs}) == len(outputs)
    assert {output.suffix for output in outputs} == planned | final
    assert planned & final <= {"weight_scale"}


@QUICK
@given(layouts, shapes, sources, seeds)
def test_the_error_reported_is_the_error_made(layout, shape, dtype, seed):
    assume(not isinstance(layout, Copy))
    shape = fitted(layout, shape)
    weight = weights("gauss", math.prod(shape), dtype, seed).view(shape)
    layer = encode_whole(layout, weight, JIT)
    if getattr(layout, "double_quant", False):
        return  # reported is the error of the codes, before absmax is stored in 8 bits
    decoded = layout.decode(layer.tensors, torch.float32).double()
    truth = (decoded - weight.double()).norm() / weight.double().norm()
    assert layer.relative_error == pytest.approx(truth.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "layout, low, high",
    [
        (Float8TensorWise(), 0.024, 0.029),
        (Float8RowWise(), 0.024, 0.029),
        (Float8BlockWise(64), 0.024, 0.029),
        (Float8Block3d(64), 0.022, 0.029),
        (Float8E5M2(), 0.048, 0.056),
        (Int8TensorWise(False), 0.009, 0.013),
        (Int8TensorWise(), 0.006, 0.009),
        (Int8BlockWise(block_size=64), 0.007, 0.010),
        (BnbNF4(64), 0.085, 0.095),
        (BnbNF4(64, True), 0.085, 0.096),
        (BnbNF4(4096), 0.11, 0.14),
        (BnbFP4(64), 0.11, 0.13),
        (Cast("BF16"), 0.001, 0.002),
        (Cast("F16"), 0.0001, 0.0003),
    ],
    ids=str,
)
def test_relative_error_on_gaussian_weights(layout, low, high):
    """A lower bound too: an error that is too good to be true is a test that compares a thing with itself."""
    weight = weights("gauss", 512 * 1024, "F32", seed=0).view(512, 1024)
    decoded = layout.decode(encode_whole(layout, weight, JIT).tensors, torch.float32)
    assert low < ((decoded - weight).norm() / weight.norm()).item() < high


@pytest.mark.parametrize("layout", [Float8BlockWise(128), Int8BlockWise()], ids=lambda layout: layout.name)
@pytest.mark.parametrize("shape", [(256, 400), (200, 384), (64, 64)])
def test_two_dimensional_blocks_must_divide_both_sides(layout, shape):
    assert layout.misfit((256, 384)) is None
    misfit = layout.misfit(shape)
    assert f"{shape[0]} x {shape[1]}" in misfit and "128" in misfit


def test_row_groups_must_divide_the_columns_only():
    assert Float8Block3d(128).misfit((7, 384)) is None
    misfit = Float8Block3d(128).misfit((256, 400))
    assert "400" in misfit and "128" in misfit


def test_fallback_is_row_scales_under_the_row_format_s_own_name():
    assert Float8BlockWise().fallback() == Float8Block3d().fallback() == Float8RowWise()
    assert Int8BlockWise().fallback() == Int8TensorWise(per_row=True)
    assert Int8BlockWise().fallback().comfy_quant() == {"format": "int8_tensorwise", "per_row": True}
    assert Float8BlockWise().fallback().comfy_quant() == {"format": "float8_e4m3fn_rowwise"}


@QUICK
@given(layouts.filter(lambda layout: not isinstance(layout, (Float8BlockWise, Int8BlockWise))), shapes)
def test_everything_else_fits_any_weight(layout, shape):
    assert layout.misfit(shape) is None
    assert layout.fallback() is None


@QUICK
@given(layouts)
def test_parameters_make_the_format_again(layout):
    """They are what a fingerprint holds of it."""
    parameters = json.loads(json.dumps(layout.parameters()))
    assert FORMATS[layout.name](**parameters) == layout


@QUICK
@given(layouts, st.sampled_from([(0, 0), (0, 5), (5, 0), (0, 64), (64, 0)]), sources)
def test_a_weight_without_elements_has_its_tensors_all_the_same(layout, shape, dtype):
    layer = encode_whole(layout, torch.empty(shape, dtype=TORCH_DTYPES[dtype]), JIT)
    assert layer.tensors.keys() == {output.suffix for output in layout.outputs(shape, dtype)}
    assert layer.finite and layer.sums.error == layer.sums.weight == 0
    if "weight_scale" in layer.tensors:
        assert (layer.tensors["weight_scale"] == 1).all()
    assert layout.decode(layer.tensors, torch.float32).shape == shape
