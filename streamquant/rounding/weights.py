"""A checkpoint's weights as float32 rows, read piece by piece, and what they do to a few inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from streamquant.checkpoint.reader import SourceTensor, TileReader
from streamquant.stored import Layout, Plain, StoredLayer, elements
from streamquant.stored.recognise import FLOATS

# Rows of a weight read at once hold this many elements. Fixed, so that sums over them do not depend on any budget.
CHUNK_ELEMENTS = 1 << 21


class Weights(Protocol):
    """Tensors by their bare names, the checkpoint's prefix taken off, ".weight" and ".bias" kept."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name, of any dtype."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The weight's shape, None where there is none or it cannot be decoded."""

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Rows [begin, end) of a tensor that has a shape: float32 [end - begin, ...], the caller's own."""


class CheckpointWeights:
    """The weights of an open checkpoint; safe to use from several threads.

    prefix: what its names carry before the architecture's own. stored: its quantized layers by name, which are decoded.
    Besides these, of dtypes BF16, F16, F32 and F64 only: a weight in any other counts as absent. `rows` raises
    SourceReadError.
    """

    def __init__(self, reader: TileReader, prefix: str = "", stored: Mapping[str, StoredLayer] = MappingProxyType({})):
        self.reader, self.prefix, self.stored = reader, prefix, stored

    def _tensor(self, name: str) -> SourceTensor | None:
        return self.reader.checkpoint.tensors.get(self.prefix + name)

    def _layout(self, name: str) -> Layout | None:
        layer = self.stored.get((self.prefix + name).removesuffix(".weight")) if name.endswith(".weight") else None
        if layer and layer.layout:
            return layer.layout
        tensor = self._tensor(name)
        return None if tensor is None or tensor.info.dtype not in FLOATS else Plain(tensor.info.shape, tensor)

    def __contains__(self, name: str) -> bool:
        return self._tensor(name) is not None

    def shape(self, name: str) -> tuple[int, ...] | None:
        layout = self._layout(name)
        return layout.shape if layout else None

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        layout = self._layout(name)
        width = math.prod(layout.shape[1:])
        values = elements(layout, self.reader.tile, begin * width, end * width)
        return values.reshape(end - begin, *layout.shape[1:])


def matrix_shape(weights: Weights, layer: str) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer, None where the checkpoint has none of that name."""
    shape = weights.shape(f"{layer}.weight")
    return shape if shape is not None and len(shape) == 2 else None


def row_chunks(begin: int, end: int, columns: int) -> Iterator[tuple[int, int]]:
    """[begin, end) cut into runs of rows of at most CHUNK_ELEMENTS elements, one row at least."""
    step = max(CHUNK_ELEMENTS // max(columns, 1), 1)
    for first in range(begin, end, step):
        yield first, min(first + step, end)


def linear_rows(weights: Weights, layer: str, inputs: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Outputs [begin, end) of a linear layer, bias included: [n, end - begin] in the inputs' dtype. inputs [n, N]."""
    outputs = inputs @ weights.rows(f"{layer}.weight", begin, end).astype(inputs.dtype, copy=False).T
    if weights.shape(f"{layer}.bias") is not None:
        outputs += weights.rows(f"{layer}.bias", begin, end)
    return outputs


def linear(weights: Weights, layer: str, inputs: np.ndarray) -> np.ndarray:
    """A whole linear layer, chunk after chunk: [n, M] in the inputs' dtype. inputs [n, N]."""
    rows, columns = matrix_shape(weights, layer)
    outputs = np.empty((inputs.shape[0], rows), dtype=inputs.dtype)
    for begin, end in row_chunks(0, rows, columns):
        outputs[:, begin:end] = linear_rows(weights, layer, inputs, begin, end)
    return outputs


def silu(values: np.ndarray) -> np.ndarray:
    """x / (1 + e^-x), in the dtype of x."""
    result = np.negative(values)
    with np.errstate(over="ignore"):
        np.exp(result, out=result)
    result += 1
    return np.divide(values, result, out=result)


def gelu_tanh(values: np.ndarray) -> np.ndarray:
    """x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), in the dtype of x (Hendrycks, Gimpel, "Gaussian Error Linear Units",
    2016, section 2)."""
    inner = values * values
    inner *= values.dtype.type(0.044715)
    inner += 1
    inner *= values
    inner *= values.dtype.type(np.sqrt(2 / np.pi))
    np.tanh(inner, out=inner)
    inner += 1
    inner *= values
    inner *= values.dtype.type(0.5)
    return inner


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}
