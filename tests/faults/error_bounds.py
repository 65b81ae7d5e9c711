"""How far a decoded weight may be from its source, element by element, from a format's definition alone.

Where codes are rounded to nearest (whatever the scales are), an element is off by half a step of its grid times its scale,
or, beyond the grid's end, by what sticks out. A rotated row is bounded as a vector: rotating changes no length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamquant.kernels.codebooks import CODE_BOOKS

ROUNDING = 4e-6  # relative: a few roundings of float32 on the way there and back
SMALLEST = 1e-37  # absolute: where float32 has few digits left
# (mantissa bits, smallest exponent, largest number)
FLOAT8 = {"F8_E4M3": (3, -6, 448.0), "F8_E5M2": (2, -14, 57344.0)}
DYNAMIC_STEP = 0.0075  # half the widest gap of bitsandbytes' dynamic map, and its missing -1


def violations(exact: np.ndarray, decoded: np.ndarray, tensors: dict[str, np.ndarray], kind: str, **facts: Any) -> np.ndarray:
    """Flat indices of elements that are further off than they may be.

    exact: float64 [M, N], what float32 holds of the source. decoded: float64 [M, N]. tensors: scales and so on, as they
    are stored. kind: dtype of the codes, or "nf4", "fp4". Elements that share a scale with what is no number are left out.
    """
    bound = {"I8": _int8, "nf4": _book, "fp4": _book}.get(kind, _float8)
    with np.errstate(invalid="ignore", over="ignore"):
        allowed = bound(exact, tensors, kind, facts)
        slack = ROUNDING * (np.abs(exact) + allowed) + SMALLEST
        off = np.abs(decoded - exact)
        if facts.get("rotation"):
            group = facts["rotation"]
            off = np.sqrt(np.square(off.reshape(-1, group)).sum(1))
            allowed = allowed.reshape(-1, group)[:, 0]
            slack = 8 * ROUNDING * np.sqrt(np.square(exact.reshape(-1, group)).sum(1)) + SMALLEST
        counted = np.isfinite(exact.reshape(off.size, -1)).all(1).reshape(off.shape) & (allowed < np.inf)
        return np.flatnonzero((counted & ~(off <= allowed + slack)).reshape(-1))


def spread(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One scale per element, from the four shapes that scales have."""
    rows, columns = shape
    scale = scale.astype(np.float64)
    if scale.size == 1:
        return np.full(shape, scale.reshape(-1)[0])
    if scale.ndim == 1 or scale.shape == (rows, 1):
        return np.broadcast_to(scale.reshape(rows, 1), shape)
    if scale.ndim == 3:
        return np.repeat(scale[:, :, 0], columns // scale.shape[1], axis=1)
    return np.repeat(np.repeat(scale, rows // scale.shape[0], axis=0), columns // scale.shape[1], axis=1)


def _float8(exact: np.ndarray, tensors: dict[str, np.ndarray], kind: str, facts: dict[str, Any]) -> np.ndarray:
    mantissa, smallest, largest = FLOAT8[kind]
    scale = spread(tensors["weight_scale"], exact.shape)
    value = np.abs(exact) / scale
    exponent = np.maximum(np.floor(np.log2(np.maximum(value, 1e-300))), smallest)
    half_step = np.exp2(exponent - mantissa) / 2
    return np.where(value > largest, value - largest, half_step * (1 + 1e-5)) * scale


def _int8(exact: np.ndarray, tensors: dict[str, np.ndarray], kind: str, facts: dict[str, Any]) -> np.ndarray:
    scale = spread(tensors["weight_scale"], exact.shape)
    group = facts.get("rotation", 0)
    # 127.00001 steps of 1 / 127 of the largest are still 127; in a rotated row that can happen in every place.
    return 0.5001 * scale * (np.sqrt(group) if group else 1)


def _book(exact: np.ndarray, tensors: dict[str, np.ndarray], kind: str, facts: dict[str, Any]) -> np.ndarray:
    book = np.sort(CODE_BOOKS[kind].astype(np.float64))
    size, flat = facts["block_size"], exact.reshape(-1)
    absmax = facts["absmax"].astype(np.float64)
    per_element = np.repeat(absmax, size)[: flat.size]
    value = flat / np.maximum(per_element, 1e-300)
    # The decision boundaries are the book's own middles, rounded to float32.
    distance = np.min(np.abs(value[:, None] - book[None, :]), axis=1)
    allowed = (distance + 1e-6) * per_element
    if facts["nested"] is not None:
        # Codes were chosen for the absmax that was meant, which the reader's 8 bits miss by a step of their map.
        largest = np.fmax.reduceat(np.abs(flat), np.arange(0, flat.size, size))
        missed = DYNAMIC_STEP * np.repeat(facts["nested"].astype(np.float64), 256)[: largest.size] * 1.06
        half_gap = np.diff(book).max() / 2
        allowed = np.maximum(allowed, np.repeat(half_gap * largest + missed, size)[: flat.size])
    finite = np.isfinite(np.maximum.reduceat(np.abs(flat), np.arange(0, flat.size, size)))
    return np.where(np.repeat(finite, size)[: flat.size], allowed, np.inf).reshape(exact.shape)
