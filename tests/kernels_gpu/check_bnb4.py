"""NF4 and FP4 encoding against the reference, which is bitsandbytes to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same import FEW, assert_same, dtypes, every_bits
from tiles import kinds, seeds, weights, with_neighbours

from streamquant.kernels import bnb4 as reference
from streamquant.kernels.codebooks import BOUNDARIES
from streamquant.kernels.gpu import bnb4

books = pytest.mark.parametrize("book", ["nf4", "fp4"])


def check(flat: torch.Tensor, block_size: int, book: str, device: str) -> None:
    packed, absmax = bnb4.encode(flat.to(device), block_size, book)
    expected_packed, expected_absmax = reference.encode(flat, block_size, book)
    assert_same(absmax, expected_absmax, "absmax")
    assert_same(packed, expected_packed, "packed")


@FEW
@given(st.integers(0, 700), st.sampled_from([2, 32, 64, 256]), st.sampled_from(["nf4", "fp4"]), kinds, dtypes, seeds)
def test_any_length(device, elements, block_size, book, kind, dtype, seed):
    if elements:
        check(weights(kind, elements, dtype, seed), block_size, book, device)


@books
@pytest.mark.parametrize("elements", [1, 63, 64, 65, 999 * 65, 4096 * 3 + 1])
def test_sizes(device, book, elements):
    for block_size in (64, 4096):
        check(weights("gauss", elements, "BF16", elements), block_size, book, device)


@books
def test_boundaries_and_their_neighbours(device, book):
    """A value on a boundary takes the lower code: in full blocks, and in the short one that divides."""
    points = with_neighbours(np.concatenate([BOUNDARIES[book], -BOUNDARIES[book]]))
    for scale in (1.0, 0.5, 3.0):
        flat = torch.from_numpy(points * np.float32(scale))
        blocks = torch.cat([part for value in flat.split(31) for part in (torch.tensor([scale]), value)])
        check(blocks, 32, book, device)
        check(blocks, 128, book, device)


@books
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern(device, book, dtype):
    """Blocks with NaN, with infinities, of zeros of either sign, of subnormals."""
    check(every_bits(dtype).view(-1), 64, book, device)
    check(every_bits(dtype).view(-1)[:-7], 4096, book, device)


@books
def test_zeros_and_what_is_below_the_smallest_divisor(device, book):
    flat = torch.zeros(200)
    flat[64:] = torch.tensor(1e-38).nextafter(torch.tensor(0.0))
    flat[128:], flat[130] = 2e-39, -1e-45
    check(flat, 64, book, device)


@books
def test_error_sums(device, book):
    for elements in (64 * 50, 64 * 50 + 17):
        flat = weights("gauss", elements, "BF16", elements)
        packed, absmax, sums = bnb4.encode(flat.to(device), 64, book, measure=True)
        error = reference.decode(packed.cpu(), absmax.cpu(), 64, book, elements).double() - flat.double()
        expected = [float(error.square().sum()), float(flat.double().square().sum())]
        assert sums.tolist() == pytest.approx(expected, rel=1e-4)


def test_launcher_refuses_what_the_kernel_cannot_take(device):
    flat = torch.zeros(64, device=device)
    with pytest.raises(AssertionError, match="power of two"):
        bnb4.encode(flat, 48, "nf4")
    with pytest.raises(AssertionError, match="float64"):
        bnb4.encode(flat.double(), 64, "nf4")
