"""Quality on a diffusion transformer that was really trained: the small Flux.2.

16 prompts at 3 spread steps of their paths calibrate; 32 others, from other noise, are scored. Velocities are compared
at the same points, those of the unquantized model's own path; latents and pictures at the end of each model's own path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import tiny_shapes
from benchmarks.quality_layers import Measured, OnDemand, output_error, second_moments
from benchmarks.quality_results import FLUX
from benchmarks.tiny_flux import TinyFlux2
from streamquant.calibration import collect, self_calibrate

STEPS = 16
RECORDED = (0.1, 0.5, 0.9)  # of the way from noise to picture, for calibration
PROMPT_ORDER = 7
# Which prompts, of all in a fixed order, and which noise: no two sets share either.
SETS = {"calibrate": (0, 16), "develop": (16, 32), "final": (48, 32)}
LATENT_SHAPE = (tiny_shapes.LUMA + 2 * tiny_shapes.CHROMA, tiny_shapes.GRID, tiny_shapes.GRID)


def prompts(part: str) -> Tensor:
    """The prompts of one of SETS, int64 [n, 5]."""
    first, count = SETS[part]
    return tiny_shapes.prompts(count, PROMPT_ORDER, first)


def noise(part: str) -> Tensor:
    first, count = SETS[part]
    return torch.randn(count, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1000 + first))


Watch = Callable[[int, Tensor, Tensor], None]


@torch.no_grad()
def sample(model: TinyFlux2, latent: Tensor, context: Tensor, watch: Watch | None = None) -> Tensor:
    """The end of the path from noise `latent`, by Euler's method; `watch(step, latent, velocity)` sees every step."""
    for step in range(STEPS):
        velocity = model(latent, torch.full((len(latent),), 1 - step / STEPS), context)
        if watch is not None:
            watch(step, latent, velocity)
        latent = latent - velocity / STEPS
    return latent


class FluxStudy:
    """The model, its own paths for the scored prompts, and what its layers see on them. `source`: its checkpoint."""

    def __init__(self, scored_on: str, workdir: Path, source: Path, name: str = FLUX):
        self.source, self.name = source, name
        self.model = TinyFlux2.load(source)
        self.prompts, self.noise = prompts(scored_on), noise(scored_on)
        self.context = tiny_shapes.context(self.prompts)
        self.path: list[tuple[Tensor, Tensor]] = []
        self.keys = [f"{name}.weight" for name, layer in self.model.named_modules() if isinstance(layer, torch.nn.Linear)]
        self.original = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        # The scored path is walked once, watched by the judge.
        self.moments = second_moments(self.model, self.keys, self._walk)
        self.calibrations = OnDemand(lambda kind: self._calibrate(kind, workdir / f"{source.stem}-{kind}.safetensors"))

    def _walk(self) -> None:
        self.latent = sample(self.model, self.noise, self.context, lambda _, x, v: self.path.append((x, v)))

    def _calibrate(self, kind: str, path: Path) -> Path:
        if kind == "noise":
            shapes = {"latent": (1, *LATENT_SHAPE), "context": (1, len(tiny_shapes.ATTRIBUTES), tiny_shapes.CONTEXT_WIDTH)}
            calibration = self_calibrate(self.model, self.model, shapes, steps=STEPS, recorded=RECORDED, budget=None)
        else:
            watched = {round(share * (STEPS - 1)) for share in RECORDED}
            with collect(self.model, dense=kind == "dense", budget=None) as collector:
                # Before each step it is decided whether the next one is watched.
                collector.paused = 0 not in watched
                sample(
                    self.model, noise("calibrate"), tiny_shapes.context(prompts("calibrate")),
                    lambda step, x, v: setattr(collector, "paused", step + 1 not in watched),
                )  # fmt: skip
            calibration = collector.calibration()
        calibration.save(path)
        return path

    def applies(self, method: str) -> bool:
        return True

    def measure(self, weights: dict[str, Tensor]) -> Measured:
        """What these weights cost."""
        measured = Measured()
        for key in self.keys:
            if not torch.equal(weights[key], self.original[key]):
                measured.layers[key.removesuffix(".weight")] = output_error(self.moments[key], self.original[key], weights[key])
        quantized = TinyFlux2.of(weights)
        errors, sizes = [], []
        for step, (latent, velocity) in enumerate(self.path):
            time = 1 - step / STEPS
            with torch.no_grad():
                other = quantized(latent, torch.full((len(latent),), time), self.context)
            errors.append(float((other - velocity).double().square().sum()))
            sizes.append(float(velocity.double().square().sum()))
            measured.whole["velocity error", f"{time:.4g}"] = math.sqrt(errors[-1] / sizes[-1])
        measured.whole["velocity error", ""] = math.sqrt(sum(errors) / sum(sizes))
        latent = sample(quantized, self.noise, self.context)
        measured.whole["final latent error", ""] = float((latent - self.latent).norm() / self.latent.norm())
        measured.whole["PSNR", ""] = psnr(tiny_shapes.decode(latent), tiny_shapes.decode(self.latent))
        return measured

    def pictures(self, weights: dict[str, Tensor], count: int) -> Tensor:
        """The first `count` scored samples [count, 3, 48, 48] as these weights draw them."""
        return tiny_shapes.decode(sample(TinyFlux2.of(weights), self.noise[:count], self.context[:count]))


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal over noise in dB, the mean over pictures [n, 3, height, width] of range -1 … 1."""
    noise_power = (images - reference).double().square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / noise_power)).mean())
