"""Weights for the checks of this folder, and how results are compared."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from tiles import kinds, seeds, weights

# The interpreter takes milliseconds for what a device does in one step.
FEW = settings(max_examples=12, deadline=None)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
dtypes = st.sampled_from(sorted(DTYPES))


ROWS = st.integers(1, 9)
COLUMNS = st.one_of(st.integers(1, 70), st.sampled_from([127, 255, 300]))


@st.composite
def matrices(draw, rows=ROWS, columns=COLUMNS):
    """float tensors [rows, columns] of every kind of weight that `tiles` knows."""
    shape = draw(rows), draw(columns)
    return weights(draw(kinds), shape[0] * shape[1], draw(dtypes), draw(seeds)).view(shape)


def every_bits(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a 16-bit dtype, NaN and infinities included: [1, 65536]."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).view(1, -1)


def assert_same(ours: torch.Tensor, reference: torch.Tensor, what: str = "") -> None:
    """Same dtype, shape and bits; a NaN equals any other."""
    ours = ours.cpu()
    assert ours.dtype == reference.dtype and ours.shape == reference.shape, what
    if ours.element_size() == 1:
        ours, reference = ours.view(torch.uint8), reference.view(torch.uint8)
        wrong = ours != reference
    else:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
        wrong = (ours.view(bits) != reference.view(bits)) & ~(ours.isnan() & reference.isnan())
    where = wrong.nonzero()[:5].tolist()
    assert not wrong.any(), f"{what} {int(wrong.sum())} differ, at {where}: {ours[wrong][:5]} {reference[wrong][:5]}"
