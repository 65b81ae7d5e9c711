"""Weights in memory, for tests of what is learned from a checkpoint without data."""

from __future__ import annotations

import numpy as np


class SmallWeights(dict):
    """Tensors by name, as `streamquant.rounding.weights.Weights` wants them. quantized: names of which only the codes are there."""

    def __init__(self, tensors=(), quantized=()):
        super().__init__(tensors)
        self.quantized = set(quantized)

    def shape(self, name):
        return self[name].shape if name in self and name not in self.quantized else None

    def rows(self, name, begin, end):
        assert 0 <= begin < end <= len(self[name])
        return self[name][begin:end].copy()

    def linear(self, name, rows, columns, rng, bias=False, gain=1.0):
        """Add a random linear layer."""
        self[f"{name}.weight"] = (gain * rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        if bias:
            self[f"{name}.bias"] = rng.standard_normal(rows).astype(np.float32)
