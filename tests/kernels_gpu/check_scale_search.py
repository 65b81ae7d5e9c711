"""Searched scales: the definition's choice wherever two candidates are not as good as equal, and its codes to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from same import FEW, assert_same, dtypes, matrices
from tiles import kinds, seeds, weights

from streamquant.kernels import bnb4, fp8
from streamquant.kernels import scale_search as reference
from streamquant.kernels.codebooks import ASCENDING_CODES, BOUNDARIES, CODE_BOOKS
from streamquant.kernels.gpu import book_search, scale_search
from streamquant.kernels.search_grid import BOOK_RATIOS, SMALLEST_LIVE, fp8_candidates

EQUAL = 1e-6  # relative: closer errors are as good as equal
FEWER = settings(FEW, max_examples=6)  # a search is seventeen evaluations
# Nothing in float32 lies above the largest weights' own scale.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
books = st.sampled_from(["nf4", "fp4"])


def importance_of(weighted: bool, cycle: int, group: int, seed: int, device: str) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(what the kernel is given, what the definition is given): float32 [cycle, group]."""
    if not weighted:
        return None, torch.ones(1, group)
    drawn = torch.from_numpy(np.exp(np.random.default_rng(seed).standard_normal((cycle, group))).astype(np.float32))
    return drawn.to(device), drawn


def fp8_errors(runs: torch.Tensor, absmax: torch.Tensor, importance: torch.Tensor) -> np.ndarray:
    """float64 [n, 17]: the definition's errors in units of the weights."""
    candidates = fp8_candidates(absmax.numpy())
    return reference.e4m3_errors(runs, torch.from_numpy(candidates), importance).numpy() / np.square(
        candidates, dtype=np.float64
    )


def check_choice(errors: np.ndarray, chosen: np.ndarray) -> None:
    """chosen [n]: no worse than the best of errors [n, candidates], and the same where the second best is worse."""
    found = np.take_along_axis(errors, chosen[:, None], axis=1)[:, 0]
    assert (found <= errors.min(axis=1) * (1 + EQUAL)).all()
    best, second = np.sort(errors, axis=1)[:, :2].T
    clear = second > best * (1 + EQUAL)
    np.testing.assert_array_equal(chosen[clear], errors.argmin(axis=1)[clear])


def check_fp8(codes, scale, absmax, runs: torch.Tensor, expected_absmax: torch.Tensor, errors: np.ndarray) -> None:
    """Results of a fused search. runs [n, group]: what scale i scales; its codes lie as the runs do."""
    assert_same(absmax.view(-1), expected_absmax)
    candidates = fp8_candidates(expected_absmax.numpy())
    is_candidate = scale.view(-1, 1).cpu().numpy() == np.float32(1) / candidates
    assert is_candidate.any(axis=1).all()
    chosen = is_candidate.argmax(axis=1)
    check_choice(errors, chosen)
    multiplier = torch.from_numpy(candidates[np.arange(len(chosen)), chosen])
    assert_same(codes.cpu(), fp8.encode(runs, multiplier, "e4m3"), "codes")


