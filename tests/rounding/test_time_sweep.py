"""The sweep of t against the same small graphs written in torch and evaluated densely."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_weights import SmallWeights
from torch.nn.functional import gelu, rms_norm, silu

from streamquant.kernels.feedback import low_rank_feedback
from streamquant.kernels.jit import refine as compiled
from streamquant.presets import load_presets
from streamquant.presets.graph import Embedding, Term, TimeGraph, TimeLayers, Vector
from streamquant.rounding import LayerHessian
from streamquant.rounding.time_sweep import SHRINKAGE, TimeSweep, sees_only_time, sweep_times

GUIDANCE = torch.tensor([1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 8, 10], dtype=torch.float64)


def graph(preset: str) -> TimeGraph:
    return load_presets()[preset].time


def sinusoid(t: torch.Tensor, dimension: int, factor: float) -> torch.Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(dimension // 2, dtype=torch.float64) / (dimension // 2))
    angles = (factor * t)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def apply(weights: SmallWeights, name: str, x: torch.Tensor) -> torch.Tensor:
    bias = weights.get(f"{name}.bias")
    bias = None if bias is None else torch.from_numpy(bias).double()
    return torch.nn.functional.linear(x, torch.from_numpy(weights[f"{name}.weight"]).double(), bias)


def mlp(weights: SmallWeights, first: str, second: str, x: torch.Tensor, activation=silu) -> torch.Tensor:
    return apply(weights, second, activation(apply(weights, first, x)))


def flux2(width: int = 48, bias: bool = False, guidance: bool = True, seed: int = 0) -> SmallWeights:
    rng, weights = np.random.default_rng(seed), SmallWeights()
    for name in ("time_in", "guidance_in") if guidance else ("time_in",):
        weights.linear(f"{name}.in_layer", 40, 256, rng, bias)
        weights.linear(f"{name}.out_layer", width, 40, rng, bias)
    for name in ("double_stream_modulation_img.lin", "single_stream_modulation.lin", "final_layer.adaLN_modulation.1"):
        weights.linear(name, 6, width, rng)
    return weights


def flux2_vector(weights: SmallWeights, t: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    """Every t with every guidance scale: [t · guidance, width]."""
    of_time = mlp(weights, "time_in.in_layer", "time_in.out_layer", sinusoid(t, 256, 1000.0))
    if "guidance_in.in_layer.weight" not in weights:
        return of_time
    of_guidance = mlp(weights, "guidance_in.in_layer", "guidance_in.out_layer", sinusoid(guidance, 256, 1000.0))
    return (of_time[:, None] + of_guidance[None]).flatten(0, 1)


def moments(x: torch.Tensor) -> np.ndarray:
    return (x.T @ x / len(x)).numpy()


def check(found, x: torch.Tensor) -> None:
    """The statistics are those of the inputs x [n, N], whose order does not matter."""
    exact = moments(x)
    assert found.count == len(x)
    np.testing.assert_allclose(found.hessian, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    np.testing.assert_allclose(found.diagonal, np.diagonal(exact), rtol=1e-4, atol=1e-6 * np.abs(exact).max())
    np.testing.assert_allclose(found.mean, x.mean(0).numpy(), atol=1e-5 * np.sqrt(np.abs(exact).max()))


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_flux2(bias, guidance):
    weights = flux2(bias=bias, guidance=guidance)
    sweep, t = TimeSweep(graph("flux2"), weights), torch.from_numpy(sweep_times())
    vector = flux2_vector(weights, t, GUIDANCE)
    for layer in ("double_stream_modulation_img.lin", "single_stream_modulation.lin", "final_layer.adaLN_modulation.1"):
        check(sweep.statistics(layer), silu(vector))
    check(sweep.statistics("time_in.in_layer"), sinusoid(t, 256, 1000.0))
    check(sweep.statistics("time_in.out_layer"), silu(apply(weights, "time_in.in_layer", sinusoid(t, 256, 1000.0))))
    if guidance:
        check(sweep.statistics("guidance_in.in_layer"), sinusoid(GUIDANCE, 256, 1000.0))


def test_the_spread_stands_for_all_of_t():
    weights = flux2(guidance=False)
    found = TimeSweep(graph("flux2"), weights).statistics("single_stream_modulation.lin")
    dense = moments(silu(flux2_vector(weights, torch.linspace(0, 1, 20_001, dtype=torch.float64), GUIDANCE)))
    assert np.linalg.norm(found.hessian - dense) < 0.02 * np.linalg.norm(dense)
    t = sweep_times()
    assert t[0] == 0 and t[-1] == 1 and (np.diff(t) > 0).all() and np.allclose(np.diff(t)[1:-1], 1 / 512)


def test_fast_sines_do_not_alias():
    # On a grid of half as many points, frequencies whose sum is 2π · 256 / 1000 would seem one: an error of 0.5.
    found = TimeSweep(graph("flux2"), flux2(guidance=False)).statistics("time_in.in_layer").hessian
    exact = moments(sinusoid(torch.linspace(0, 1, 20_001, dtype=torch.float64), 256, 1000.0))
    assert np.abs(found - exact).max() < 0.01


def small(names: dict[str, tuple[int, int]], bias: bool = True, seed: int = 1) -> SmallWeights:
    rng, weights = np.random.default_rng(seed), SmallWeights()
    for name, shape in names.items():
        weights.linear(name, *shape, rng, bias)
    return weights


def test_z_image_and_lumina():
    t = torch.from_numpy(sweep_times())
    embedder = {"t_embedder.mlp.0": (32, 256), "t_embedder.mlp.2": (24, 32)}
    ends = {"layers.3.adaLN_modulation.0": (8, 24), "layers.3.adaLN_modulation.1": (8, 24), "final_layer.adaLN_modulation.1": (4, 24)}
    weights = small(embedder | ends)
    for preset, factor in (("zimage", 1000.0), ("lumina", 1.0)):
        vector = mlp(weights, "t_embedder.mlp.0", "t_embedder.mlp.2", sinusoid(t, 256, factor))
        sweep = TimeSweep(graph(preset), weights)
        check(sweep.statistics("final_layer.adaLN_modulation.1"), silu(vector))
        if preset == "zimage":
            check(sweep.statistics("layers.3.adaLN_modulation.0"), vector)
        else:
            check(sweep.statistics("layers.3.adaLN_modulation.1"), silu(vector))


@pytest.mark.parametrize(
    ("preset", "first", "second", "last", "activation"),
    [
        ("qwen_image", "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2", "transformer_blocks.9.txt_mod.1", silu),
        ("lens", "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2", "norm_out.linear", silu),
        ("wan", "time_embedding.0", "time_embedding.2", "time_projection.1", silu),
        ("krea2", "tmlp.0", "tmlp.2", "tproj.1", lambda x: gelu(x, approximate="tanh")),
        ("boogu", "time_caption_embed.timestep_embedder.linear_1", "time_caption_embed.timestep_embedder.linear_2", "layers.2.img_norm3.linear", silu),
        ("ltxv2", "audio_adaln_single.emb.timestep_embedder.linear_1", "audio_adaln_single.emb.timestep_embedder.linear_2", "audio_adaln_single.linear", silu),
        ("flux", "time_in.in_layer", "time_in.out_layer", "single_blocks.4.modulation.lin", silu),
        ("hunyuan", "time_in.in_layer", "time_in.out_layer", "double_blocks.4.img_mod.lin", silu),
    ],
)  # fmt: skip
def test_two_layers_and_a_modulation(preset, first, second, last, activation):
    weights = small({first: (32, 256), second: (24, 32), last: (8, 24)})
    t = torch.from_numpy(sweep_times())
    inner = activation(apply(weights, first, sinusoid(t, 256, 1000.0)))
    sweep = TimeSweep(graph(preset), weights)
    check(sweep.statistics(first), sinusoid(t, 256, 1000.0))
    check(sweep.statistics(second), inner)
    check(sweep.statistics(last), activation(apply(weights, second, inner)))


def test_anima():
    layer = "blocks.5.adaln_modulation_mlp"
    weights = small({"t_embedder.1.linear_1": (32, 64), "t_embedder.1.linear_2": (96, 32), f"{layer}.1": (16, 64), f"{layer}.2": (9, 16)}, bias=False)
    weights["t_embedding_norm.weight"] = np.random.default_rng(2).standard_normal(64).astype(np.float32)
    t = torch.from_numpy(sweep_times())
    vector = rms_norm(sinusoid(t, 64, 1.0), (64,), torch.from_numpy(weights["t_embedding_norm.weight"]).double(), 1e-6)
    sweep = TimeSweep(graph("anima"), weights)
    check(sweep.statistics(f"{layer}.1"), silu(vector))
    check(sweep.statistics(f"{layer}.2"), apply(weights, f"{layer}.1", silu(vector)))
    check(sweep.statistics("t_embedder.1.linear_1"), sinusoid(t, 64, 1.0))


def test_ideogram():
    names = {"t_embedding.mlp_in": (64, 64), "t_embedding.mlp_out": (64, 64), "adaln_proj": (24, 64)}
    weights = small(names | {"layers.7.adaln_modulation": (8, 24), "final_layer.adaln_modulation": (8, 24)})
    t = torch.from_numpy(sweep_times())
    angles = 1e4 * t[:, None] * torch.exp(-math.log(1e4) / 31 * torch.arange(32, dtype=torch.float64))
    embedded = mlp(weights, "t_embedding.mlp_in", "t_embedding.mlp_out", torch.cat([angles.sin(), angles.cos()], dim=-1))
    vector = silu(apply(weights, "adaln_proj", embedded))
    sweep = TimeSweep(graph("ideogram4"), weights)
    check(sweep.statistics("layers.7.adaln_modulation"), vector)
    check(sweep.statistics("final_layer.adaln_modulation"), silu(vector))
    check(sweep.statistics("adaln_proj"), embedded)


def test_a_wide_layer_keeps_a_sketch_as_good_as_the_whole():
    weights = flux2(width=1100)
    found = TimeSweep(graph("flux2"), weights).statistics("single_stream_modulation.lin")
    assert found.hessian is None and found.columns == 1100
    found.check("single_stream_modulation.lin")
    x = silu(flux2_vector(weights, torch.from_numpy(sweep_times()), GUIDANCE))
    exact = moments(x)
    np.testing.assert_allclose(found.diagonal, np.diagonal(exact), rtol=1e-4)
    _, vectors = found.low_rank(64)
    left, best = np.linalg.norm(exact - vectors @ vectors.T), np.linalg.norm(np.linalg.eigvalsh(exact)[:-64])
    assert left < 2 * best < 0.01 * np.linalg.norm(exact)


def test_layers_that_see_the_same_share_the_work():
    sweep = TimeSweep(graph("flux2"), flux2())
    layers = ["double_stream_modulation_img.lin", "single_stream_modulation.lin", "final_layer.adaLN_modulation.1"] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(sweep.statistics, layers))
    assert all(one is found[0] for one in found) and found[0] is not None


@pytest.mark.parametrize("layer", ["double_blocks.0.img_attn.qkv", "single_blocks.3.linear2", "final_layer.linear", "img_in", "vector_in.in_layer"])
def test_other_layers_are_not_touched(layer):
    weights = flux2()
    weights.linear(layer, 4, 48, np.random.default_rng(0))
    assert not sees_only_time(graph("flux2"), layer)
    assert TimeSweep(graph("flux2"), weights).statistics(layer) is None


def test_a_vector_that_holds_text_is_no_function_of_time():
    weights = flux2()
    weights.linear("vector_in.in_layer", 4, 5, np.random.default_rng(0))
    for quantized in ((), ("vector_in.in_layer.weight",)):
        weights.quantized = set(quantized)
        sweep = TimeSweep(graph("flux2"), weights)
        assert sees_only_time(graph("flux2"), "single_stream_modulation.lin")
        assert not sweep.sees_only_time("single_stream_modulation.lin")
        assert sweep.statistics("single_stream_modulation.lin") is None
        assert sweep.statistics("time_in.out_layer") is not None


@pytest.mark.parametrize("fault", ["missing", "quantized", "optional quantized", "narrow", "nan", "own width"])
def test_what_does_not_fit_gives_nothing(fault):
    weights = flux2()
    layer = "single_stream_modulation.lin"
    if fault == "missing":
        del weights["time_in.out_layer.weight"]
    elif fault == "quantized":
        weights.quantized = {"time_in.in_layer.weight"}
    elif fault == "optional quantized":
        weights.quantized = {"guidance_in.out_layer.weight"}
    elif fault == "narrow":
        weights["time_in.out_layer.weight"] = weights["time_in.out_layer.weight"][:, :-1]
    elif fault == "nan":
        weights["time_in.out_layer.weight"][3, 4] = np.nan
    else:
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"][:, :-1]
    assert TimeSweep(graph("flux2"), weights).statistics(layer) is None


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(["time", "slow", "guidance", "other"]), min_size=1, max_size=4),
    st.lists(st.sampled_from(["silu", "gelu_tanh"]), max_size=2),
    st.integers(1, 40),
    st.booleans(),
)
def test_sums_of_terms_go_over_every_combination(terms, chain, width, bias):
    # Terms of the same numbers go together; others are independent of them.
    embeddings = {
        "time": Embedding(100.0, 8), "slow": Embedding(1.0, 6, maximum_period=50.0), "guidance": Embedding(2.0, 4, values=(1.0, 2.0, 5.0)),
        "other": Embedding(1.0, 10, sine_first=True, values=(0.5, 3.0)),
    }  # fmt: skip
    rng, weights = np.random.default_rng(3), SmallWeights()
    for index, name in enumerate(terms):
        weights.linear(f"first{index}", width, embeddings[name].dimension, rng, bias)
    weights.linear("last", 2, width, rng)
    vector = Vector(tuple(Term(name, (f"first{index}", "silu")) for index, name in enumerate(terms)))
    small_graph = TimeGraph(embeddings, {"v": vector}, (TimeLayers("^last$", "v", tuple(chain)),))

    t = torch.from_numpy(sweep_times())
    axes = {name: torch.tensor(embeddings[name].values, dtype=torch.float64) if embeddings[name].values else t for name in embeddings}
    total = torch.zeros(len(t) if {"time", "slow"} & set(terms) else 1, 3 if "guidance" in terms else 1, 2 if "other" in terms else 1, width, dtype=torch.float64)
    for index, name in enumerate(terms):
        fields = embeddings[name]
        half = fields.dimension // 2
        angles = axes[name][:, None] * fields.factor * fields.maximum_period ** (-torch.arange(half, dtype=torch.float64) / half)
        parts = [angles.sin(), angles.cos()] if fields.sine_first else [angles.cos(), angles.sin()]
        term = silu(apply(weights, f"first{index}", torch.cat(parts, dim=-1)))
        total = total + {"guidance": term[None, :, None], "other": term[None, None]}.get(name, term[:, None, None])
    x = total.flatten(0, 2)
    for step in chain:
        x = silu(x) if step == "silu" else gelu(x, approximate="tanh")
    check(TimeSweep(small_graph, weights).statistics("last"), x)


def test_it_pays_at_times_and_scales_between():
    # A vector as smooth as a trained one's: slow sines speak louder. 28 steps of a shifted schedule, guidance 4.2.
    rng, weights = np.random.default_rng(4), flux2(width=256)
    loud = np.tile((10000 ** (np.arange(128) / 128)) ** 0.5, 2).astype(np.float32)
    for name in ("time_in", "guidance_in"):
        weights[f"{name}.in_layer.weight"] *= loud / np.sqrt(np.mean(loud**2))
    weights.linear("single_stream_modulation.lin", 96, 256, rng)
    weight = weights["single_stream_modulation.lin.weight"]
    steps = torch.linspace(1, 0.03, 28, dtype=torch.float64)
    x = silu(flux2_vector(weights, 3 * steps / (1 + 2 * steps), torch.tensor([4.2], dtype=torch.float64))).numpy()
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    statistics = TimeSweep(graph("flux2"), weights).statistics("single_stream_modulation.lin")
    hessian = LayerHessian.of(statistics).shrunk(SHRINKAGE)

    def output_error(feedback) -> float:
        codes = compiled.refine(weight, scale, np.zeros(256, np.int64), feedback, "int8", guard=False).codes
        return float(np.linalg.norm(x @ (codes * scale.astype(np.float64) - weight).T))

    nearest = output_error(low_rank_feedback(np.ones(256), np.zeros((256, 0))))
    assert output_error(hessian.feedback()) < 0.2 * nearest
