"""Whether a layer holds its source's weights in another order: rows moved about, or columns shifted."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .layouts import Layout, Read, tiles

PROBES = 4  # rows whose place is looked for
FOUND, NEARER = 0.75, 0.2  # cosine from which two rows are the same under each other's scales, and over that in place
MOST_ELEMENTS = 1 << 29  # of a source that is gone through for it


def reordered(layout: Layout, reference: Layout, read: Read, read_reference: Read) -> str | None:
    """A clause, or None where order explains nothing."""
    rows, columns = (layout.shape[0], layout.columns) if len(layout.shape) == 2 else (0, 0)
    if rows < 2 or columns < 16 or rows * columns > MOST_ELEMENTS:
        return None
    places = np.unique(np.linspace(0, rows - 1, PROBES).astype(int))
    probes = np.stack([layout.decode(read, row * columns, (row + 1) * columns).values for row in places])
    norms = np.linalg.norm(probes, axis=1)
    if not np.isfinite(norms).all() or not norms.all():
        return None
    probes /= norms[:, None]
    best, where = np.zeros(len(places)), np.zeros(len(places), dtype=int)
    own = np.empty_like(probes)
    for begin, end in tiles(layout.shape):
        if end - begin < columns:
            return None  # a row in pieces: longer than any that are stored in another order
        values = reference.decode(read_reference, begin, end).values.reshape(-1, columns)
        first = begin // columns
        lengths = np.linalg.norm(values, axis=1)
        cosines = (values @ probes.T) / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None]
        top = cosines.argmax(axis=0)
        better = cosines[top, np.arange(len(places))] > best
        best[better], where[better] = cosines[top, np.arange(len(places))][better], first + top[better]
        for index, row in enumerate(places):
            if first <= row < first + len(values):
                own[index] = values[row - first] / max(lengths[row - first], np.finfo(np.float32).tiny)
    in_place = np.einsum("ij,ij->i", probes, own)
    moved = (best > np.maximum(FOUND, in_place + NEARER)) & (where != places)
    if np.count_nonzero(moved) * 2 >= len(places):
        (shift, times), *_ = Counter((places[moved] - where[moved]).tolist()).most_common(1)
        index = int(np.flatnonzero(moved & (places - where == shift))[0])
        order = f"shifted by {shift:+,}" if 2 * times > np.count_nonzero(moved) else "in another order"
        return f"its rows are {order}: row {places[index]:,} holds row {where[index]:,} of its source"
    return _shifted_columns(probes, own)


def _shifted_columns(probes: np.ndarray, own: np.ndarray) -> str | None:
    """Every row correlated with its source at all shifts at once."""
    matched = np.fft.irfft(np.fft.rfft(probes) * np.fft.rfft(own).conj(), n=probes.shape[1])
    shifts, heights = matched.argmax(axis=1), matched.max(axis=1)
    shift = int(np.median(shifts))
    if not shift or np.count_nonzero((shifts == shift) & (heights > FOUND)) * 2 < len(probes):
        return None
    shift -= probes.shape[1] if shift > probes.shape[1] // 2 else 0
    return f"its columns are shifted by {shift:+,}"