def into_blocks(weight: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, columns] as [blocks, size * size]."""
    rows, columns = weight.shape
    return weight.view(rows // size, size, columns // size, size).transpose(1, 2).reshape(-1, size * size)


@FEW
@given(matrices(), st.integers(0, 3), seeds)
def test_e4m3_errors(device, runs, cycle, seed):
    given_weights, importance = importance_of(cycle > 0, cycle, runs.shape[1], seed, device)
    absmax = runs.float().abs().amax(dim=1) * 1.25  # of more than the run
    absmax = absmax.clamp(max=torch.finfo(torch.float32).max)
    errors = scale_search.e4m3_errors(runs.to(device).view(-1), runs.shape[1], absmax.to(device), given_weights)
    expected = fp8_errors(runs, absmax, importance)
    assert errors.dtype == torch.float64
    # A square below float32's range is 0; one step of the grid is 2**-9.
    np.testing.assert_allclose(errors.cpu(), expected, rtol=EQUAL, atol=1e-30 * float(absmax.max()) ** 2 + 1e-60)


@FEW
@given(matrices(), st.integers(0, 3), seeds)
def test_fp8_rows(device, weight, cycle, seed):
    given_weights, importance = importance_of(cycle > 0, cycle, weight.shape[1], seed, device)
    absmax = weight.float().abs().amax(dim=1)
    found = scale_search.encode_rows(weight.to(device), given_weights)
    check_fp8(*found, weight, absmax, fp8_errors(weight, absmax, importance))


@pytest.mark.parametrize("columns", [4095, 4096, 9000])
def test_fp8_rows_longer_than_a_tile(device, columns):
    weight = weights("gauss", 3 * columns, "BF16", columns).view(3, columns)
    given_weights, importance = importance_of(True, 1, columns, 1, device)
    absmax = weight.float().abs().amax(dim=1)
    *found, sums = scale_search.encode_rows(weight.to(device), given_weights, measure=True)
    check_fp8(*found, weight, absmax, fp8_errors(weight, absmax, importance))
    error = fp8.decode(found[0].cpu(), found[1].cpu(), torch.float32).double() - weight.double()
    assert sums.tolist() == pytest.approx([float(error.square().sum()), float(weight.double().square().sum())], rel=1e-4)


@FEWER
@given(st.sampled_from([1, 5, 16, 64]), st.integers(1, 3), st.integers(1, 3), st.booleans(), kinds, dtypes, seeds)
def test_fp8_blocks(device, size, down, across, weighted, kind, dtype, seed):
    weight = weights(kind, down * across * size**2, "F32" if dtype == "F64" else dtype, seed).view(down * size, across * size)
    given_weights, importance = importance_of(weighted, 1, across * size, seed, device)
    codes, scale, absmax, sums = scale_search.encode_blocks(
        weight.to(device), size, None if given_weights is None else given_weights.view(-1), measure=True
    )
    assert scale.shape == (down, across)
    blocks = into_blocks(weight, size)
    spread = into_blocks(importance.expand(down * size, across * size) if weighted else torch.ones(weight.shape), size)
    expected = blocks.float().abs().amax(dim=1)
    codes = into_blocks(codes.cpu().view(torch.uint8), size).view(torch.float8_e4m3fn)
    check_fp8(codes, scale, absmax, blocks, expected, fp8_errors(blocks, expected, spread))
    decoded = codes.double() * scale.cpu().view(-1, 1).double()  # in float32 the largest weights may round to infinity
    squares = [float((decoded - blocks.double()).square().sum()), float(blocks.double().square().sum())]
    assert sums.tolist() == pytest.approx(squares, rel=1e-3, abs=1e-9 * squares[1] + 1e-60)  # x itself is rounded


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_fp8_leaves_out_what_is_not_finite(device, special):
    weight = weights("gauss", 64 * 64, "F32", 3).view(64, 64)
    clean = weight.clone()
    weight[7, 9], clean[7, 9] = special, 0.0
    for encode in (scale_search.encode_rows, lambda tensor: scale_search.encode_blocks(tensor, 64)):
        (codes, scale, absmax), (clean_codes, clean_scale, _) = encode(weight.to(device)), encode(clean.to(device))
        assert_same(scale, clean_scale.cpu())
        assert absmax.cpu().isfinite().sum() == absmax.numel() - 1
        codes, clean_codes = codes.cpu().view(torch.uint8), clean_codes.cpu().view(torch.uint8)
        assert codes[7, 9] == {float("inf"): 0x7E, -float("inf"): 0xFE}.get(special, 0x7F)
        codes[7, 9] = clean_codes[7, 9]
        assert_same(codes, clean_codes)


def blocks_of(flat: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size).float()


def book_errors(blocks: torch.Tensor, tried: torch.Tensor, importance: torch.Tensor, book: str) -> np.ndarray:
    """float64 [n] in units of the true absmax: the definition's error under the scales `tried` [n]."""
    values = torch.from_numpy(CODE_BOOKS[book][ASCENDING_CODES[book]])
    scaled = blocks * (1.0 / tried)[:, None]
    near = values[torch.bucketize(scaled, torch.from_numpy(BOUNDARIES[book]))].double()
    weight = importance.double()[torch.arange(len(blocks)) % len(importance)]
    unit = (tried.double() / blocks.abs().amax(dim=1).double()).square()
    error = (weight * (near - scaled.double()).square()).sum(dim=1) * unit
    return error.nan_to_num(nan=torch.inf).numpy()  # a scale beyond float32 is never chosen


SIZES = st.sampled_from([2, 32, 64, 100, 256])


