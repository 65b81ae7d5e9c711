"""FP8 and INT8 encoding: codes, scales and magnitudes against the references and the formats' own scale formulas."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same import FEW, assert_same, every_bits, matrices
from tiles import weights, with_neighbours

from streamquant.formats.fp8 import Float8Encoder
from streamquant.formats.int8 import Int8Encoder
from streamquant.formats.scaling import ScaleGeometry
from streamquant.kernels import fp8 as fp8_reference
from streamquant.kernels import int8 as int8_reference
from streamquant.kernels.gpu import fp8, int8, launch

FP8 = ("e4m3", "e5m2")
GRIDS = (*FP8, "int8")
grids = st.sampled_from(GRIDS)


def encode(grid: str, tile: torch.Tensor, factor: torch.Tensor, device: str) -> torch.Tensor:
    tile, factor = tile.to(device), factor.to(device)
    return (int8.encode(tile, factor) if grid == "int8" else fp8.encode(tile, factor, grid))[0]


def reference(grid: str, tile: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The reference's codes; a NaN has the one code that the formats give it."""
    if grid == "int8":
        return int8_reference.encode(tile, factor)
    codes = fp8_reference.encode(tile, factor, grid)
    nan = (tile.float() * factor.unsqueeze(1)).isnan()
    codes.view(torch.uint8)[nan] = 0x7F
    return codes


