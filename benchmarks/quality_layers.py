"""What a layer's error costs at its output, from the inputs that the layer really gets.

Inputs are watched here, in float64, and not by the product's own collector: the judge shares no code with the judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Measured:
    """What one set of quantized weights costs. layers: output error by layer; whole: the model's, by (metric, detail)."""

    layers: dict[str, float] = field(default_factory=dict)
    whole: dict[tuple[str, str], float] = field(default_factory=dict)


class OnDemand(dict[str, Path]):
    """Files by kind, each made by `make(kind)` when it is first asked for: a calibration takes minutes."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, kind: str) -> Path:
        self[kind] = self._make(kind)
        return self[kind]


def second_moments(model: nn.Module, keys: Iterable[str], run: Callable[[], object]) -> dict[str, Tensor]:
    """XᵀX / n, float64 [N, N], of the inputs that reach the layers with weights `keys` during `run()`."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(key: str) -> Callable:
        def before_forward(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs = arguments[0].detach().flatten(0, -2).double()
            sums[key] = sums.get(key, 0) + inputs.T @ inputs
            counts[key] = counts.get(key, 0) + len(inputs)

        return before_forward

    handles = [model.get_submodule(key.removesuffix(".weight")).register_forward_pre_hook(watch(key)) for key in keys]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {key: total / counts[key] for key, total in sums.items()}


def output_error(moment: Tensor, weight: Tensor, quantized: Tensor) -> float:
    """‖X(Q - W)ᵀ‖ / ‖XWᵀ‖ from XᵀX / n [N, N], W and Q [M, N]."""
    error, weight = (quantized.double() - weight.double()), weight.double()
    squares = [float(((matrix @ moment) * matrix).sum()) for matrix in (error, weight)]
    return float(np.sqrt(max(squares[0], 0.0) / squares[1]))


def geometric_mean(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


@contextmanager
def one_thread():
    """Short products gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