@FEWER
@given(st.integers(1, 900), SIZES, books, st.integers(0, 3), kinds, dtypes, seeds)
def test_books(device, elements, size, book, cycle, kind, dtype, seed):
    flat = weights(kind, elements, "F32" if dtype == "F64" else dtype, seed)
    given_weights, importance = importance_of(cycle > 0, cycle, size, seed, device)
    blocks = blocks_of(flat, size)
    live = blocks.abs().amax(dim=1) > SMALLEST_LIVE
    found = book_search.book_absmax(flat.to(device), size, given_weights, book).cpu()
    expected = reference.book_absmax(blocks, importance, book)
    assert_same(found[~live], blocks.abs().amax(dim=1)[~live], "absmax of what is no block to search")
    assert found.dtype == torch.float32 and found.shape == expected.shape
    tries = np.stack([book_errors(blocks, blocks.abs().amax(dim=1) * ratio, importance, book) for ratio in BOOK_RATIOS], axis=1)
    best, second = np.sort(tries, axis=1)[:, :2].T
    clear = live.numpy() & (second > best * (1 + EQUAL))
    ours, theirs = (book_errors(blocks, scales, importance, book) for scales in (found, expected))
    # A refit that differs in its last digit moves the error of a few elements by more than that of many.
    close = ((found - expected).abs() <= 4e-7 * expected).numpy()
    assert (close | (ours <= theirs * (1 + EQUAL) + 1e-30))[clear].all()

    if size & (size - 1):
        return  # no size of bitsandbytes'
    packed, absmax = book_search.pack(flat.to(device), size, book, given_weights)
    reference_packed, reference_absmax = bnb4.encode(flat, size, book, found)
    assert_same(packed, reference_packed, "packed")
    assert_same(absmax, reference_absmax, "absmax of what is packed")


@FEWER
@given(st.integers(1, 12), SIZES, books, st.integers(0, 3), kinds, dtypes, seeds)
def test_the_best_ratio_is_the_definitions(device, count, size, book, cycle, kind, dtype, seed):
    blocks = weights(kind, count * size, "F32" if dtype == "F64" else dtype, seed).view(count, size)
    given_weights, importance = importance_of(cycle > 0, cycle, size, seed, device)
    largest = blocks.float().abs().amax(dim=1)
    assume(bool((largest > 2 * SMALLEST_LIVE).all()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book_search, "BOOK_REFITS", 0)
        found = book_search.book_absmax(blocks.to(device).view(-1), size, given_weights, book).cpu()
    is_candidate = found.numpy()[:, None] == largest.numpy()[:, None] * BOOK_RATIOS
    assert is_candidate.any(axis=1).all()
    errors = [book_errors(blocks.float(), largest * ratio, importance, book) for ratio in BOOK_RATIOS]
    check_choice(np.stack(errors, axis=1), is_candidate.argmax(axis=1))


def test_nf4_of_many_blocks(device):
    """All but a few scales equal to six digits, and a gain of what the search is worth."""
    flat = weights("gauss", 64 * 300 + 6, "BF16", 5)
    packed, absmax, sums = book_search.pack(flat.to(device), 64, "nf4", measure=True)
    expected = reference.book_absmax(blocks_of(flat, 64), torch.ones(1, 64), "nf4")
    assert (((absmax.cpu() - expected).abs() <= 1e-6 * expected).double().mean()) > 0.99
    error = bnb4.decode(packed.cpu(), absmax.cpu(), 64, "nf4", flat.numel()).double() - flat.double()
    squares = [float(error.square().sum()), float(flat.double().square().sum())]
    assert sums.tolist() == pytest.approx(squares, rel=1e-4)
    plain = bnb4.decode(*bnb4.encode(flat, 64, "nf4"), 64, "nf4", flat.numel()).double() - flat.double()
    assert 0.90 < (squares[0] / float(plain.square().sum())) ** 0.5 < 0.95


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_books_take_absmax_for_what_is_not_finite(device, special):
    flat = weights("gauss", 200, "F32", 4)
    flat[70] = special
    packed, absmax = book_search.pack(flat.to(device), 64, "nf4")
    whole = bnb4.encode(flat, 64, "nf4")
    assert_same(absmax[1:2], whole[1][1:2])
    assert_same(packed[32:64], whole[0][32:64])


def test_launchers_refuse_what_the_kernels_cannot_take(device):
    weight = torch.zeros(128, 128, device=device)
    with pytest.raises(AssertionError, match="128 are too large"):
        scale_search.encode_blocks(weight, 128)
    with pytest.raises(AssertionError, match="weights has shape"):
        scale_search.encode_rows(weight, torch.ones(2, 64, device=device))
    with pytest.raises(AssertionError, match="odd"):
        book_search.book_absmax(weight.view(-1), 7, None, "nf4")
    with pytest.raises(AssertionError, match="power of two"):
        book_search.pack(weight.view(-1), 48, "nf4")


def test_no_scale_lies_below_the_floor(device):
    flat = torch.randn(40 * 64, generator=torch.Generator().manual_seed(3))
    free, floored = (book_search.book_absmax(flat.to(device), 64, None, "nf4", floor).cpu() for floor in (0.0, 0.95))
    expected = reference.book_absmax(flat.view(-1, 64), torch.ones(1, 64), "nf4", 0.95)
    absmax = flat.view(-1, 64).abs().amax(dim=1)
    assert (floored >= absmax * 0.9499).all() and (free < absmax * 0.9499).any()
    torch.testing.assert_close(floored, expected, rtol=2e-2, atol=0)
