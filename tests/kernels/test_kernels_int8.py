"""INT8 codes: compiled against the reference bit for bit, both against the definition in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiles import JIT, QUICK, TORCH, all_bf16, dtypes, group_sizes, kinds, loads, seeds, weights

from streamquant.kernels import ErrorSums


def check(tensor: torch.Tensor, scale: np.ndarray) -> np.ndarray:
    """Both backends give what numpy's division, half-even rounding and clamping give; returns the codes."""
    group = tensor.numel() // scale.size
    jit_tile, torch_tile = loads(tensor)
    jit = JIT.int8(jit_tile, group, scale, ErrorSums())
    reference = TORCH.int8(torch_tile, group, scale, ErrorSums())
    assert jit.dtype == reference.dtype == np.int8
    wrong = np.flatnonzero(jit != reference)
    assert not wrong.size, (tensor[wrong[:5]], jit[wrong[:5]], reference[wrong[:5]])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        steps = tensor.float().numpy().reshape(scale.size, -1) / scale[:, None]
        expected = np.nan_to_num(np.clip(np.rint(steps), -127, 127), nan=0.0).astype(np.int8).reshape(-1)
    assert np.array_equal(reference, expected)
    return jit


@QUICK
@given(kinds, dtypes, group_sizes, st.integers(1, 5), seeds)
def test_scaled_to_127(kind, dtype, group, groups, seed):
    """The scales that formats use."""
    tensor = weights(kind, groups * group, dtype, seed)
    absmax = tensor.float().abs().view(groups, group).amax(dim=1).numpy()
    check(tensor, np.maximum(absmax / np.float32(127), np.float32(1e-12)))


@QUICK
@given(kinds, dtypes, st.integers(1, 40), st.integers(1, 30), seeds)
def test_any_scale(kind, dtype, group, groups, seed):
    scale = np.exp2(np.random.default_rng(seed).uniform(-126, 127, groups)).astype(np.float32)
    check(weights(kind, groups * group, dtype, seed), scale)


@pytest.mark.parametrize("scale", [1.0, 0.0123, 2.0**-120, 1e30, 1.1754943508222875e-38])
def test_every_bf16_pattern_but_nan(scale):
    patterns = all_bf16()
    check(patterns[~patterns.isnan()], np.array([scale], dtype=np.float32))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("scale", [2.0**-9, 1.0, 4.0])
def test_exact_ties_go_to_even(dtype, scale):
    halves = (torch.arange(-255, 256, dtype=torch.float64) / 2 * scale).to(weights("gauss", 1, dtype, 0).dtype)
    expected = [max(-127, min(127, round(Fraction(value) / Fraction(scale)))) for value in halves.tolist()]
    assert check(halves, np.array([scale], dtype=np.float32)).tolist() == expected


def test_it_divides_and_does_not_multiply_by_a_reciprocal():
    """Weights whose quotient is a tie only when divided: the reciprocal's own rounding pushes it over."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(1e-4, 1e-2, 200_000).astype(np.float32)
    weight = (scale * (rng.integers(-126, 126, scale.size) + np.float32(0.5))).astype(np.float32)
    divided = np.rint(weight / scale)
    differs = divided != np.rint(weight * (np.float32(1) / scale))
    assert differs.sum() > 1000
    codes = check(torch.from_numpy(weight[differs]), scale[differs])
    assert np.array_equal(codes, divided[differs].astype(np.int8))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_infinities_saturate(dtype):
    tensor = torch.tensor([float("inf"), -float("inf"), 1.0] * 11).to(weights("gauss", 1, dtype, 0).dtype)
    assert check(tensor, np.ones(1, np.float32))[:3].tolist() == [127, -127, 1]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_nan_encodes_as_zero_in_the_reference_and_disturbs_no_neighbour(dtype):
    """The compiled path leaves NaN to its caller."""
    for position in (0, 15, 16, 4096):
        tensor = weights("gauss", 5000, dtype, seed=position)
        tensor[position] = -float("nan") if position % 2 else float("nan")
        jit_tile, torch_tile = loads(tensor)
        scale = np.full(1, 0.001, np.float32)
        reference = TORCH.int8(torch_tile, 5000, scale, ErrorSums())
        assert reference[position] == 0
        jit = JIT.int8(jit_tile, 5000, scale, ErrorSums())
        assert np.array_equal(np.delete(jit, position), np.delete(reference, position))


def test_no_code_is_minus_128():
    tensor = torch.tensor([-127.49, -128.0, -1000.0, -3e38])
    assert check(tensor, np.ones(1, np.float32)).tolist() == [-127] * 4


@pytest.mark.parametrize("group", [300_001, 1001])
def test_tiles_larger_than_a_chunk_of_the_torch_backend(group):
    groups = 600_002 // group
    tensor = weights("gauss", groups * group, "BF16", seed=1)
    check(tensor, np.linspace(0.0002, 0.001, groups).astype(np.float32))
