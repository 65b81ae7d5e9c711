"""Sums over what codes stand for, less the weights: compiled and reference against the same in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiles import JIT, QUICK, TORCH, dtypes, kinds, loads, seeds, weights

from streamquant.kernels import DifferenceSums, ErrorSums, bnb4, fp8, hadamard, int8
from streamquant.kernels.codebooks import CODE_BOOKS
from streamquant.kernels.difference import CODE_DTYPES

GRIDS = pytest.mark.parametrize("grid", ["e4m3", "e5m2", "int8"])


def check(found: list[DifferenceSums], decoded: torch.Tensor, tensor: torch.Tensor) -> None:
    """Maxima and their places to the bit; sums of float32 squares as near as float32 squares are."""
    w, d = tensor.float(), decoded
    e = d - w
    for sums in found:
        if not (d.isfinite().all() and w.isfinite().all() and e.isfinite().all()):
            assert not sums.finite
            continue
        squares = float((w.double() ** 2).sum()), float((e.double() ** 2).sum()), float((e.double() * w.double()).sum())
        if max(squares) > 1e37 or 0 < min(abs(square) for square in squares) < 1e-30:
            continue  # beyond what float32 squares: whoever asks looks at the sums and takes another way
        assert sums.finite
        assert sums.steps is None or sums.steps == found[-1].steps
        assert (sums.largest, sums.absmax) == (float(e.abs().max()), float(w.abs().max()))
        assert sums.largest_at == int(e.abs().argmax())
        assert sums.weight == pytest.approx(squares[0], rel=1e-4)
        assert sums.error == pytest.approx(squares[1], rel=1e-4)
        assert sums.product == pytest.approx(squares[2], rel=1e-4, abs=1e-4 * (squares[0] * squares[1]) ** 0.5)


@QUICK
@given(kinds, dtypes, st.integers(1, 9000), seeds)
def test_values(kind, dtype, elements, seed):
    tensor = weights(kind, elements, dtype, seed)
    noise = torch.randn(elements, generator=torch.Generator().manual_seed(seed)) * 0.01
    values = (tensor.float() * (1 + noise)).float()
    tiles = loads(tensor)
    check([backend.difference(values.numpy(), tile) for backend, tile in zip((JIT, TORCH), tiles, strict=True)], values, tensor)


@GRIDS
@QUICK
@given(kinds, dtypes, st.integers(1, 700), st.integers(1, 40), seeds)
def test_bytes(grid, kind, dtype, run, runs, seed):
    """Any byte under any scale: NaN and infinity among them."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, run * runs).astype(np.uint8)
    if seed % 2:
        codes &= 0xBB  # of FP8, finite codes only
    scale = np.exp2(random.uniform(-20, 5, runs)).astype(np.float32)
    tensor = weights(kind, run * runs, dtype, seed)
    decode = int8.decode if grid == "int8" else fp8.decode
    typed = torch.from_numpy(codes).view(CODE_DTYPES[grid]).view(runs, run)
    found = [backend.byte_difference(codes, scale, grid, 0, tile) for backend, tile in zip((JIT, TORCH), loads(tensor), strict=True)]
    check(found, decode(typed, torch.from_numpy(scale), torch.float32).view(-1), tensor)
    ends = {"e4m3": 0x7E, "e5m2": 0x7B}
    saturated = np.isin(codes, [0x7F, 0x81] if grid == "int8" else [ends[grid], ends[grid] | 0x80]).sum()
    assert [sums.saturated for sums in found] == [saturated] * 2


