"""What an MLP's second layer is guessed to see, against the MLP itself run on the same inputs in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_weights import SmallWeights
from torch.nn.functional import gelu, linear, silu

from streamquant.calibration.sketch import probe
from streamquant.kernels.feedback import low_rank_feedback
from streamquant.kernels.jit import refine as compiled
from streamquant.presets import load_presets
from streamquant.rounding import LayerHessian, structure


def graph(preset: str):
    return load_presets()[preset].feeds


def inputs(columns: int, count: int = structure.INPUTS, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((count, columns)))


def tensor(weights: SmallWeights, name: str) -> torch.Tensor:
    return torch.from_numpy(weights[name]).double()


def layer(weights: SmallWeights, name: str, x: torch.Tensor) -> torch.Tensor:
    bias = tensor(weights, f"{name}.bias") if f"{name}.bias" in weights else None
    return linear(x, tensor(weights, f"{name}.weight"), bias)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return gelu(x, approximate="tanh")


def plain(name: str, first: str, activation):
    return lambda w, x: activation(layer(w, first, x)), {first: (48, 32), name: (32, 48)}, ()


def gated(name: str, gate: str, up: str, activation=silu, norm: str = ""):
    def run(w, x):
        x = x * tensor(w, norm) if norm else x
        return activation(layer(w, gate, x)) * layer(w, up, x)

    return run, {gate: (48, 32), up: (48, 32), name: (32, 48)}, (norm,) if norm else ()


def halves(name: str, first: str):
    """Flux.2's SiLUActivation."""

    def run(w, x):
        one, two = layer(w, first, x).chunk(2, dim=-1)
        return silu(one) * two

    return run, {first: (96, 32), name: (32, 48)}, ()


def single(form: str):
    """A single block: three parts of attention first; linear2 sees attention's 32 columns, then the MLP's 48."""

    def run(w, x):
        mlp = layer(w, "single_blocks.7.linear1", x)[:, 96:]
        if form == "gelu":
            return tanh_gelu(mlp)
        one, two = mlp.chunk(2, dim=-1)
        return silu(one) * two if form == "flux2" else silu(two) * one

    rows = 96 + (48 if form == "gelu" else 96)
    return run, {"single_blocks.7.linear1": (rows, 32), "single_blocks.7.linear2": (32, 80)}, ()


