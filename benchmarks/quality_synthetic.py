"""Quality on layers of a Flux.2's true width, whose weights and inputs are made to look like one's.

Weights have heavy tails, hot input channels and a low-rank part (`benchmarks.weights`). Inputs come from prompts and
times: what the first layers of a block see is normalised, then modulated by the time, with a few channels that the
modulation raises; what an MLP's second layer sees is the product of SwiGLU, correlated and heavy-tailed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.quality_layers import Measured, OnDemand
from benchmarks.quality_results import SYNTHETIC
from benchmarks.weights import Weights
from streamquant.calibration import collect

# Few rows: rows are rounded independently of each other, the ratio does not depend on their number.
LAYERS = {"blocks.0.attn.qkv": (384, 6144), "blocks.0.mlp.2": (192, 18432)}
TIMES = (0.9, 0.5, 0.1)
TOKENS = 48  # of each prompt at each time
SETS = {"calibrate": range(16), "develop": range(16, 32), "final": range(32, 48)}
RANK = 96  # directions that tokens share
HOT_SHARE = 0.002


class Inputs:
    """Inputs of one layer, [tokens, columns], for a prompt and a time; the layer's own directions come from its name."""

    def __init__(self, columns: int, gated: bool, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.columns, self.gated, self.seed = columns, gated, seed
        # Energies of shared directions fall as a power of their number.
        strength = torch.arange(1, RANK + 1).float().pow(-0.75)
        self.directions = [torch.randn(RANK, columns, generator=generator) * strength[:, None] for _ in range(1 + gated)]
        self.shift, self.shift_slope = 0.3 * torch.randn(2, columns, generator=generator)
        scale = 0.5 * torch.randn(2, columns, generator=generator)
        hot = torch.randperm(columns, generator=generator)[: max(1, round(columns * HOT_SHARE))]
        scale[:, hot] += 4 + 8 * torch.rand(2, len(hot), generator=generator)
        self.scale, self.scale_slope = scale

    def __call__(self, prompt: int, time: float) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1000 * prompt + round(100 * time))
        own = torch.randn(1, RANK, generator=generator)  # what all tokens of a prompt share
        tokens = [
            (own + torch.randn(TOKENS, RANK, generator=generator)) @ directions
            + (0.5 + time) * torch.randn(TOKENS, self.columns, generator=generator)
            for directions in self.directions
        ]
        if self.gated:
            gate, value = (functional.layer_norm(part, part.shape[-1:]) for part in tokens)
            return functional.silu(gate * (1 + self.scale.abs())) * value
        normal = functional.layer_norm(tokens[0], tokens[0].shape[-1:])
        return normal * (1 + self.scale + time * self.scale_slope) + self.shift + time * self.shift_slope


class SyntheticStudy:
    """Two layers. `source`: the checkpoint to convert."""

    name = SYNTHETIC

    def __init__(self, scored_on: str, workdir: Path):
        self.source = workdir / "synthetic.safetensors"
        self.original = {f"{name}.weight": _weight(name, shape) for name, shape in LAYERS.items()}
        save_file(self.original, self.source)
        self.inputs = {
            name: Inputs(columns, name.endswith("mlp.2"), seed) for seed, (name, (_, columns)) in enumerate(LAYERS.items())
        }
        self.held_out = {name: self._tokens(name, scored_on) for name in LAYERS}
        self.calibrations = OnDemand(lambda kind: self._calibrate(kind, workdir / f"synthetic-{kind}.safetensors"))

    def _tokens(self, name: str, part: str) -> Tensor:
        return torch.cat([self.inputs[name](prompt, time) for prompt in SETS[part] for time in TIMES])

    def _calibrate(self, kind: str, path: Path) -> Path:
        model = nn.Module()
        for name, (rows, columns) in LAYERS.items():
            parent = model
            *folders, last = name.split(".")
            for folder in folders:
                if not hasattr(parent, folder):
                    parent.add_module(folder, nn.Module())
                parent = parent.get_submodule(folder)
            parent.add_module(last, nn.Linear(columns, rows, bias=False))
        with collect(model, dense=kind == "dense", budget=None) as collector, torch.no_grad():
            for name in LAYERS:
                model.get_submodule(name)(self._tokens(name, "calibrate"))
        collector.calibration().save(path)
        return path

    def applies(self, method: str) -> bool:
        return method not in ("noise", "structure", "svd", "sketch-32")

    def measure(self, weights: dict[str, Tensor]) -> Measured:
        """What these weights cost."""
        measured = Measured()
        for name, inputs in self.held_out.items():
            weight = self.original[f"{name}.weight"].float()
            error = inputs @ (weights[f"{name}.weight"] - weight).T
            measured.layers[f"{name} {weight.shape[1]} columns"] = float(error.norm() / (inputs @ weight.T).norm())
        return measured


def _weight(name: str, shape: tuple[int, int]) -> Tensor:
    tiles = [tile.astype(np.float32) for tile in Weights(0).tiles(name, shape, "F32")]
    return torch.from_numpy(np.concatenate(tiles)).to(torch.bfloat16)
