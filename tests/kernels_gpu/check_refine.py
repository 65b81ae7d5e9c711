"""Refinement against its definition and the compiled CPU path: the same codes and objectives, bit for bit."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import LARGEST, Layer, layer
from same import DTYPES, assert_same
from tiles import seeds, weights

from streamquant.kernels.feedback import Feedback, dense_feedback, low_rank_feedback
from streamquant.kernels.gpu import feedback as device_feedback
from streamquant.kernels.gpu import refine as refinement
from streamquant.kernels.gpu.refine import refine
from streamquant.kernels.refined import GRIDS, Refined

# A column takes the interpreter milliseconds.
FEW = settings(max_examples=3, deadline=None)
columns = st.one_of(st.integers(1, 12), st.sampled_from([31, 32, 33, 65]))
# Not "bits": squares of weights near float32's largest are infinite, and there is no order among infinities.
KINDS = ("gauss", "wide", "outlier", "sparse", "ties", "subnormal", "constant")
each_grid = pytest.mark.parametrize("grid", GRIDS)
each_form = pytest.mark.parametrize("dense", [False, True], ids=["low rank", "dense"])


def random_layer(grid: str, kind: str, dtype: str, shape: tuple[int, int], rank: int, group: int, seed: int) -> Layer:
    """As `layer`, with any kind of weights and any number of columns to a scale."""
    case = layer(*shape, rank, grid, seed, group)
    weight = weights(kind, shape[0] * shape[1], dtype, seed).view(shape).float().numpy()
    starts = np.arange(0, shape[1], group)
    absmax = np.maximum.reduceat(np.abs(weight), starts, axis=1)
    scale = np.maximum(absmax / np.float32(LARGEST[grid]), np.float32(1e-12))
    return Layer(weight, scale, case.column_group, grid, case.remainder, case.vectors)


def refined(case: Layer, feedback: Feedback, device: str, dtype: str = "F32", **options) -> Refined:
    weight = torch.from_numpy(case.weight).to(DTYPES[dtype])
    scale, groups = torch.from_numpy(case.scale), torch.from_numpy(case.column_group)
    return refine(weight.to(device), scale.to(device), groups.to(device), feedback, case.grid, **options)


def check(case: Layer, feedback: Feedback, device: str, dtype: str = "F32", **options) -> None:
    """The compiled path's codes and objectives, to the bit: `test_blocks_and_programs` holds it to the definition."""
    ours, expected = refined(case, feedback, device, dtype, **options), case.refined(feedback, **options)
    assert_same(ours.codes, torch.from_numpy(expected.codes), "codes")
    np.testing.assert_array_equal(ours.before.cpu().numpy(), expected.before)
    np.testing.assert_array_equal(ours.after.cpu().numpy(), expected.after)


@each_form
@each_grid
def test_blocks_and_programs(device, grid, dense):
    """A block of columns and one more; a program's rows and one more."""
    case = layer(3 if dense else refinement.ROWS + 1, 33, 9, grid, seed=1, group=16)
    feedback = case.feedback(dense)
    check(case, feedback, device, sweeps=1)
    assert_same(torch.from_numpy(case.defined(feedback, sweeps=1).codes), torch.from_numpy(case.refined(feedback, sweeps=1).codes))


@FEW
@given(
    st.sampled_from(GRIDS), st.sampled_from(KINDS), st.sampled_from(sorted(DTYPES)), st.integers(1, 10), columns,
    st.sampled_from([1, 3, 8, 33, 72]), st.sampled_from([1, 16, 70]), seeds, st.booleans(), st.integers(0, 2),
    st.booleans(),
)  # fmt: skip
def test_any_shape(device, grid, kind, dtype, rows, columns, rank, group, seed, act_order, sweeps, guard):
    case = random_layer(grid, kind, dtype, (rows, columns), rank, group, seed)
    check(case, case.feedback(act_order=act_order), device, dtype, sweeps=sweeps, guard=guard)


