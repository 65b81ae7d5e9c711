"""Watching a model run: second moments of what reaches its linear layers, in one pass, on the device they are on.

    with streamquant.calibration.collect(model) as collector:
        for prompt in prompts:
            generate(model, prompt)
    collector.calibration().save("model.calibration.safetensors")

A dozen prompts or more and a few spread steps of each do better than many steps of few (docs/rounding.md). Cost: a token
adds 4·N·r flops to a layer's 2·N·M. `budget` bounds that share: of each call only so many tokens are taken, evenly
spread, that it holds. Products are taken in float32 whatever the model computes in, outside autocast, and summed in
float32 (sketch, H) or float64 (mean, diagonal).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from streamquant.errors import CalibrationError

from .file import Calibration
from .sketch import DEFAULT_RANK, OVERSAMPLING, probe
from .statistics import LayerStatistics

DENSE_LIMIT = 12288  # the widest input whose H [N, N] is kept; 0.6 GB in float32
FEWEST_TOKENS = 16  # of a call, that are taken whatever the budget: layers that see one token a call cost nothing
# A product in float32 on a GPU costs this many of the forward's half-precision ones (tensor cores against none).
FLOAT32_PRICE_ON_GPU = 8.0


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every module that multiplies by a weight [out_features, in_features], by its path in the model."""

    def is_linear(module: torch.nn.Module) -> bool:
        if isinstance(module, torch.nn.Linear):
            return True
        shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        weight = getattr(module, "weight", None)
        return isinstance(weight, torch.Tensor) and weight.dim() == 2 and tuple(weight.shape) == shape

    return {name: module for name, module in model.named_modules() if name and is_linear(module)}


