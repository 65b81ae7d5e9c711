"""Decoding against the references' decode, bit for bit, into every dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same import DTYPES, FEW, assert_same, dtypes
from tiles import weights

from streamquant.kernels import bnb4, fp8, int8
from streamquant.kernels.codebooks import CODE_BOOKS, DYNAMIC_MAP
from streamquant.kernels.gpu import dequantize

CODES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}
grids = st.sampled_from(sorted(CODES))
each_grid = pytest.mark.parametrize("grid", sorted(CODES))
each_dtype = pytest.mark.parametrize("dtype", sorted(DTYPES))


def random_codes(grid: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return codes.view(CODES[grid])


def scales(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Positive scales over thirty decades: products overflow and underflow in every dtype."""
    exponents = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 100 - 50
    return exponents.exp2().float()


def reference(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (int8 if codes.dtype == torch.int8 else fp8).decode(codes, scale, dtype)


@each_dtype
@each_grid
def test_every_code(device, grid, dtype):
    """Numbers, subnormals, both zeros, infinities and NaN, under scales that round, overflow and underflow."""
    codes = torch.arange(256, dtype=torch.uint8).view(CODES[grid]).repeat(9, 1)
    scale = torch.tensor([1.0, 0.1, 1e-8, 3e-38, 1e-44, 1e36, 250.0, 65504.0, float("inf")])
    decoded = dequantize.decode_groups(codes.to(device), scale.to(device), DTYPES[dtype])
    assert_same(decoded, reference(codes, scale, DTYPES[dtype]))


@FEW
@given(grids, dtypes, st.integers(1, 40), st.integers(1, 300), st.integers(0, 999))
def test_groups(device, grid, dtype, groups, group, seed):
    codes, scale = random_codes(grid, (groups, group), seed), scales((groups,), seed)
    decoded = dequantize.decode_groups(codes.to(device), scale.to(device), DTYPES[dtype])
    assert_same(decoded, reference(codes, scale, DTYPES[dtype]))


@FEW
@given(grids, dtypes, st.integers(1, 4), st.integers(1, 5), st.integers(1, 33), st.integers(0, 999))
def test_blocks(device, grid, dtype, down, across, size, seed):
    codes, scale = random_codes(grid, (down * size, across * size), seed), scales((down, across), seed)
    decoded = dequantize.decode_blocks(codes.to(device), scale.to(device), size, DTYPES[dtype])
    spread = scale.repeat_interleave(size, dim=0).reshape(-1)
    assert_same(decoded, reference(codes.view(-1, size), spread, DTYPES[dtype]).view(codes.shape))


@each_dtype
@each_grid
def test_real_sizes(device, grid, dtype):
    codes, scale = random_codes(grid, (1, 3 * 36864 + 5), 1), torch.tensor([0.0123])
    decoded = dequantize.decode_groups(codes.to(device), scale.to(device), DTYPES[dtype])
    assert_same(decoded, reference(codes, scale, DTYPES[dtype]))


@FEW
@given(st.integers(0, 700), st.sampled_from([32, 64, 128]), st.sampled_from(["nf4", "fp4"]), dtypes, st.integers(0, 999))
def test_4bit(device, elements, block_size, book, dtype, seed):
    flat = weights("wide", elements, "F32", seed) if elements else torch.empty(0)
    packed, absmax = bnb4.encode(flat, block_size, book)
    code_book = torch.from_numpy(CODE_BOOKS[book])
    arguments = (packed.to(device), absmax.to(device), block_size, code_book.to(device), elements, DTYPES[dtype])
    expected = bnb4.decode(packed, absmax, block_size, book, elements).to(DTYPES[dtype])
    assert_same(dequantize.decode_4bit(*arguments), expected)


@FEW
@given(st.integers(1, 20000), st.sampled_from([16, 256]), dtypes, st.integers(0, 999))
def test_4bit_double_quantized(device, elements, nested_block, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((elements + 1) // 2, 1), dtype=torch.uint8, generator=random)
    blocks = -(-elements // 32)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=random)
    nested_absmax = torch.rand(-(-blocks // nested_block), generator=random) * 0.03
    nested_map, offset = torch.from_numpy(DYNAMIC_MAP), float(torch.rand(1, generator=random)) * 0.05
    code_book = torch.from_numpy(CODE_BOOKS["nf4"])
    nested = dequantize.Nested(nested_absmax.to(device), nested_map.to(device), nested_block, offset)
    arguments = (packed.to(device), absmax.to(device), 32, code_book.to(device), elements, DTYPES[dtype], nested)
    plain_absmax = bnb4.decode_absmax(absmax, nested_absmax, nested_map, nested_block, offset)
    expected = bnb4.decode_with(packed, plain_absmax, 32, code_book, elements).to(DTYPES[dtype])
    assert_same(dequantize.decode_4bit(*arguments), expected)


def test_launchers_refuse_what_kernels_cannot_take(device):
    codes, scale = torch.zeros(4, 6, dtype=torch.int8, device=device), torch.ones(4, device=device)
    with pytest.raises(AssertionError, match="scale has shape"):
        dequantize.decode_groups(codes, scale[:3], torch.float32)
    with pytest.raises(AssertionError, match="not FP8 or int8"):
        dequantize.decode_groups(codes.float(), scale, torch.float32)
    with pytest.raises(AssertionError, match="no 4 x 4 blocks"):
        dequantize.decode_blocks(codes, scale, 4, torch.float32)
    with pytest.raises(AssertionError, match="float64"):
        dequantize.decode_groups(codes, scale, torch.float64)
    with pytest.raises(AssertionError, match="packed has shape"):
        dequantize.decode_4bit(torch.zeros(3, dtype=torch.uint8), scale, 64, torch.zeros(16), 64, torch.float32)