REFINER = "txt_in.individual_token_refiner.blocks.1"
CASES = {
    ("flux2", "double_blocks.3.img_mlp.2"): halves("double_blocks.3.img_mlp.2", "double_blocks.3.img_mlp.0"),
    ("flux2", "single_blocks.7.linear2"): single("flux2"),
    ("flux", "double_blocks.3.txt_mlp.2"): plain("double_blocks.3.txt_mlp.2", "double_blocks.3.txt_mlp.0", tanh_gelu),
    ("flux", "double_blocks.3.txt_mlp.down_proj"): gated(
        "double_blocks.3.txt_mlp.down_proj", "double_blocks.3.txt_mlp.gate_proj", "double_blocks.3.txt_mlp.up_proj"
    ),
    ("flux", "single_blocks.7.linear2"): single("gelu"),
    ("flux ovis", "single_blocks.7.linear2"): single("ovis"),
    ("chroma", "single_blocks.7.linear2"): single("gelu"),
    ("hunyuan", f"{REFINER}.mlp.2"): (
        lambda w, x: silu(layer(w, f"{REFINER}.mlp.0", x * tensor(w, f"{REFINER}.norm2.weight"))),
        {f"{REFINER}.mlp.0": (48, 32), f"{REFINER}.mlp.2": (32, 48)},
        (f"{REFINER}.norm2.weight",),
    ),
    ("qwen_image", "transformer_blocks.5.img_mlp.net.2"): plain(
        "transformer_blocks.5.img_mlp.net.2", "transformer_blocks.5.img_mlp.net.0.proj", tanh_gelu
    ),
    ("lens", "transformer_blocks.5.txt_mlp.w2"): gated(
        "transformer_blocks.5.txt_mlp.w2", "transformer_blocks.5.txt_mlp.w1", "transformer_blocks.5.txt_mlp.w3",
        norm="transformer_blocks.5.txt_norm2.weight",
    ),
    ("zimage", "layers.5.feed_forward.w2"): gated(
        "layers.5.feed_forward.w2", "layers.5.feed_forward.w1", "layers.5.feed_forward.w3", norm="layers.5.ffn_norm1.weight"
    ),
    ("boogu", "double_stream_layers.1.img_feed_forward.linear_2"): gated(
        "double_stream_layers.1.img_feed_forward.linear_2", "double_stream_layers.1.img_feed_forward.linear_1",
        "double_stream_layers.1.img_feed_forward.linear_3", norm="double_stream_layers.1.img_ffn_norm1.weight",
    ),
    ("krea2", "blocks.5.mlp.down"): gated("blocks.5.mlp.down", "blocks.5.mlp.gate", "blocks.5.mlp.up"),
    ("anima", "blocks.5.mlp.layer2"): plain("blocks.5.mlp.layer2", "blocks.5.mlp.layer1", tanh_gelu),
    ("ideogram4", "layers.5.feed_forward.w2"): gated(
        "layers.5.feed_forward.w2", "layers.5.feed_forward.w1", "layers.5.feed_forward.w3", norm="layers.5.ffn_norm1.weight"
    ),
    ("wan", "blocks.5.ffn.2"): plain("blocks.5.ffn.2", "blocks.5.ffn.0", tanh_gelu),
    ("ltxv2", "transformer_blocks.5.audio_ff.net.2"): plain(
        "transformer_blocks.5.audio_ff.net.2", "transformer_blocks.5.audio_ff.net.0.proj", tanh_gelu
    ),
    ("t5xxl", "encoder.block.5.layer.1.DenseReluDense.wo"): gated(
        "encoder.block.5.layer.1.DenseReluDense.wo", "encoder.block.5.layer.1.DenseReluDense.wi_0",
        "encoder.block.5.layer.1.DenseReluDense.wi_1", tanh_gelu, "encoder.block.5.layer.1.layer_norm.weight",
    ),
    ("mistral", "model.layers.5.mlp.down_proj"): gated(
        "model.layers.5.mlp.down_proj", "model.layers.5.mlp.gate_proj", "model.layers.5.mlp.up_proj",
        norm="model.layers.5.post_attention_layernorm.weight",
    ),
}  # fmt: skip


def build(shapes, norms, bias: bool, seed: int = 0) -> SmallWeights:
    rng, weights = np.random.default_rng(seed), SmallWeights()
    for name, shape in shapes.items():
        weights.linear(name, *shape, rng, bias)
    for name in norms:
        weights[name] = np.exp(rng.standard_normal(32)).astype(np.float32)
    return weights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("preset", "second"), CASES)
def test_it_is_what_the_mlp_itself_gives(preset, second, bias):
    run, shapes, norms = CASES[preset, second]
    weights = build(shapes, norms, bias)
    feeds = graph(preset.split()[0])
    found = structure.statistics(feeds, weights, second, rank=8)
    found.check(second)
    hidden = run(weights, inputs(32)).numpy()
    kept = shapes[second][1] - hidden.shape[1]
    assert kept == (32 if "single" in second else 0)
    exact = hidden.T @ hidden / len(hidden)
    largest = np.diagonal(exact).max()
    assert found.count == structure.INPUTS and found.columns == shapes[second][1]
    np.testing.assert_allclose(found.diagonal[kept:], np.diagonal(exact), rtol=1e-4)
    np.testing.assert_allclose(found.mean[kept:], hidden.mean(0), atol=1e-5 * np.sqrt(largest))
    np.testing.assert_allclose(found.sketch[kept:], exact @ probe(kept + 48, 16, 0)[kept:], atol=1e-4 * largest)
    # Attention's columns: the others' mean energy and no correlation.
    np.testing.assert_allclose(found.diagonal[:kept], np.diagonal(exact).mean(), rtol=1e-4)
    assert not found.mean[:kept].any() and not found.sketch[:kept].any()
    hessian = LayerHessian.of(found, rank=8)
    np.testing.assert_allclose(hessian.remainder[:kept], np.diagonal(exact).mean(), rtol=1e-4)
    np.testing.assert_allclose(hessian.vectors[:kept], 0, atol=1e-5 * np.sqrt(largest))
    assert structure.feeds(feeds, second) in shapes and structure.is_fed(feeds, weights, second)


