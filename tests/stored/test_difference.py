"""The measures of a difference against float64 arithmetic on the whole arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamquant.stored.difference import Difference, measure


def summed(decoded: np.ndarray, reference: np.ndarray, cut: int) -> Difference:
    """Measured in two ranges."""
    total = Difference()
    total.add(measure(decoded[:cut], reference[:cut]))
    total.add(measure(decoded[cut:], reference[cut:], cut))
    return total


@given(
    st.integers(1, 9000),
    st.integers(0, 9000),
    st.floats(1e-6, 10),
    st.sampled_from([1e-18, 1e-4, 1.0, 1e15]),
    st.integers(0, 99),
)
def test_measures_are_those_of_float64(size, cut, noise, scale, seed):
    rng = np.random.default_rng(seed)
    reference = (rng.standard_normal(size) * scale).astype(np.float32)
    decoded = (reference + rng.standard_normal(size) * noise * scale).astype(np.float32)
    found = summed(decoded, reference, min(cut, size))
    w, d = reference.astype(np.float64), decoded.astype(np.float64)
    relative = np.linalg.norm(d - w) / np.linalg.norm(w)
    assert found.relative_error == pytest.approx(relative, rel=1e-4, abs=1e-6)
    assert found.signal_to_noise == pytest.approx(
        -20 * math.log10(max(relative, 1e-30)), abs=0.01 + (1 if relative < 1e-5 else 0)
    )
    # Where noise has all but cancelled a weight, what is left is known to fewer digits.
    lost = max((w @ w) / (d @ d), 1)
    assert found.cosine == pytest.approx(d @ w / np.linalg.norm(d) / np.linalg.norm(w), abs=1e-5 * lost)
    assert found.factor == pytest.approx(d @ w / (d @ d), rel=1e-4 * lost, abs=1e-5)
    error = np.abs(decoded - reference)
    assert (found.largest, found.largest_at) == (error.max(), error.argmax())
    assert found.elements == size


def test_nothing_but_zeros():
    zeros, ones = np.zeros(5, dtype=np.float32), np.ones(5, dtype=np.float32)
    assert measure(zeros, zeros).relative_error == 0 and measure(zeros, zeros).cosine == 1
    lost = measure(zeros, ones)
    assert (lost.relative_error, lost.cosine, lost.factor, lost.decoded_energy) == (1, 0, None, 0)
    assert math.isinf(measure(ones, zeros).relative_error) and measure(ones, zeros).signal_to_noise == -math.inf
    assert measure(ones, ones).signal_to_noise == math.inf
    assert measure(zeros[:0], zeros[:0]).elements == 0


def test_what_is_no_number_is_counted_and_left_out():
    reference = np.array([1, np.nan, np.inf, 2, 3], dtype=np.float32)
    decoded = np.array([1, 5, 7, np.nan, 3.5], dtype=np.float32)
    found = measure(decoded, reference, begin=100)
    assert (found.skipped, found.nonfinite, found.elements) == (2, 1, 5)
    assert found.weight == 10 and found.error == pytest.approx(0.25)
    assert (found.largest, found.largest_at) == (0.5, 104)


def test_squares_beyond_float32():
    reference = np.array([3e30, -4e30], dtype=np.float32)
    found = measure(np.zeros(2, dtype=np.float32), reference)
    assert found.weight == pytest.approx(25e60, rel=1e-5) and found.relative_error == pytest.approx(1)
