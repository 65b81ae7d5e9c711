"""Synthetic checkpoints of any size, written to disk tile by tile in constant memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.shapes import TensorShape
from benchmarks.weights import Weights
from streamquant.checkpoint.header import build_header, layout


def write_checkpoint(
    path: Path,
    tensors: Iterable[TensorShape],
    seed: int = 0,
    sparse: bool = False,
    advance: Callable[[int], None] | None = None,
) -> int:
    """Write `tensors` with random weights to `path`; return the file's size.

    With `sparse` the data is a hole that reads as zeros and takes no disk. `advance` is told of bytes written. The file
    appears under its name only when it is complete, so that one which exists can be used again.
    """
    placed = layout(tensors)
    content = "zeros" if sparse else f"random, seed {seed}"
    header = build_header(placed, {"format": "pt", "synthetic": content})
    size = len(header) + placed[-1].end
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(header)
        if sparse:
            file.truncate(size)
        else:
            weights = Weights(seed)
            for tensor in placed:
                for tile in weights.tiles(tensor.name, tensor.shape, tensor.dtype):
                    file.write(tile.data)
                    if advance is not None:
                        advance(tile.nbytes)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return size