@pytest.mark.parametrize("layer_name", ["double_blocks.3.img_mlp.0", "single_blocks.7.linear1", "double_blocks.3.img_attn.proj", "img_in"])
def test_other_layers_have_no_feed(layer_name):
    weights = build(CASES["flux2", "single_blocks.7.linear2"][1] | {layer_name: (8, 32)}, (), False)
    assert structure.feeds(graph("flux2"), layer_name) is None
    assert structure.statistics(graph("flux2"), weights, layer_name) is None
    assert not structure.is_fed(graph("flux2"), weights, layer_name)


@pytest.mark.parametrize("fault", ["first missing", "first quantized", "gate missing", "norm missing", "width", "nan"])
def test_what_does_not_fit_gives_nothing(fault):
    second = "layers.5.feed_forward.w2"
    _, shapes, norms = CASES["zimage", second]
    weights = build(shapes, norms, False)
    assert structure.statistics(graph("zimage"), weights, second) is not None
    if fault == "first missing":
        del weights["layers.5.feed_forward.w3.weight"]
    elif fault == "first quantized":
        weights.quantized = {"layers.5.feed_forward.w3.weight"}
    elif fault == "gate missing":
        del weights["layers.5.feed_forward.w1.weight"]
    elif fault == "norm missing":
        del weights["layers.5.ffn_norm1.weight"]
    elif fault == "width":
        weights[f"{second}.weight"] = weights[f"{second}.weight"][:, :-1]
    else:
        weights["layers.5.feed_forward.w1.weight"][4, 5] = np.nan
    assert structure.statistics(graph("zimage"), weights, second) is None
    assert structure.is_fed(graph("zimage"), weights, second) == (fault == "nan")  # names and shapes say nothing of it


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 80), st.integers(0, 5))
def test_any_sizes(features, width, rank, seed):
    rng, weights = np.random.default_rng(seed), SmallWeights()
    weights.linear("blocks.0.ffn.0", width, features, rng)
    weights.linear("blocks.0.ffn.2", features, width, rng)
    found = structure.statistics(graph("wan"), weights, "blocks.0.ffn.2", rank=rank)
    hidden = tanh_gelu(layer(weights, "blocks.0.ffn.0", inputs(features))).numpy()
    np.testing.assert_allclose(found.diagonal, np.square(hidden).mean(0), rtol=1e-3, atol=1e-9)
    assert found.sketch.shape == (width, min(rank + 8, width))
    hessian = LayerHessian.of(found, rank=rank).shrunk(structure.SHRINKAGE)
    np.testing.assert_allclose(hessian.diagonal.sum(), np.square(hidden).mean(0).sum(), rtol=1e-3, atol=1e-9)


def test_it_pays_when_inputs_are_as_assumed():
    second = "double_blocks.3.txt_mlp.2"
    rng, weights = np.random.default_rng(1), SmallWeights()
    weights.linear("double_blocks.3.txt_mlp.0", 256, 64, rng, bias=True)
    weights.linear(second, 96, 256, rng)
    x = tanh_gelu(layer(weights, "double_blocks.3.txt_mlp.0", inputs(64, 2000, seed=9))).numpy()
    weight = weights[f"{second}.weight"]
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    hessian = LayerHessian.of(structure.statistics(graph("flux"), weights, second)).shrunk(structure.SHRINKAGE)

    def output_error(feedback) -> float:
        codes = compiled.refine(weight, scale, np.zeros(256, np.int64), feedback, "int8", guard=False).codes
        return float(np.linalg.norm(x @ (codes * scale.astype(np.float64) - weight).T))

    nearest = output_error(low_rank_feedback(np.ones(256), np.zeros((256, 0))))
    assert output_error(hessian.feedback()) < 0.75 * nearest
