"""Histograms of a layer's weights, errors and scales, from a few tiles of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamquant.checkpoint.reader import TileReader, open_checkpoint
from streamquant.pairing import Pair, pair_up
from streamquant.stored import Read, read_contents, tiles

TILES = 3  # of each layer, spread evenly
BINS = 60
SCALES = 4096
COVERED = 99.9  # percentile of the magnitudes that an axis reaches; what lies beyond is counted in the outer bins


@dataclass(frozen=True)
class Histogram:
    """Counts of equal bins from `low` to `high`; the outer ones hold all that lies beyond."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class LayerSample:
    """The histograms of one layer; scales is None where there are none."""

    weights: Histogram
    errors: Histogram
    scales: Histogram | None


def histogram(values: np.ndarray, symmetric: bool) -> Histogram | None:
    """Of the finite values; None when there are none. symmetric: around 0."""
    values = values[np.isfinite(values)].astype(np.float64)
    if not values.size:
        return None
    if symmetric:
        high = float(np.percentile(np.abs(values), COVERED)) or float(np.abs(values).max()) or 1.0
        low = -high
    else:
        low, high = float(values.min()), float(values.max())
        if low == high:
            low, high = low - abs(low or 1.0) / 2, high + abs(high or 1.0) / 2
    counts, _ = np.histogram(np.clip(values, low, high), bins=BINS, range=(low, high))
    return Histogram(low, high, tuple(int(count) for count in counts))


def sample_layers(source: str | Path, output: str | Path) -> dict[str, LayerSample]:
    """Histograms of every layer that can be decoded on both sides, by key."""
    before, after = (read_contents(open_checkpoint(path)) for path in (source, output))
    found = {}
    with TileReader(before.checkpoint) as reader, TileReader(after.checkpoint) as output_reader:
        for pair in pair_up(before, after).pairs:
            if pair.kind == "weight" and (sample := _sample(pair, reader.tile, output_reader.tile)):
                found[pair.key] = sample
    return found


def _sample(pair: Pair, read: Read, read_output: Read) -> LayerSample | None:
    ranges = list(tiles(pair.reference.shape))
    chosen = sorted({int(index) for index in np.linspace(0, len(ranges) - 1, TILES).round()}) if ranges else []
    weights, errors = [], []
    for index in chosen:
        reference = pair.reference.decode(read, *ranges[index]).values
        with np.errstate(invalid="ignore", over="ignore"):
            errors.append(pair.layout.decode(read_output, *ranges[index]).values - reference)
        weights.append(reference)
    if not weights:
        return None
    scales, _ = pair.layout.scales(read_output, SCALES)
    of_weights, of_errors = histogram(np.concatenate(weights), True), histogram(np.concatenate(errors), True)
    if of_weights is None or of_errors is None:
        return None
    return LayerSample(of_weights, of_errors, histogram(scales, False) if scales.size > 1 else None)
