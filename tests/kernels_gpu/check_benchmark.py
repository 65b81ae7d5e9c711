"""The harness for the kernels, at a tiny size: every contender gives a row with a time."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from benchmarks import gpu_kernels


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize(
    "only, peer",
    [
        ("absmax", ""),
        ("encode int8 rows", "comfy-kitchen"),
        ("encode nf4", "bitsandbytes"),
        ("decode fp8 tensor", "comfy-kitchen"),
        ("decode nf4", "bitsandbytes"),
    ],
)
def test_every_contender_runs(device, console, only, peer):
    recorded = []
    rows = gpu_kernels.run(console, 128, 256, 1, device, only, recorded.extend)
    assert rows == recorded and rows
    for row in rows:
        assert row.benchmark == "kernels" and row.runs == 1 and row.p50 > 0 and row.bytes_per_second > 0, row
        assert row.note == "" and (row.ratio is None) == (row.contender == gpu_kernels.COPY)
    assert {row.contender.split()[0] for row in rows} == {"torch", "streamquant", peer} - {""}


def test_refinements(device):
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).to(device)
    plain, *_, swept = gpu_kernels.refinements(weight)
    for operation in (plain, swept):
        ((_, load),) = operation.entries
        codes, before, after = load()()
        assert codes.shape == weight.shape and (after <= before).all() and after.sum() < before.sum()


def test_copies_move_the_bytes_of_the_operation(device):
    moved = gpu_kernels._copy(1000, device)
    assert moved().nbytes == 500


def test_sizes_that_have_no_blocks_are_refused(device, console):
    with pytest.raises(gpu_kernels.click.ClickException, match="columns of 256"):
        gpu_kernels.run(console, 128, 128, 1, device)
