"""Largest magnitudes: compiled against the reference, both against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiles import JIT, QUICK, TORCH, all_bf16, dtypes, group_sizes, kinds, loads, seeds, weights


def check(tensor: torch.Tensor, group: int) -> None:
    jit_tile, torch_tile = loads(tensor)
    expected = np.abs(tensor.float().double().numpy()).reshape(-1, group).max(axis=1).astype(np.float32)
    for found in (JIT.absmax(jit_tile, group), TORCH.absmax(torch_tile, group)):
        assert found.dtype == np.float32
        # NaN needs no particular payload; everything else is equal in its bits, +0 for zeros of either sign included.
        assert np.array_equal(np.isnan(found), np.isnan(expected))
        assert np.array_equal(found.view(np.uint32)[~np.isnan(found)], expected.view(np.uint32)[~np.isnan(expected)])


@QUICK
@given(kinds, dtypes, group_sizes, st.integers(1, 5), seeds)
def test_largest_magnitude_of_each_group(kind, dtype, group, groups, seed):
    check(weights(kind, groups * group, dtype, seed), group)


@pytest.mark.parametrize("group", [1, 8, 256])
def test_every_bf16_pattern(group):
    check(all_bf16(), group)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("special", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_one_special_value_shows_wherever_it_stands(dtype, special):
    for position in (0, 1, 15, 16, 33, 99):
        tensor = weights("gauss", 200, dtype, seed=position)
        tensor[position] = special
        check(tensor, 100)


def test_nan_outranks_infinity():
    check(torch.tensor([float("inf"), float("nan"), 1.0, -float("inf")]), 4)


def test_zeros_of_either_sign_have_magnitude_plus_zero():
    check(torch.tensor([-0.0] * 40), 8)


def test_float64_beyond_float32_is_infinite():
    jit_tile, torch_tile = loads(torch.tensor([1.0, 1e300, -1e39, 2.0], dtype=torch.float64))
    assert JIT.absmax(jit_tile, 2).tolist() == TORCH.absmax(torch_tile, 2).tolist() == [float("inf")] * 2


@pytest.mark.parametrize("group", [1 << 19, (1 << 18) + 1, 1000])
def test_groups_larger_than_a_chunk_of_the_torch_backend(group):
    elements = (1 << 19) // group * group
    check(weights("bits", elements, "BF16", seed=group), group)
