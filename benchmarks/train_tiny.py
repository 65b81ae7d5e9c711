"""Training of the small Flux.2 on procedural pictures, by flow matching, deterministic from its seed.

With pictures x and noise z the model learns v = z - x at x_t = (1 - t) x + t z, t logit-normal (Esser et al., "Scaling
rectified flow transformers", 2024, section 3.1). Weights are a running mean of the last steps, in bfloat16.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import machine, tiny_shapes
from benchmarks.tiny_flux import FluxSize, TinyFlux2

DATA = Path(__file__).resolve().parent / "data"
WEIGHTS = DATA / "tiny-flux2.safetensors"
PEAK_RATE, WARM_UP = 2e-3, 100
AVERAGING = 0.998
REPORT_EVERY = 50


@dataclass(frozen=True)
class Training:
    """How to train. hidden: of the model; threads: the bits of sums depend on them, so they belong to the recipe."""

    steps: int = 3600
    batch: int = 64
    hidden: int = 128
    seed: int = 0
    threads: int = 1


def run(training: Training, destination: Path, console: Console) -> None:
    """Train, and write the weights to `destination` and the facts beside them as .json."""
    begin, curve = time.perf_counter(), []
    average: dict[str, Tensor] = {}
    for step, loss, current in train(training):
        average = current
        if step % REPORT_EVERY == 0:
            curve.append((step, round(loss, 4)))
            seconds = time.perf_counter() - begin
            console.print(f"step {step} of {training.steps}: loss {loss:.4f}, {seconds:.0f} s", highlight=False)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in average.items()}
    destination.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, destination, {"modelspec.title": "tiny Flux.2 on procedural shapes"})
    facts = {
        "training": asdict(training),
        "weights": sum(weight.numel() for weight in weights.values()),
        "seconds": round(time.perf_counter() - begin),
        "processor seconds": round(time.process_time()),
        "machine": machine.facts(),
        "mean loss of the steps up to": curve,
    }
    destination.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    console.print(f"{destination}: {facts['weights']} weights, {facts['seconds']} s", soft_wrap=True)


def train(training: Training) -> Iterator[tuple[int, float, dict[str, Tensor]]]:
    """Yield after each step: its number from 1, the mean loss of the last 50 steps, the averaged weights."""
    torch.manual_seed(training.seed)
    torch.set_num_threads(training.threads)
    generator = torch.Generator().manual_seed(training.seed)
    model = TinyFlux2(FluxSize(training.hidden, tiny_shapes.CONTEXT_WIDTH)).train()
    for name, parameter in model.named_parameters():
        # Every block begins as the identity and the velocity as zero: adaLN-Zero (Peebles and Xie, 2022).
        if "modulation" in name or name == "final_layer.linear.weight":
            torch.nn.init.zeros_(parameter)
    average = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    losses: list[float] = []
    for step in range(1, training.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training.steps)
        loss = flow_matching_loss(model, training.batch, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(AVERAGING, step / (step + 10))
        with torch.no_grad():
            for name, weight in model.state_dict().items():
                average[name].lerp_(weight, 1 - keep)
        losses = [*losses[1 - REPORT_EVERY :], loss.item()]
        yield step, sum(losses) / len(losses), average


def learning_rate(step: int, steps: int) -> float:
    """Up in a line to the peak, down in half a cosine to nearly nothing at the last step."""
    if step <= WARM_UP:
        return PEAK_RATE * step / WARM_UP
    done = (step - WARM_UP) / max(steps - WARM_UP, 1)
    return PEAK_RATE * max(0.5 * (1 + math.cos(math.pi * done)), 1e-3)


def flow_matching_loss(model: TinyFlux2, batch: int, generator: torch.Generator) -> Tensor:
    """Mean square error of the velocity on `batch` new pictures, the forward pass in bfloat16 where that is enough."""
    prompt = torch.stack(
        [torch.randint(len(values), (batch,), generator=generator) for values in tiny_shapes.ATTRIBUTES], dim=1
    )
    latents = tiny_shapes.encode(tiny_shapes.pictures(prompt, generator))
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.sigmoid(torch.randn(batch, generator=generator))
    mixed = torch.lerp(latents, noise, t[:, None, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(mixed, t, tiny_shapes.context(prompt))
    return (velocity.float() - (noise - latents)).square().mean()