class _Moments:
    """Running sums over one layer's inputs; tensors live on the device of the first input."""

    def __init__(self, columns: int, width: int, seed: int, dense: bool, device: torch.device):
        self.count = 0
        precise = torch.float32 if device.type == "mps" else torch.float64  # which MPS does not have
        self.total = torch.zeros(columns, dtype=precise, device=device)
        self.energy = torch.zeros(columns, dtype=precise, device=device)
        self.probe = None if dense else torch.from_numpy(probe(columns, width, seed).copy()).to(device)
        self.product = torch.zeros(columns, columns if dense else width, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """inputs [n, N]: any floating dtype."""
        inputs = inputs.to(self.product.device, torch.float32)
        self.count += inputs.shape[0]
        self.total += inputs.sum(0)
        self.energy += inputs.square().sum(0)
        self.product.addmm_(inputs.T, inputs if self.probe is None else inputs @ self.probe)

    def statistics(self, seed: int) -> LayerStatistics:
        def average(total: torch.Tensor) -> np.ndarray:
            return (total.double().cpu() / self.count).float().numpy()

        moment = {"hessian" if self.probe is None else "sketch": average(self.product)}
        return LayerStatistics(self.count, average(self.total), average(self.energy), seed=seed, **moment)


class Collector:
    """A context manager that watches a model's linear layers; see `collect`."""

    def __init__(self, model: torch.nn.Module, rank: int, dense: bool, budget: float | None, seed: int,
                 only: Callable[[str], bool] | None):  # fmt: skip
        self.width, self.dense, self.budget, self.seed = rank + OVERSAMPLING, dense, budget, seed
        self.paused = False
        self._layers = {name: layer for name, layer in linear_layers(model).items() if only is None or only(name)}
        if not self._layers:
            raise CalibrationError("The model has no linear layer to collect from; give the module that holds them.")
        self._moments: dict[str, _Moments] = {}
        self._calls: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Collector:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def calibration(self) -> Calibration:
        """What was seen so far. Raises CalibrationError when no layer saw anything, or one saw NaN or infinity."""
        layers = {name: moments.statistics(self.seed) for name, moments in self._moments.items()}
        if not layers:
            raise CalibrationError("No linear layer saw an input; run the model inside the with block.")
        for name, layer in layers.items():
            layer.check(name)
        return Calibration(layers, self.seed)

    def _hook(self, name: str) -> Callable[..., None]:
        def before_forward(layer: torch.nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
            inputs = arguments[0] if arguments else keywords.get("input", keywords.get("x"))
            if (
                self.paused
                or not isinstance(inputs, torch.Tensor)
                or not inputs.is_floating_point()
                or not inputs.numel()
            ):
                return
            # Sums must stay ordinary tensors though the model runs in inference mode, and float32 though under
            # autocast.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
                self._add(name, layer, inputs.detach().reshape(-1, inputs.shape[-1]))

        return before_forward

    def _add(self, name: str, layer: torch.nn.Module, inputs: torch.Tensor) -> None:
        columns = inputs.shape[1]
        dense = self.dense and columns <= DENSE_LIMIT
        if (moments := self._moments.get(name)) is None:
            moments = self._moments[name] = _Moments(columns, self.width, self.seed, dense, inputs.device)
        call = self._calls[name] = self._calls.get(name, -1) + 1
        step = self._step(inputs, layer.weight.shape[0], columns if dense else 2 * self.width)
        # Another offset every call, so that no position in the sequence is left out for ever.
        moments.add(inputs[call % step :: step])

    def _step(self, inputs: torch.Tensor, out_features: int, work: int) -> int:
        """Every how manyth token is taken. work: multiply-adds per token and column, of which a forward has M."""
        if self.budget is None:
            return 1
        half = inputs.device.type == "cuda" and inputs.dtype in (torch.float16, torch.bfloat16)
        price = work * (FLOAT32_PRICE_ON_GPU if half else 1.0)
        step = math.ceil(price / (self.budget * max(out_features, 1)))
        return max(1, min(step, inputs.shape[0] // FEWEST_TOKENS))


def collect(
    model: torch.nn.Module, rank: int = DEFAULT_RANK, *, dense: bool = False, budget: float | None = 0.1, seed: int = 0,
    only: Callable[[str], bool] | None = None,
) -> Collector:  # fmt: skip
    """Collect what the linear layers of `model` see while it runs inside the `with`.

    rank: of the low-rank form that can be had later; 32 keeps nearly all of 64. dense: keep H whole for layers of up to
    12288 columns (4·N² bytes each). budget: the share of each layer's own multiplications that may be added; None takes
    every token, which a small set of data wants. only: names of layers for which it is true. Memory: 4·N·(rank + 8)
    bytes a layer. Inputs may be of any floating dtype; padding tokens count as inputs, so run without padding.
    Raises CalibrationError when the model has no linear layer.
    """
    if rank < 1:
        raise CalibrationError(f"A sketch of rank {rank} keeps nothing; give 1 or more.")
    if budget is not None and not budget > 0:
        raise CalibrationError(f"A budget of {budget} takes no token; give a share above 0, or None.")
    return Collector(model, rank, dense, budget, seed, only)


def self_calibrate(
    model: torch.nn.Module, velocity: Callable[..., torch.Tensor], input_shapes: dict[str, Sequence[int]], *,
    trajectories: int = 16, steps: int = 12, recorded: Sequence[float] = (0.1, 0.5, 0.9), seed: int = 0,
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **options: Any,
) -> Calibration:  # fmt: skip
    """A calibration without data: a flow-matching model run on its own trajectories, from noise, with random context.

    It keeps 85 % of what real prompts give (docs/rounding.md). velocity(latent, time, **context): calls the model and
    returns dx/dt, shaped as the latent; time is a float32 tensor [batch] falling from 1 (noise) to 0. input_shapes:
    "latent" and each context by its keyword, with the batch first; contexts are standard normal. The path is integrated
    by Euler's method in `steps` steps; of each trajectory the steps nearest to the shares `recorded` of the way are
    watched. options: of `collect`. Raises CalibrationError when there is no "latent", or the model diverges.
    """
    if "latent" not in input_shapes or trajectories < 1 or steps < 1:
        raise CalibrationError('Self-calibration needs the shape of a "latent", a trajectory and a step.')
    watched = {round(share * (steps - 1)) for share in recorded}
    with collect(model, seed=options.pop("sketch_seed", 0), **options) as collector, torch.no_grad():
        for latent, context in _noise(input_shapes, trajectories, seed, device, dtype):
            for step in range(steps):
                collector.paused = step not in watched
                now, then = 1.0 - step / steps, 1.0 - (step + 1) / steps
                time = torch.full((latent.shape[0],), now, dtype=torch.float32, device=latent.device)
                latent = latent + (then - now) * velocity(latent, time, **context)
        return collector.calibration()


def _noise(
    shapes: dict[str, Sequence[int]], count: int, seed: int, device: str | torch.device, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Starting latents and contexts; drawn on the CPU, so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        drawn = {name: torch.randn(*shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
        yield drawn.pop("latent"), drawn
