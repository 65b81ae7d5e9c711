"""FP8 codes: compiled against the reference bit for bit, and the reference against torch's own cast and ml_dtypes'."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiles import JIT, QUICK, TORCH, all_bf16, dtypes, group_sizes, kinds, loads, seeds, weights, with_neighbours

from streamquant.kernels import ErrorSums

GRIDS = {
    "e4m3": (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, 448.0),
    "e5m2": (torch.float8_e5m2, ml_dtypes.float8_e5m2, 57344.0),
}
grids = st.sampled_from(sorted(GRIDS))


def encode_both(tensor: torch.Tensor, multiplier: np.ndarray, grid: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes of each group by the compiled path and by the reference."""
    group = tensor.numel() // multiplier.size
    with np.errstate(all="ignore"):
        scale = np.float32(1) / multiplier
    jit_tile, torch_tile = loads(tensor)
    return (
        JIT.fp8(jit_tile, group, multiplier, scale, grid, ErrorSums()),
        TORCH.fp8(torch_tile, group, multiplier, scale, grid, ErrorSums()),
    )


def check(tensor: torch.Tensor, multiplier: np.ndarray, grid: str) -> np.ndarray:
    """Both backends and ml_dtypes agree; returns the codes."""
    jit, reference = encode_both(tensor, multiplier, grid)
    assert jit.dtype == reference.dtype == np.uint8
    wrong = np.flatnonzero(jit != reference)
    assert not wrong.size, (tensor[wrong[:5]], jit[wrong[:5]], reference[wrong[:5]])
    _, dtype, largest = GRIDS[grid]
    with np.errstate(over="ignore", under="ignore"):
        scaled = tensor.float().numpy().reshape(multiplier.size, -1) * multiplier[:, None]
    expected = np.clip(scaled, -largest, largest).astype(dtype).view(np.uint8).reshape(-1)
    assert np.array_equal(reference, expected)
    return jit


@pytest.mark.parametrize("grid", GRIDS)
def test_every_decision_boundary_and_its_neighbours(grid):
    """Each code's value, each midpoint between two, and the float32 below and above each of these, with both signs."""
    torch_dtype, dtype, largest = GRIDS[grid]
    values = np.arange(128, dtype=np.uint8).view(dtype).astype(np.float64)
    values = values[np.isfinite(values)]
    assert values[-1] == largest
    above = 2 * values[-1] - values[-2]  # what the next value would be: its midpoint and all beyond saturate
    points = np.concatenate([values, (values[:-1] + values[1:]) / 2, [(largest + above) / 2, above, 1e30]])
    points = with_neighbours(points)
    points = np.concatenate([points, -points, [np.inf, -np.inf]]).astype(np.float32)
    codes = check(torch.from_numpy(points), np.ones(1, np.float32), grid)

    torch_codes = torch.from_numpy(points).clamp(-largest, largest).to(torch_dtype).view(torch.uint8).numpy()
    assert np.array_equal(codes, torch_codes)
    # And by no library at all: the nearest value, of two equally near the one with an even code.
    magnitudes = np.minimum(np.abs(points.astype(np.float64)), largest)
    distance = np.abs(magnitudes[:, None] - values[None, :])
    nearest = distance == distance.min(axis=1, keepdims=True)
    even = np.where(nearest.sum(axis=1) > 1, nearest[:, ::2].argmax(axis=1) * 2, nearest.argmax(axis=1))
    assert np.array_equal(codes & 0x7F, even)
    assert np.array_equal(codes >> 7, np.signbit(points))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("multiplier", [1.0, 448 / 3.1, 57344.0, 2.0**-6, 1.5 * 2.0**-120, 3e38, 4.48e14, 1e-40])
def test_every_bf16_pattern_but_nan(grid, multiplier):
    patterns = all_bf16()
    check(patterns[~patterns.isnan()], np.array([multiplier], dtype=np.float32), grid)


@QUICK
@given(kinds, dtypes, group_sizes, st.integers(1, 5), grids, seeds)
def test_scaled_to_the_grid(kind, dtype, group, groups, grid, seed):
    """The multipliers that formats use: the largest code over the group's largest magnitude."""
    tensor = weights(kind, groups * group, dtype, seed)
    absmax = tensor.float().abs().view(groups, group).amax(dim=1).numpy()
    check(tensor, np.float32(GRIDS[grid][2]) / np.maximum(absmax, np.float32(1e-12)), grid)


@QUICK
@given(kinds, dtypes, st.integers(1, 40), st.integers(1, 30), grids, seeds)
def test_any_multiplier(kind, dtype, group, groups, grid, seed):
    """Products that overflow, underflow or fall among the grid's subnormals; one multiplier per group, none shared."""
    multiplier = np.exp2(np.random.default_rng(seed).uniform(-126, 127, groups)).astype(np.float32)
    check(weights(kind, groups * group, dtype, seed), multiplier, grid)


@pytest.mark.parametrize("grid", GRIDS)
def test_ties_go_to_the_even_code_among_subnormals_too(grid):
    _, dtype, _ = GRIDS[grid]
    quantum = np.arange(2, dtype=np.uint8).view(dtype).astype(np.float32)[1]
    halves = np.arange(0, 9, dtype=np.float32) / 2 * quantum
    codes = check(torch.from_numpy(halves), np.ones(1, np.float32), grid)
    assert codes[:8].tolist() == [0, 0, 1, 2, 2, 2, 3, 4]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_infinities_saturate_and_zeros_keep_their_sign(grid, dtype):
    special = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0] * 5, dtype=torch.float64)
    tensor = special.to(weights("gauss", 1, dtype, 0).dtype)
    codes = check(tensor, np.full(1, 2.0, np.float32), grid)
    largest = {"e4m3": 0x7E, "e5m2": 0x7B}[grid]
    assert codes[:4].tolist() == [largest, largest | 0x80, 0, 0x80]


@pytest.mark.parametrize("grid", GRIDS)
def test_nan_does_not_disturb_its_neighbours(grid):
    """What a NaN encodes as is the caller's business; that everything beside it is right is the kernel's."""
    for position in (0, 7, 16, 4095, 4096):
        tensor = weights("gauss", 5000, "BF16", seed=position)
        tensor[position] = float("nan")
        jit, reference = encode_both(tensor, np.full(1, 1000, np.float32), grid)
        assert np.array_equal(np.delete(jit, position), np.delete(reference, position))


@pytest.mark.parametrize("group", [300_001, 1001])
def test_tiles_larger_than_a_chunk_of_the_torch_backend(group):
    groups = 600_002 // group
    tensor = weights("gauss", groups * group, "BF16", seed=1)
    check(tensor, np.linspace(100, 20000, groups).astype(np.float32), "e4m3")


def test_the_tile_itself_is_left_alone():
    tensor = weights("gauss", 64, "F32", seed=3)
    _, tile = loads(tensor)
    TORCH.fp8(tile, 64, np.full(1, 9.0, np.float32), np.full(1, 1 / 9, np.float32), "e4m3", ErrorSums())
    assert torch.equal(tile, tensor)
