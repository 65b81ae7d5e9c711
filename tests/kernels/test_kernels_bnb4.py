"""4-bit codes and absmax: compiled against the reference, the reference against bitsandbytes' own operation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given
from hypothesis import strategies as st
from tiles import JIT, QUICK, TORCH, TORCH_DTYPES, all_bf16, dtypes, kinds, loads, seeds, weights, with_neighbours

from streamquant.kernels import ErrorSums, bnb4
from streamquant.kernels.codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS

books = st.sampled_from(["nf4", "fp4"])
block_sizes = st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096])


def same_magnitudes(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal bits, but for the payload of a NaN."""
    number = ~np.isnan(expected)
    return np.array_equal(np.isnan(found), ~number) and np.array_equal(
        found.view(np.uint32)[number], expected.view(np.uint32)[number]
    )


def check(tensor: torch.Tensor, block_size: int, book: str) -> tuple[np.ndarray, np.ndarray]:
    """Both backends give bitsandbytes' packed codes and absmax; returns them."""
    jit_tile, torch_tile = loads(tensor)
    # bitsandbytes takes no float64; from float32 on it is the same tensor.
    source = tensor.float() if tensor.dtype == torch.float64 else tensor
    packed, state = functional.quantize_4bit(source, blocksize=block_size, quant_type=book)
    for backend, tile in ((JIT, jit_tile), (TORCH, torch_tile)):
        codes, absmax = backend.bnb4(tile, block_size, book, ErrorSums())
        assert codes.dtype == np.uint8 and absmax.dtype == np.float32
        assert same_magnitudes(absmax, state.absmax.numpy()), backend.name
        assert np.array_equal(codes, packed.reshape(-1).numpy()), backend.name
    return codes, absmax


@QUICK
@given(kinds, dtypes, block_sizes, books, st.integers(1, 9000), seeds)
def test_any_number_of_elements(kind, dtype, block_size, book, elements, seed):
    """Odd counts, short last blocks, tensors smaller than a block."""
    check(weights(kind, elements, dtype, seed), block_size, book)


@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_every_bf16_pattern_but_nan(block_size, book):
    patterns = all_bf16()
    finite = patterns[patterns.isfinite()]
    # In order a block has one exponent; shuffled, each has a large one and all others vanish beside it.
    check(finite, block_size, book)
    check(finite[torch.randperm(finite.numel(), generator=torch.Generator().manual_seed(0))], block_size, book)


def boundary_points(book: str) -> np.ndarray:
    """Every midpoint and every value of a book, and the float32 on either side of each, all within ±1."""
    points = with_neighbours(np.concatenate([BOUNDARIES[book], CODE_BOOKS[book]]))
    points = points[np.abs(points) <= 1]
    # 0's own neighbours are subnormals, which scaling would not leave as they are.
    return points[(points == 0) | (np.abs(points) > 1e-30)]


@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("absmax", [1.0, 2.0**-20, 2.0**100])
def test_every_decision_boundary_and_its_neighbours(book, absmax):
    """With a power of two as absmax the scaling is exact, so that ties are ties: they go to the lower value."""
    points = boundary_points(book)
    block = np.zeros(256, dtype=np.float32)
    block[: points.size] = points
    block[-1] = 1
    codes, found = check(torch.from_numpy(block * np.float32(absmax)), 256, book)
    assert found.tolist() == [absmax]
    unpacked = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
    ascending = np.sort(CODE_BOOKS[book].astype(np.float64))
    distance = np.abs(block[:, None].astype(np.float64) - ascending[None, :])
    float32_boundary = np.isin(block, BOUNDARIES[book])
    value = CODE_BOOKS[book][unpacked]
    nearest = ascending[distance.argmin(axis=1)]  # the first, so the lower, of equals
    assert np.array_equal(value[~float32_boundary], nearest[~float32_boundary].astype(np.float32))
    ranks = np.searchsorted(BOUNDARIES[book], block, side="left")
    assert np.array_equal(unpacked, ASCENDING_CODES[book][ranks])


def test_exact_zero_is_the_book_s_zero():
    """NF4's zero is code 7; of FP4's two zeros 0 itself takes code 0 and only small positive values code 8."""
    block = torch.zeros(64)
    block[0], block[2], block[3] = 1, 0.001, -0.0
    codes, _ = check(block, 64, "fp4")
    assert [codes[0] & 15, codes[1] >> 4, codes[1] & 15] == [0, 8, 0]
    codes, _ = check(block, 64, "nf4")
    assert [codes[0] & 15, codes[1] >> 4, codes[1] & 15] == [7, 7, 7]


@pytest.mark.parametrize("elements, absmax", [(64, 0.0), (128, 0.0), (40, float(np.float32(1e-38)))])
def test_an_all_zero_block(elements, absmax):
    """A short last block floors its absmax where a full one does not: so does bitsandbytes."""
    codes, found = check(torch.zeros(elements), 64, "nf4")
    assert set(codes.tolist()) == {0x77} and set(found.tolist()) == {absmax}
    codes, _ = check(torch.zeros(elements), 64, "fp4")
    assert set(codes.tolist()) == {0}


def test_an_odd_count_is_padded_with_zero_in_the_low_nibble():
    codes, _ = check(torch.ones(65), 64, "nf4")
    assert codes[-1] == 0xF7
    codes, _ = check(torch.ones(1), 64, "fp4")
    assert codes.tolist() == [0x30]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("special", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [3, 64 + 17, 150])
def test_a_special_value_spoils_its_block_as_in_bitsandbytes_and_no_other(dtype, book, special, position):
    tensor = weights("gauss", 160, dtype, seed=5)
    clean, _ = check(tensor, 64, book)
    tensor[position] = special
    codes, absmax = check(tensor, 64, book)
    block = position // 64
    assert np.flatnonzero(~np.isfinite(absmax)).tolist() == [block]
    elsewhere = np.arange(codes.size) // 32 != block
    assert np.array_equal(codes[elsewhere], clean[elsewhere])


@QUICK
@given(kinds, dtypes, block_sizes, books, st.integers(1, 9000), seeds)
def test_reference_decode_is_book_value_times_absmax(kind, dtype, block_size, book, elements, seed):
    _, tile = loads(weights(kind, elements, dtype, seed))
    packed, absmax = bnb4.encode(tile, block_size, book)
    unpacked = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:elements].numpy()
    with np.errstate(under="ignore"):
        expected = CODE_BOOKS[book][unpacked] * np.repeat(absmax.numpy(), block_size)[:elements]
    decoded = bnb4.decode(packed, absmax, block_size, book, elements).numpy()
    assert decoded.dtype == np.float32 and np.array_equal(decoded, expected)


@pytest.mark.parametrize("block_size", [32, 4096])
@pytest.mark.parametrize("elements", [(1 << 18) + 31, 600_001])
def test_tiles_larger_than_a_chunk_of_the_torch_backend(block_size, elements):
    check(weights("gauss", elements, "BF16", seed=1), block_size, "nf4")


def test_float16_is_read_as_float16():
    """A dtype mix-up would still encode something plausible."""
    tensor = weights("gauss", 640, "F16", seed=2)
    packed, absmax = JIT.bnb4(JIT.load(tensor.numpy().tobytes(), "F16"), 64, "nf4", ErrorSums())
    assert tensor.dtype == TORCH_DTYPES["F16"]
    assert np.array_equal(absmax, tensor.float().abs().view(-1, 64).amax(dim=1).numpy())
