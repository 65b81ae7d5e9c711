"""The rotation against its reference bit for bit, the reference against its matrix, and the fused INT8 codes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same import FEW, assert_same, dtypes
from tiles import kinds, seeds, weights

from streamquant.kernels import hadamard as reference
from streamquant.kernels import int8 as int8_reference
from streamquant.kernels.absmax import group_absmax
from streamquant.kernels.gpu import hadamard, int8, launch

group_sizes = pytest.mark.parametrize("group_size", [4, 16, 64, 256, 1024])


def matrix(group_size: int) -> torch.Tensor:
    """H in float64."""
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < group_size:
        h = torch.kron(h, h4)
    return h / group_size**0.5


@group_sizes
def test_reference_is_the_product_with_the_matrix(group_size):
    weight = weights("gauss", 5 * 3 * group_size, "BF16", group_size).view(5, -1)
    h = matrix(group_size)
    assert torch.equal(h, h.T) and torch.allclose(h @ h, torch.eye(group_size, dtype=torch.float64))
    expected = (weight.double().view(5, 3, group_size) @ h).view(5, -1)
    assert torch.allclose(reference.rotate(weight, group_size).double(), expected, rtol=0, atol=1e-7)
    twice = reference.rotate(reference.rotate(weight, group_size), group_size)
    assert torch.allclose(twice, weight.float(), rtol=0, atol=1e-7)


def test_reference_does_not_depend_on_its_chunks():
    weight = weights("gauss", 40 * 512, "F32", 1).view(40, 512)
    with mock.patch.object(reference, "CHUNK", 64):
        pieces = reference.rotate(weight, 64)
    assert torch.equal(pieces, reference.rotate(weight, 64))


@FEW
@given(st.integers(0, 9), st.integers(1, 5), st.sampled_from([4, 16, 64]), kinds, dtypes, seeds)
def test_rotate(device, rows, groups, group_size, kind, dtype, seed):
    weight = weights(kind, max(rows, 1) * groups * group_size, dtype, seed).view(max(rows, 1), -1)[:rows]
    assert_same(hadamard.rotate(weight.to(device), group_size), reference.rotate(weight, group_size))


@group_sizes
def test_rotate_sizes(device, group_size):
    weight = weights("gauss", 7 * 3072, "BF16", group_size).view(7, 3072)
    assert_same(hadamard.rotate(weight.to(device), group_size), reference.rotate(weight, group_size))


def check(weight: torch.Tensor, group_size: int, device: str) -> None:
    """Fused equals: the reference's rotation, then absmax, scale and codes of that."""
    codes, scale, absmax = hadamard.encode_rows(weight.to(device), group_size)
    rotated = reference.rotate(weight, group_size)
    expected_absmax = group_absmax(rotated)
    finite = group_absmax(rotated.where(rotated.isfinite(), 0.0))
    expected_scale = torch.clamp(finite / 127, min=int8.SMALLEST_ROW_SCALE)
    assert_same(absmax, expected_absmax, "absmax")
    assert_same(scale, expected_scale, "scale")
    assert_same(codes, int8_reference.encode(rotated, expected_scale), "codes")


@FEW
@given(st.integers(1, 6), st.integers(1, 9), kinds, dtypes, seeds, st.booleans())
def test_fused_int8_rows(device, rows, groups, kind, dtype, seed, streamed):
    weight = weights(kind, rows * groups * 16, dtype, seed).view(rows, -1)
    with mock.patch.object(launch, "RESIDENT_ELEMENTS", 64 if streamed else launch.RESIDENT_ELEMENTS):
        check(weight, 16, device)


def test_real_sizes(device):
    check(weights("outlier", 2 * 6144, "BF16", 1).view(2, -1), 256, device)
    check(weights("gauss", 2 * 36864, "BF16", 2).view(2, -1), 256, device)
    check(weights("gauss", 5 * 192, "F16", 3).view(5, -1), 64, device)


@pytest.mark.parametrize("streamed", [False, True])
def test_nonfinite_and_sums(device, streamed):
    weight = weights("gauss", 12 * 160, "F32", 4).view(12, 160)
    with mock.patch.object(launch, "RESIDENT_ELEMENTS", 64 if streamed else launch.RESIDENT_ELEMENTS):
        codes, scale, _, sums = (part.cpu() for part in hadamard.encode_rows(weight.to(device), 16, measure=True))
        error = int8_reference.decode(codes, scale, torch.float32).double() - reference.rotate(weight, 16).double()
        expected = [float(error.square().sum()), float(weight.double().square().sum())]
        assert sums.tolist() == pytest.approx(expected, rel=1e-4)
        weight[0, 3], weight[1, 9], weight[2] = float("nan"), float("inf"), float("-inf")
        check(weight, 16, device)


@pytest.mark.parametrize("group_size", [0, 1, 2, 8, 128, 12])
def test_only_powers_of_4(device, group_size):
    weight = torch.zeros(2, 384, device=device)
    for rotate in (reference.rotate, hadamard.rotate, hadamard.encode_rows):
        with pytest.raises(AssertionError, match="power of 4"):
            rotate(weight, group_size)
        with pytest.raises(AssertionError, match="not divisible"):
            rotate(weight, 256)