def whole(grid: str, weight: torch.Tensor, mode: str, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and absmax of a weight [M, N] as formats and references make them."""
    geometry = ScaleGeometry(mode, tuple(weight.shape), size)
    encoder = Int8Encoder(geometry) if grid == "int8" else Float8Encoder(geometry, grid)
    groups = weight.float().reshape(-1, geometry.group).numpy()
    absmax = geometry.shared(np.abs(groups).max(axis=1))
    finite = geometry.shared(np.abs(np.where(np.isfinite(groups), groups, 0)).max(axis=1))
    scales = encoder.scales(finite)
    factor = torch.from_numpy(geometry.spread(scales[0]))
    codes = reference(grid, weight.reshape(-1, geometry.group), factor).view(weight.shape)
    return codes, torch.from_numpy(scales[-1]), torch.from_numpy(absmax)


def encode_whole(grid: str, weight: torch.Tensor, mode: str, size: int, device: str, measure: bool = False):
    weight = weight.to(device)
    if mode == "row":
        return int8.encode_rows(weight, measure=measure) if grid == "int8" else fp8.encode_rows(weight, grid, measure)
    if grid == "int8":
        return int8.encode_blocks(weight, size, measure=measure)
    return fp8.encode_blocks(weight, size, grid, measure)


def check(grid: str, weight: torch.Tensor, mode: str, size: int, device: str) -> None:
    codes, scale, absmax = encode_whole(grid, weight, mode, size, device)
    expected_codes, expected_scale, expected_absmax = whole(grid, weight, mode, size)
    assert_same(absmax.view(-1), expected_absmax, "absmax")
    assert_same(scale.view(-1), expected_scale, "scale")
    assert_same(codes, expected_codes, "codes")


@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0078125, 3e5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_16_bit_pattern(device, grid, dtype, factor):
    tile, factor = every_bits(dtype), torch.tensor([factor])
    assert_same(encode(grid, tile, factor, device), reference(grid, tile, factor))


@pytest.mark.parametrize("grid", FP8)
def test_fp8_ties_and_their_neighbours(device, grid):
    """Every number of the grid, every midpoint between two, and the float32 on either side of each."""
    numbers = torch.arange(256, dtype=torch.uint8).view(fp8.GRIDS[grid]).float()
    numbers = numbers[numbers.isfinite()].sort().values.double().numpy()
    points = np.concatenate([numbers, (numbers[:-1] + numbers[1:]) / 2, numbers * 1.03])
    tile = torch.from_numpy(with_neighbours(points)).view(1, -1)
    assert_same(encode(grid, tile, torch.ones(1), device), reference(grid, tile, torch.ones(1)))


@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3, 1e-12, 7e-30])
def test_int8_ties_and_their_neighbours(device, scale):
    halves = np.arange(-260, 261) / 2 * np.float32(scale)
    tile, scale = torch.from_numpy(with_neighbours(halves)).view(1, -1), torch.tensor([scale])
    assert_same(encode("int8", tile, scale, device), reference("int8", tile, scale))


@FEW
@given(matrices(), grids, st.integers(-30, 30), st.booleans())
def test_groups(device, tile, grid, exponent, exact):
    """Any factors whatever: powers of two, which make ties, and others."""
    factor = torch.full((tile.shape[0],), 2.0**exponent)
    if not exact:
        factor *= torch.linspace(1, 1.9, tile.shape[0])
    assert_same(encode(grid, tile, factor, device), reference(grid, tile, factor))


@FEW
@given(matrices(), grids, st.booleans())
def test_rows(device, weight, grid, streamed):
    """`streamed` makes any row too long for registers, so that it is read in pieces, twice."""
    with mock.patch.object(launch, "RESIDENT_ELEMENTS", 256 if streamed else launch.RESIDENT_ELEMENTS):
        check(grid, weight, "row", 0, device)


@FEW
@given(st.data(), grids, st.sampled_from([1, 2, 5, 13, 16]), st.booleans())
def test_blocks(device, data, grid, size, streamed):
    edges = st.integers(1, 3).map(lambda blocks: blocks * size)
    weight = data.draw(matrices(rows=edges, columns=edges))
    with mock.patch.object(launch, "RESIDENT_ELEMENTS", 64 if streamed else launch.RESIDENT_ELEMENTS):
        check(grid, weight, "block", size, device)


@pytest.mark.parametrize("grid", GRIDS)
def test_real_sizes(device, grid):
    check(grid, weights("gauss", 3 * 36864, "BF16", 1).view(3, -1), "row", 0, device)
    check(grid, weights("wide", 9 * 6144, "F32", 2).view(9, -1), "row", 0, device)
    for size in (64, 128, 256):
        check(grid, weights("gauss", 256 * 512, "BF16", size).view(256, 512), "block", size, device)


@pytest.mark.parametrize("mode", ["row", "block"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_nonfinite_weights_take_no_part_in_the_scale(device, grid, mode, streamed):
    weight = weights("gauss", 32 * 32, "BF16", 3).view(32, 32)
    weight[3, 5], weight[3, 6], weight[10, 31] = float("nan"), float("inf"), float("-inf")
    weight[20] = float("inf")
    weight[21] = float("nan")
    with mock.patch.object(launch, "RESIDENT_ELEMENTS", 16 if streamed else launch.RESIDENT_ELEMENTS):
        check(grid, weight, mode, 16, device)


@pytest.mark.parametrize("grid", GRIDS)
def test_row_groups_are_a_view(device, grid):
    weight = weights("gauss", 5 * 192, "F16", 4).view(5, 192)
    assert_same(
        encode_whole(grid, weight.view(-1, 64), "row", 0, device)[0].view(5, 192),
        whole(grid, weight.view(-1, 64), "row", 0)[0].view(5, 192),
    )


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("mode", ["group", "row", "block"])
@pytest.mark.parametrize("grid", GRIDS)
def test_error_sums(device, grid, mode, streamed):
    weight = weights("gauss", 16 * 144, "BF16", 5).view(16, 144)
    decode = int8_reference.decode if grid == "int8" else fp8_reference.decode
    with mock.patch.object(launch, "RESIDENT_ELEMENTS", 128 if streamed else launch.RESIDENT_ELEMENTS):
        if mode == "group":
            codes, scale, _ = whole(grid, weight, "row", 0)
            tile, factor = weight.to(device), scale.to(device)
            if grid == "int8":
                sums = int8.encode(tile, factor, measure=True)[1]
            else:
                sums = fp8.encode(tile, 1 / factor, grid, factor)[1]
        else:
            codes, scale, _, sums = (part.cpu() for part in encode_whole(grid, weight, mode, 16, device, measure=True))
    if mode == "block":
        scale = scale.repeat_interleave(16, 0).reshape(-1)
        codes, weight = codes.view(-1, 16), weight.view(-1, 16)
    error = decode(codes, scale, torch.float32).double() - weight.double()
    assert sums.dtype == torch.float64
    expected = [float(error.square().sum()), float(weight.double().square().sum())]
    assert sums.tolist() == pytest.approx(expected, rel=1e-4)


def test_nothing_in_nothing_out(device):
    empty = torch.empty(0, 64, dtype=torch.bfloat16, device=device)
    codes, scale, absmax = fp8.encode_rows(empty, "e4m3")
    assert codes.shape == (0, 64) and scale.shape == absmax.shape == (0,)
    assert int8.encode_blocks(empty, 64)[1].shape == (0, 1)


def test_launchers_refuse_what_kernels_cannot_take(device):
    weight = torch.zeros(4, 6, device=device)
    with pytest.raises(AssertionError, match="not contiguous"):
        fp8.encode_rows(weight.T, "e4m3")
    with pytest.raises(AssertionError, match="float64"):
        int8.encode_rows(weight.double())
    with pytest.raises(AssertionError, match="no 4 x 4 blocks"):
        int8.encode_blocks(weight, 4)
    with pytest.raises(AssertionError, match="factor has shape"):
        int8.encode(weight, torch.ones(3, device=device))