@FEW
@given(st.sampled_from(GRIDS), st.sampled_from(KINDS), st.integers(1, 9), columns, seeds, st.integers(0, 2))
def test_a_dense_h(device, grid, kind, rows, columns, seed, sweeps):
    case = random_layer(grid, kind, "F32", (rows, columns), 5, 16, seed)
    check(case, case.feedback(dense=True), device, sweeps=sweeps)


@each_grid
def test_a_multiplier_of_its_own(device, grid):
    """Zeros with a scale of zero, as 4-bit blocks have them, and a multiplier that is not the scale's reciprocal."""
    case = layer(5, 32, 4, grid, seed=1, group=16)
    case.weight[:, :16] = 0.0
    if grid in ("nf4", "fp4"):
        case.scale[:, 0] = 0.0
    multiplier = torch.from_numpy(1 / np.maximum(case.scale, np.float32(1e-38))).nextafter(torch.tensor(0.0))
    feedback = case.feedback()
    ours = refined(case, feedback, device, multiplier=multiplier.to(device))
    expected = case.defined(feedback, multiplier=multiplier)
    assert_same(ours.codes, torch.from_numpy(expected.codes))


def test_rows_that_come_out_worse_keep_nearest(device):
    """A gain of the wrong sign makes feedback harmful, so that the guard has something to do in most rows."""
    case = layer(9, 20, 3, "int8", seed=2)
    good = case.feedback()
    feedback = Feedback(**{**vars(good), "gains": -good.gains, "coupling": -good.coupling})
    check(case, feedback, device)
    ours = refined(case, feedback, device)
    free = refined(case, feedback, device, guard=False)
    assert (ours.codes != free.codes).any() and (free.before != free.before).all()


def test_signs_of_zeros(device):
    """E4M3 has a code for -0: what the definition calls so, we do."""
    case = layer(8, 12, 2, "e4m3", seed=3)
    case.weight[:, ::2] = np.where(case.weight[:, ::2] < 0, np.float32(-0.0), np.float32(0.0))
    for vectors in (case.vectors, np.zeros_like(case.vectors)):
        check(case, low_rank_feedback(case.remainder, vectors), device)


def test_a_feedback_is_uploaded_once_and_forgotten_with_its_layer(device):
    case = layer(3, 33, 2, "int8", seed=4)
    feedback = case.feedback()
    gc.collect()
    count = len(device_feedback._cache)
    uploaded = device_feedback.on_device(feedback, torch.device(device))
    assert device_feedback.on_device(feedback, torch.device(device)) is uploaded
    assert len(device_feedback._cache) == count + 1
    del feedback
    gc.collect()
    assert len(device_feedback._cache) == count


def test_launcher_refuses_what_the_kernels_cannot_take(device):
    case = layer(4, 40, 2, "int8", seed=6)
    tile, scale = torch.from_numpy(case.weight).to(device), torch.from_numpy(case.scale).to(device)
    groups, feedback = torch.from_numpy(case.column_group).to(device), case.feedback()
    with pytest.raises(AssertionError, match="scale has shape"):
        refine(tile, scale[:3], groups, feedback, "int8")
    with pytest.raises(AssertionError, match="multiplier is torch.float64"):
        refine(tile, scale, groups, feedback, "int8", scale.double())
    with pytest.raises(AssertionError, match="column_group has shape"):
        refine(tile, scale, groups[1:], feedback, "int8")
    with pytest.raises(AssertionError, match="feedback is of 41 columns"):
        refine(tile, scale, groups, dense_feedback(np.eye(41)), "int8")
    with pytest.raises(AssertionError, match="not float32"):
        refine(tile, scale, groups, case.feedback(dtype=np.float64), "int8")
    with pytest.raises(AssertionError, match="no grid 'e5m2'"):
        refine(tile, scale, groups, feedback, "e5m2")


def test_no_rows(device):
    case = layer(1, 40, 2, "int8", seed=7)
    tile, scale = torch.zeros(0, 40, device=device), torch.zeros(0, 1, device=device)
    assert refine(tile, scale, torch.zeros(40, dtype=torch.int64), case.feedback(), "int8").codes.shape == (0, 40)

