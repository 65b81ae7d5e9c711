"""Every check of every Triton kernel, compiled; and refinement of whole layers."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from checks import CHECKS, run_checks
from layers import layer
from tiles import weights

from streamquant.kernels import bnb4 as reference
from streamquant.kernels import gpu
from streamquant.kernels.codebooks import CODE_BOOKS
from streamquant.kernels.jit.refine import refine as compiled
from streamquant.kernels.refined import GRIDS

NO_DEVICE = gpu.why_not()
pytestmark = pytest.mark.skipif(NO_DEVICE is not None, reason=f"the Triton kernels cannot run: {NO_DEVICE}")


@pytest.mark.parametrize("name", CHECKS)
def test_compiled(name):
    run_checks(name, {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"})


@pytest.mark.parametrize("shape", [(6144, 3072), (257, 12288), (1000, 1001)], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_refinement_of_whole_layers(grid, shape):
    """The compiled CPU path's codes and objectives, to the bit, with act-order and sweeps."""
    check_layer(grid, shape, rank=64, dense=False, sweeps=2)


@pytest.mark.parametrize("grid", GRIDS)
def test_refinement_with_a_dense_h(grid):
    check_layer(grid, (1024, 1536), rank=64, dense=True, sweeps=1)


def check_layer(grid: str, shape: tuple[int, int], rank: int, dense: bool, sweeps: int, device: str = "cuda") -> None:
    from streamquant.kernels.gpu.refine import refine

    case = layer(*shape, rank, grid, seed=1, group=64)
    feedback = case.feedback(dense)
    tensors = (torch.from_numpy(part).to(device) for part in (case.weight, case.scale, case.column_group))
    ours = refine(*tensors, feedback, grid, sweeps=sweeps)
    expected = compiled(case.weight, case.scale, case.column_group, feedback, grid, sweeps=sweeps)
    for name in ("codes", "before", "after"):
        np.testing.assert_array_equal(getattr(ours, name).cpu().numpy(), getattr(expected, name), name)


@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_bitsandbytes_on_the_device_reads_what_we_write(book):
    """Its decoding gives our numbers; its encoding differs in the rare weight on a boundary, and in blocks of zeros."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    from streamquant.kernels.gpu import bnb4

    weight = weights("gauss", 1 << 22, "BF16", seed=1).view(2048, 2048).cuda()
    packed, absmax = bnb4.encode(weight.view(-1), 64, book)
    code = torch.from_numpy(CODE_BOOKS[book]).cuda()
    state = functional.QuantState(absmax, weight.shape, code, 64, book, torch.float32)
    theirs = functional.dequantize_4bit(packed.view(-1, 1), state)
    ours = reference.decode(packed.cpu(), absmax.cpu(), 64, book, weight.numel())
    assert torch.equal(theirs.cpu().view(-1), ours)
    their_packed, their_state = functional.quantize_4bit(weight, blocksize=64, quant_type=book)
    assert torch.equal(their_state.absmax, absmax)
    assert (their_packed.view(-1) != packed).float().mean() < 1e-4
