"""The small Flux.2 against the architecture's formulas, written out token by token."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import streamquant
from benchmarks.machine import REPOSITORY
from benchmarks.tiny_flux import HEAD_WIDTH, FluxSize, TinyFlux2, _rotated, rotations
from benchmarks.train_tiny import WEIGHTS
from streamquant import FormatChoice, Recipe

COMFYUI = os.environ.get("COMFYUI_PATH")


def random_model(size: FluxSize, seed: int = 0) -> TinyFlux2:
    generator = torch.Generator().manual_seed(seed)
    model = TinyFlux2(size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 1 + 0.2 * noise)
    return model


def by_hand(weights: dict[str, np.ndarray], x: np.ndarray, t: float, context: np.ndarray) -> np.ndarray:
    """Velocity [128, height, width] of one latent, in float64, a token and a pair of channels at a time."""
    silu = lambda v: v / (1 + np.exp(-v))
    norm = lambda v: (v - v.mean()) / np.sqrt(v.var() + 1e-6)
    rms = lambda v, scale: v / np.sqrt((v * v).mean() + np.finfo(np.float32).eps) * scale
    hidden = weights["img_in.weight"].shape[0]
    _, height, width = x.shape
    places = [(0, 0, 0, i) for i in range(len(context))] + [(0, i, j, 0) for i in range(height) for j in range(width)]

    def turn(v, place):
        v = v.copy()
        for axis in range(4):
            for pair in range(16):
                at = 32 * axis + 2 * pair
                angle = place[axis] * 2000.0 ** (-2 * pair / 32)
                a, b = v[at], v[at + 1]
                v[at], v[at + 1] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
        return v

    def attend(qkvs, names):
        """Of rows [3 · hidden]; names: the prefix of each row's norms."""
        out = np.zeros((len(qkvs), hidden))
        for head in range(hidden // HEAD_WIDTH):
            part = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
            q, k, v = ([row.reshape(3, hidden)[i][part] for row in qkvs] for i in range(3))
            q, k = (
                [turn(rms(row, weights[f"{n}.{kind}_norm.scale"]), p) for row, n, p in zip(rows, names, places, strict=True)]
                for rows, kind in ((q, "query"), (k, "key"))
            )
            for i in range(len(qkvs)):
                scores = np.array([q[i] @ other for other in k]) / math.sqrt(HEAD_WIDTH)
                scores = np.exp(scores - scores.max())
                out[i, part] = sum(s * row for s, row in zip(scores / scores.sum(), v, strict=True))
        return out

    def swiglu(v):
        return silu(v[: len(v) // 2]) * v[len(v) // 2 :]

    frequencies = np.exp(-math.log(10000) * np.arange(128) / 128)
    angles = 1000 * t * frequencies
    time = np.concatenate((np.cos(angles), np.sin(angles)))
    time = weights["time_in.out_layer.weight"] @ silu(weights["time_in.in_layer.weight"] @ time)
    lin = lambda name: (weights[f"{name}.lin.weight"] @ silu(time)).reshape(-1, hidden)
    streams = {
        "txt": [weights["txt_in.weight"] @ token for token in context],
        "img": [weights["img_in.weight"] @ x[:, i, j] for i in range(height) for j in range(width)],
    }
    for block in range(len({name.split(".")[1] for name in weights if name.startswith("double_blocks.")})):
        prefix = {stream: f"double_blocks.{block}.{stream}" for stream in streams}
        mods = {stream: lin(f"double_stream_modulation_{stream}") for stream in streams}
        qkvs, names = [], []
        for stream, tokens in streams.items():
            shift, scale = mods[stream][:2]
            qkvs += [weights[f"{prefix[stream]}_attn.qkv.weight"] @ (norm(v) * (1 + scale) + shift) for v in tokens]
            names += [f"{prefix[stream]}_attn.norm"] * len(tokens)
        mixed = iter(attend(qkvs, names))
        for stream, tokens in streams.items():
            _, _, gate, shift, scale, gate2 = mods[stream]
            for i in range(len(tokens)):
                tokens[i] = tokens[i] + gate * (weights[f"{prefix[stream]}_attn.proj.weight"] @ next(mixed))
                inner = swiglu(weights[f"{prefix[stream]}_mlp.0.weight"] @ (norm(tokens[i]) * (1 + scale) + shift))
                tokens[i] = tokens[i] + gate2 * (weights[f"{prefix[stream]}_mlp.2.weight"] @ inner)
    tokens = streams["txt"] + streams["img"]
    shift, scale, gate = lin("single_stream_modulation")
    for block in range(len({name.split(".")[1] for name in weights if name.startswith("single_blocks.")})):
        prefix = f"single_blocks.{block}"
        first = [weights[f"{prefix}.linear1.weight"] @ (norm(v) * (1 + scale) + shift) for v in tokens]
        mixed = attend([row[: 3 * hidden] for row in first], [f"{prefix}.norm"] * len(tokens))
        tokens = [
            v + gate * (weights[f"{prefix}.linear2.weight"] @ np.concatenate((m, swiglu(row[3 * hidden :]))))
            for v, m, row in zip(tokens, mixed, first, strict=True)
        ]
    shift, scale = (weights["final_layer.adaLN_modulation.1.weight"] @ silu(time)).reshape(2, hidden)
    image = [weights["final_layer.linear.weight"] @ (norm(v) * (1 + scale) + shift) for v in tokens[len(context) :]]
    return np.array(image).T.reshape(128, height, width)


@pytest.mark.parametrize(("size", "t"), [(FluxSize(128, 32, 1, 1), 0.9), (FluxSize(256, 16, 2, 1), 0.03)])
def test_the_velocity_is_the_formula_s(size: FluxSize, t: float) -> None:
    model = random_model(size)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 128, 2, 3, generator=generator), torch.randn(2, 2, size.context, generator=generator)
    with torch.no_grad():
        velocity = model(x, torch.full((2,), t), context)
    weights = {name: weight.double().numpy() for name, weight in model.state_dict().items()}
    for own, latent, tokens in zip(velocity, x, context, strict=True):
        expected = by_hand(weights, latent.double().numpy(), t, tokens.double().numpy())
        assert np.abs(own.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_rotary_positions_see_only_differences(height: int, width: int, seed: int) -> None:
    rotation = rotations(0, height + 1, width + 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, HEAD_WIDTH, generator=generator)
    at = lambda row, column: row * (width + 1) + column
    score = lambda a, b: float(_rotated(query[None], rotation[[a]])[0] @ _rotated(key[None], rotation[[b]])[0])
    assert score(at(0, 0), at(height - 1, width - 1)) == pytest.approx(score(at(1, 1), at(height, width)), abs=1e-3)


def test_a_hidden_size_that_is_no_number_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of the head width"):
        FluxSize(192)
    with pytest.raises(ValueError, match="txt_in"):
        TinyFlux2.of({"img_in.weight": torch.zeros(128, 128)})


def test_the_size_comes_back_from_the_weights() -> None:
    model = random_model(FluxSize(256, 48, 1, 3))
    again = TinyFlux2.of({name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()})
    assert again.size == FluxSize(256, 48, 1, 3)
    assert torch.equal(again.single_blocks[2].linear1.weight, model.single_blocks[2].linear1.weight.bfloat16().float())


def test_the_repository_s_weights_are_a_flux2_of_at_most_10_mb() -> None:
    assert WEIGHTS.stat().st_size <= 10_000_000
    plan = streamquant.plan(WEIGHTS, Recipe(base=FormatChoice("fp8")))
    assert "Flux.2" in plan.architecture
    quantized = [unit.layer for unit in plan.units if unit.quantized]
    double = [f"{stream}_{part}" for stream in ("img", "txt") for part in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    assert sorted(quantized) == sorted(
        [f"double_blocks.{block}.{part}" for block in range(2) for part in double]
        + [f"single_blocks.{block}.{part}" for block in range(4) for part in ("linear1", "linear2")]
    )


@pytest.mark.skipif(COMFYUI is None, reason="COMFYUI_PATH names no ComfyUI checkout")
def test_comfyui_loads_it_as_flux2_and_computes_the_same(tmp_path: Path) -> None:
    random = tmp_path / "random.safetensors"
    save_file({name: weight.bfloat16() for name, weight in random_model(FluxSize()).state_dict().items()}, random)
    program = """
import sys
path, tests = sys.argv[1:]
sys.path.insert(0, tests)
import comfy_environment
comfy_environment.start()
import comfy.model_management, comfy.sd, comfy.utils, torch
from benchmarks.tiny_flux import TinyFlux2
with torch.inference_mode():
    state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    patcher = comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata)
    comfy.model_management.load_models_gpu([patcher])
    assert type(patcher.model).__name__ == "Flux2", type(patcher.model)
    x, t, context = torch.randn(2, 128, 6, 6), torch.tensor([0.9, 0.1]), torch.randn(2, 5, 64)
    theirs = patcher.model.diffusion_model(x.clone(), t, context.clone())
    error = (TinyFlux2.load(path)(x, t, context) - theirs).abs().max() / theirs.abs().max()
    assert error <= 1e-5, float(error)
"""
    for path in (random, WEIGHTS):
        command = [sys.executable, "-c", program, str(path), str(Path(__file__).parent.parent / "comfyui")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
        assert done.returncode == 0, done.stderr
