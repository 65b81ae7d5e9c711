"""The compiled rotation against its definition in plain torch, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from streamquant.kernels import JitBackend, TorchBackend, why_no_jit

pytestmark = pytest.mark.skipif(why_no_jit() is not None, reason=f"needs numba: {why_no_jit()}")


def rotated(values: np.ndarray, dtype: str, group: int) -> tuple[np.ndarray, np.ndarray]:
    raw = values.astype(np.float32)
    raw = (raw.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else raw
    compiled, reference = (backend.rotate(backend.load(raw.tobytes(), dtype), group) for backend in (JitBackend(), TorchBackend()))
    return np.asarray(compiled), reference.numpy()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7, 16, 33])
@pytest.mark.parametrize("group", [4, 16, 64, 256, 1024, 4096])
def test_bits_of_any_number_of_groups(group, groups, dtype):
    values = np.random.default_rng(group + groups).standard_normal(group * groups) * 0.05
    values[:: 7] = -0.0
    compiled, reference = rotated(values, dtype, group)
    np.testing.assert_array_equal(compiled.view(np.uint32), reference.view(np.uint32))


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_what_is_no_number_spreads_over_its_group_and_no_further(group):
    values = np.random.default_rng(group).standard_normal(group * 5)
    values[group + 1], values[3 * group + 2] = np.nan, np.inf
    compiled, reference = rotated(values, "F32", group)
    np.testing.assert_array_equal(compiled, reference)
    assert np.isfinite(compiled.reshape(5, group)).all(axis=1).tolist() == [True, False, True, False, True]