@GRIDS
@pytest.mark.parametrize(("run", "rotation", "elements"), [(256, 64, 8192), (8192, 16, 16384), (4096, 4096, 12288), (64, 16384, 32768)])
def test_rotated_bytes(grid, run, rotation, elements):
    random = np.random.default_rng(run)
    codes = random.integers(0, 256, elements).astype(np.uint8) & 0xBB
    scale = random.uniform(0.001, 0.1, elements // run).astype(np.float32)
    tensor = weights("gauss", elements, "BF16", seed=run)
    decode = int8.decode if grid == "int8" else fp8.decode
    typed = torch.from_numpy(codes).view(CODE_DTYPES[grid]).view(-1, run)
    decoded = hadamard.rotate(decode(typed, torch.from_numpy(scale), torch.float32).view(-1, rotation), rotation).view(-1)
    tiles = zip((JIT, TORCH), loads(tensor), strict=True)
    check([backend.byte_difference(codes, scale, grid, rotation, tile) for backend, tile in tiles], decoded, tensor)


@QUICK
@given(st.sampled_from(["nf4", "fp4"]), st.booleans(), kinds, dtypes, st.sampled_from([2, 32, 64, 4096, 8192]), st.integers(1, 20000), seeds)
def test_books(book, high_first, kind, dtype, block_size, elements, seed):
    random = np.random.default_rng(seed)
    packed = random.integers(0, 256, (elements + 1) // 2).astype(np.uint8)
    absmax = np.exp2(random.uniform(-20, 5, -(-elements // block_size))).astype(np.float32)
    tensor = weights(kind, elements, dtype, seed)
    ordered = torch.from_numpy(packed if high_first else (packed << 4) | (packed >> 4))
    decoded = bnb4.decode(ordered, torch.from_numpy(absmax), block_size, book, elements)
    tiles = zip((JIT, TORCH), loads(tensor), strict=True)
    found = [
        backend.book_difference(packed, absmax, block_size, CODE_BOOKS[book], high_first, tile) for backend, tile in tiles
    ]
    check(found, decoded, tensor)
    codes = np.stack([ordered >> 4, ordered & 15], 1).reshape(-1)[:elements]
    ends = [CODE_BOOKS[book].argmin(), CODE_BOOKS[book].argmax()]
    assert [sums.saturated for sums in found] == [np.isin(codes, ends).sum()] * 2


@GRIDS
@pytest.mark.parametrize("damage", [0, 1, 40, 2000])
def test_steps_find_what_rounding_does_not_make(grid, damage):
    """Codes rounded to nearest lie within half a step; each code that was changed by many lies further."""
    elements, run = 20_000, 500
    tensor = weights("gauss", elements, "BF16", seed=damage)
    tiles = loads(tensor)
    absmax = JIT.absmax(tiles[0], run)
    if grid == "int8":
        scale = absmax / np.float32(127)
        codes = JIT.int8(tiles[0], run, scale, ErrorSums()).view(np.uint8).copy()
    else:
        largest = np.float32({"e4m3": 448, "e5m2": 57344}[grid])
        scale = absmax / largest
        codes = JIT.fp8(tiles[0], run, largest / absmax, scale, grid, ErrorSums()).copy()
    places = np.random.default_rng(damage).choice(elements // 2, damage, replace=False)
    places = places[np.abs(tensor.float().numpy()[places]) > 0.2 * absmax[places // run]]
    codes[places] ^= 0x80
    found = [backend.byte_difference(codes, scale, grid, 0, tile).steps for backend, tile in zip((JIT, TORCH), tiles, strict=True)]
    assert found[0] == found[1]
    assert found[0].far == places.size and found[0].spans == 20
    assert found[0].far_at == (places.min() if places.size else -1)
    assert found[0].far_spans == len(set(places // 1024))
    assert found[0].farther == (places.size if grid == "int8" else found[0].farther)


@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_steps_of_books(book):
    tensor = weights("outlier", 10_001, "F32", seed=1)
    tiles = loads(tensor)
    packed, absmax = JIT.bnb4(tiles[0], 64, book, ErrorSums())
    wrong, shrunk = packed.copy(), absmax.copy()
    wrong[700:1200] = packed[2700:3200]
    shrunk[20] /= 4
    for codes, scale, far, wild in ((packed, absmax, False, False), (wrong, absmax, True, True), (packed, shrunk, True, False)):
        found = [backend.book_difference(codes, scale, 64, CODE_BOOKS[book], True, tile).steps
                 for backend, tile in zip((JIT, TORCH), tiles, strict=True)]  # fmt: skip
        assert found[0] == found[1]
        assert bool(found[0].far) is far and (found[0].wild_spans > 0) is wild
