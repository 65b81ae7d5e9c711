"""What is compared: formats at equal bytes, and the ways to round into them, each through the product's own `convert`.

A weight comes back by decoding the file that was written, so that what is scored is what a loader would compute with.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import streamquant
from streamquant import FormatChoice, Recipe
from streamquant.transcode import Options

FORMATS: dict[str, dict[str, Any]] = {
    "fp8-tensor": dict(kind="fp8", scaling_mode="tensor"),
    "fp8-row": dict(kind="fp8", scaling_mode="row"),
    "fp8-block64": dict(kind="fp8", scaling_mode="block", block_size=64),
    "int8-row": dict(kind="int8", scaling_mode="row", convrot=False),
    "int8-row-convrot": dict(kind="int8", scaling_mode="row", convrot=True),
    "int8-block128": dict(kind="int8", scaling_mode="block", block_size=128),
    "nf4": dict(kind="nf4"),
    "nf4-double": dict(kind="nf4", double_quant=True),
    "fp4": dict(kind="fp4"),
}
NEAREST = "rtn"
MEMORY_BUDGET = 8 << 30  # the whole H of 6144 columns and what is made of it take 4 GB


@dataclass(frozen=True)
class Method:
    """A way to round. calibration: which file it needs, "sketch", "dense" or "noise", or none. recipe: what it adds to that."""

    rounding: str = "learned"
    calibration: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    NEAREST: Method("rtn"),
    "no-data": Method(),
    "scales": Method("simple"),
    "structure": Method(recipe=dict(structure=True)),
    "svd": Method(recipe=dict(objective="svd")),
    "noise": Method(calibration="noise"),
    "sketch-32": Method(calibration="sketch", recipe=dict(calibration_rank=32)),
    "sketch": Method(calibration="sketch"),
    "sketch-sweeps": Method(calibration="sketch", recipe=dict(sweeps=2)),
    "dense": Method(calibration="dense", recipe=dict(calibration_mode="dense")),
    "dense-sweeps": Method(calibration="dense", recipe=dict(calibration_mode="dense", sweeps=2)),
}
METHOD_TITLES = {
    "rtn": "nearest",
    "no-data": "no data, as it comes",
    "scales": "better scales (A)",
    "structure": "structure, no data (B)",
    "svd": "peer's objective (svd)",
    "noise": "calibrated on noise",
    "sketch-32": "calibrated, rank 32",
    "sketch": "calibrated (C)",
    "sketch-sweeps": "calibrated, 2 sweeps",
    "dense": "dense (C+)",
    "dense-sweeps": "dense, 2 sweeps (C++)",
}


@dataclass(frozen=True)
class Quantized:
    """Weights float32 by source key, everything the source held. layers: keys of the quantized ones.

    bytes: of those layers on disk, scales included; size_bytes: of their weights in BF16.
    """

    weights: dict[str, torch.Tensor]
    layers: list[str]
    bytes: int
    seconds: float

    @property
    def size_bytes(self) -> int:
        return sum(2 * self.weights[key].numel() for key in self.layers)


def quantize(source: Path, destination: Path, format: str, method: str, calibrations: dict[str, Path]) -> Quantized:
    """Convert `source` and decode what was written.

    calibrations: the files by name. Raises KeyError when the method needs one that is not there.
    """
    how = METHODS[method]
    base = FormatChoice(**FORMATS[format], rounding=how.rounding)
    extra = dict(how.recipe)
    if how.calibration:
        extra["calibration"] = str(calibrations[how.calibration])
    recipe = Recipe(base=base, **extra)
    begin = time.perf_counter()
    report = streamquant.convert(source, destination, recipe, options=Options(force=True, memory_budget=MEMORY_BUDGET))
    seconds = time.perf_counter() - begin
    done = [layer for layer in report.layers if layer.format not in ("copy", "cast")]
    return Quantized(
        decoded(destination, source, recipe),
        [layer.key for layer in done],
        sum(layer.output_bytes for layer in done),
        seconds,
    )


def decoded(path: Path, source: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Every source tensor back from a converted file in float32, quantized layers through their format's own decode."""
    weights = {}
    with safe_open(path, "pt") as file:
        for unit in streamquant.plan(source, recipe).units:
            tensors = {output.suffix: file.get_tensor(unit.output_name(output)) for output in unit.outputs}
            weights[unit.key] = unit.format.decode(tensors, torch.float32)
    return weights
