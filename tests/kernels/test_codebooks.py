"""The value tables against bitsandbytes' own and against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from bitsandbytes import functional

from streamquant.kernels import codebooks


@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_book_is_bitsandbytes_s_own(book):
    theirs = functional.get_4bit_type(book, device="cpu").numpy()
    ours = codebooks.CODE_BOOKS[book]
    assert ours.dtype == np.float32
    assert ours.tobytes() == theirs.tobytes()  # bytes: the signs of FP4's zeros count


@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_ascending_codes_sort_the_book(book):
    codes = codebooks.ASCENDING_CODES[book]
    values = codebooks.CODE_BOOKS[book][codes]
    assert sorted(codes.tolist()) == list(range(16))
    steps = np.diff(values)
    # FP4's two zeros are equal; nothing else is.
    assert (steps >= 0).all() and (steps == 0).sum() == (1 if book == "fp4" else 0)


@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_boundaries_are_the_float32_midpoints(book):
    values = sorted(codebooks.CODE_BOOKS[book].tolist())
    pairs = [(np.float32(low), np.float32(high)) for low, high in itertools.pairwise(values)]
    expected = [(low + high) / np.float32(2) for low, high in pairs]
    assert codebooks.BOUNDARIES[book].tolist() == [float(value) for value in expected]


def test_dynamic_map_is_bitsandbytes_s_own():
    theirs = functional.create_dynamic_map().numpy()
    assert codebooks.DYNAMIC_MAP.dtype == np.float32
    assert codebooks.DYNAMIC_MAP.tobytes() == theirs.tobytes()
    assert codebooks.DYNAMIC_MAP[127] == 0


def test_dynamic_map_follows_its_definition():
    """For i = 0…6 the 2**i midpoints of linspace(0.1, 1, 2**i + 1) times 10**(i - 6), both signs; and 0 and 1."""
    expected = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        expected += [*means, *-means]
    assert len(expected) == 256
    assert np.allclose(codebooks.DYNAMIC_MAP, sorted(expected), rtol=2e-7, atol=0)


def test_dynamic_boundaries_lie_between_their_neighbours():
    low, high = codebooks.DYNAMIC_MAP[:-1], codebooks.DYNAMIC_MAP[1:]
    assert (low < codebooks.DYNAMIC_BOUNDARIES).all() and (codebooks.DYNAMIC_BOUNDARIES < high).all()
    midpoints = (low.astype(np.float64) + high) / 2
    assert np.allclose(codebooks.DYNAMIC_BOUNDARIES, midpoints, rtol=1e-7, atol=1e-12)
