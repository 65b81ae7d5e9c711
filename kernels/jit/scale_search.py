"""Squared errors of candidate scales, compiled: what the scale search of `streamquant.rounding.scales` compares.

Sums run over LANES interleaved partial sums in float32, joined in float64, in an order that does not depend on the
machine: the scale chosen is part of the file.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .bits import SIGNLESS, bits_float, float_bits, int32
from .strip_product import LANES, OPTIONS

LARGEST = int32(np.float32(448.0).view(np.int32))
SMALLEST_NORMAL = int32(np.float32(2.0**-6).view(np.int32))
HALF, KEPT = int32((1 << 19) - 1), int32(-(1 << 20))
# Adding and taking off this rounds a magnitude below the smallest normal to a multiple of 2**-9 (no fastmath here).
ALIGNER = np.float32(2.0**14)
ZERO = np.float32(0)


@njit(**OPTIONS)
def e4m3_errors(runs, multipliers, weights, first, errors):
    """errors[i, c] = Σ weights · (e4m3(run · m) - run · m)², in the grid's units, for the multiplier m of each
    candidate c.

    runs [n, group]: float32. multipliers [n, candidates]: float32. weights [cycle, group]: float32; run i has the
    weights (first + i) mod cycle. errors [n, candidates]: float64, written.
    """
    count, group = runs.shape
    whole = group // LANES * LANES
    partial, tail = np.empty(LANES, np.float32), np.zeros(LANES, np.float32)
    tail_weights = np.zeros(LANES, np.float32)
    for index in range(count):
        run, weight = runs[index], weights[(first + index) % weights.shape[0]]
        for element in range(whole, group):
            tail[element - whole], tail_weights[element - whole] = run[element], weight[element]
        for candidate in range(multipliers.shape[1]):
            factor = multipliers[index, candidate]
            partial[:] = ZERO
            for begin in range(0, group, LANES):
                part = run[begin : begin + LANES] if begin < whole else tail
                part_weights = weight[begin : begin + LANES] if begin < whole else tail_weights
                for lane in range(LANES):
                    magnitude = min(int32(float_bits(part[lane] * factor) & SIGNLESS), LARGEST)
                    raised = int32(int32(magnitude + HALF) + int32(int32(magnitude >> int32(20)) & int32(1)))
                    exact = bits_float(magnitude)
                    small = (exact + ALIGNER) - ALIGNER
                    value = bits_float(int32(raised & KEPT)) if magnitude >= SMALLEST_NORMAL else small
                    miss = value - exact
                    partial[lane] += part_weights[lane] * (miss * miss)
            total = 0.0
            for lane in range(LANES):
                total += np.float64(partial[lane])
            errors[index, candidate] = total


@njit(inline="always")
def _nearest(scaled, b, v):
    """The value of the book nearest to `scaled`. b: 15 boundaries, v: 16 values, tuples, so that they are constants."""
    near = v[1] if scaled > b[0] else v[0]
    near = v[2] if scaled > b[1] else near
    near = v[3] if scaled > b[2] else near
    near = v[4] if scaled > b[3] else near
    near = v[5] if scaled > b[4] else near
    near = v[6] if scaled > b[5] else near
    near = v[7] if scaled > b[6] else near
    near = v[8] if scaled > b[7] else near
    near = v[9] if scaled > b[8] else near
    near = v[10] if scaled > b[9] else near
    near = v[11] if scaled > b[10] else near
    near = v[12] if scaled > b[11] else near
    near = v[13] if scaled > b[12] else near
    near = v[14] if scaled > b[13] else near
    return v[15] if scaled > b[14] else near


@njit(**OPTIONS)
def _book_sums(run, weight, factor, boundaries, values, sums):
    """(Σ weight·(c - x)², Σ weight·x·c, Σ weight·c²) for x = run · factor and c the nearest of the book's values.

    sums [3 · LANES]: float32, room to work in. One array, for LLVM gives up on loops with many that might overlap.
    """
    sums[:] = ZERO
    for begin in range(0, run.shape[0], LANES):
        part, part_weights = run[begin : begin + LANES], weight[begin : begin + LANES]
        for lane in range(LANES):
            scaled = part[lane] * factor
            chosen = _nearest(scaled, boundaries, values)
            miss = chosen - scaled
            weighted = part_weights[lane] * chosen
            sums[lane] += part_weights[lane] * (miss * miss)
            sums[LANES + lane] += weighted * scaled
            sums[2 * LANES + lane] += weighted * chosen
    error, product, square = 0.0, 0.0, 0.0
    for lane in range(LANES):
        error += np.float64(sums[lane])
        product += np.float64(sums[LANES + lane])
        square += np.float64(sums[2 * LANES + lane])
    return error, product, square


@njit(**OPTIONS)
def book_absmax(runs, ratios, refits, weights, first, boundaries, values, absmax):
    """The absmax of least weighted error for each run: the best ratio of the true one, then least-squares refits.

    runs [n, group]: float32, group a multiple of LANES. ratios [candidates] float32. weights, first: as in
    `e4m3_errors`. boundaries, values: tuples of 15 and 16 float32, the book, ascending. absmax [n]: float32, the true
    one; overwritten.
    """
    sums = np.empty(3 * LANES, np.float32)
    for index in range(runs.shape[0]):
        run, weight = runs[index], weights[(first + index) % weights.shape[0]]
        largest = absmax[index]
        if not largest > np.float32(1e-30):
            continue
        least, product, square = np.inf, 0.0, 0.0
        for candidate in range(ratios.shape[0]):
            tried = largest * ratios[candidate]
            error, tried_product, tried_square = _book_sums(
                run, weight, np.float32(1) / tried, boundaries, values, sums
            )
            error *= np.float64(tried) * np.float64(tried)
            if error < least:
                least, product, square, absmax[index] = error, tried_product, tried_square, tried
        for _ in range(refits):
            if not square > 0.0:
                break
            # For fixed codes c the best scale is Σ w c / Σ c²; x above is w / scale.
            tried = np.float32(np.float64(absmax[index]) * (product / square))
            if not tried > np.float32(1e-30):
                break
            error, product, square = _book_sums(run, weight, np.float32(1) / tried, boundaries, values, sums)
            error *= np.float64(tried) * np.float64(tried)
            if not error < least:
                break
            least, absmax[index] = error, tried
