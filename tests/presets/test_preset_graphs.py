"""What presets know of graphs, against key names of real checkpoints: which layers see only time, which feed which."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from streamquant.presets import load_presets
from streamquant.presets.graph import Embedding, Feed, Vector, is_layer, parse_feeds, parse_time
from streamquant.rounding.structure import feeds
from streamquant.rounding.time_sweep import sees_only_time

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

PRESETS = load_presets()
SAMPLES = tomllib.loads((Path(__file__).parent / "keys.toml").read_text(encoding="utf-8"))
LAYERS = {name: [key.removesuffix(".weight") for key in sample["keys"] if key.endswith(".weight")] for name, sample in SAMPLES.items()}
WITH_TIME = [name for name, sample in SAMPLES.items() if PRESETS[sample["preset"]].time]
WITH_FEEDS = [name for name, sample in SAMPLES.items() if PRESETS[sample["preset"]].feeds]

# The embedding of time or guidance, and modulations, by the names the architectures have for them. (Of Flux.1 and
# HunyuanVideo 1.0 the modulations see pooled text too, which the sweep finds out from the checkpoint.)
SEES_TIME = re.compile(
    r"""(^|\.)(time_in|time_r_in|guidance_in|t_embedder|tmlp|tproj|time_embedding|time_projection|timestep_embedder)\.
    |(^|\.)(t_embedding\.|adaln_proj$) |mod(ulation)?(_img|_txt)?\.(lin|\d)$ |ada(ln|LN)_(modulation|single) |norm\w*\.linear(_1)?$""",
    re.VERBOSE,
)
# A refiner whose vector holds the text, gates with a multiplier of their own, a decoder shown what the blocks made.
SEES_MORE = re.compile(r"token_refiner|_gate_adaln_single|^dec_net\.")


@pytest.mark.parametrize("sample", WITH_TIME)
def test_exactly_the_modulations_and_the_embedding_see_only_time(sample):
    graph = PRESETS[SAMPLES[sample]["preset"]].time
    seen = {layer for layer in LAYERS[sample] if sees_only_time(graph, layer)}
    assert seen == {layer for layer in LAYERS[sample] if SEES_TIME.search(layer) and not SEES_MORE.search(layer)}
    assert seen


def test_flux2_is_calibrated_in_these_layers():
    assert {layer for layer in LAYERS["flux2"] if sees_only_time(PRESETS["flux2"].time, layer)} == {
        "time_in.in_layer", "time_in.out_layer", "guidance_in.in_layer", "guidance_in.out_layer", "final_layer.adaLN_modulation.1",
        "double_stream_modulation_img.lin", "double_stream_modulation_txt.lin", "single_stream_modulation.lin",
    }  # fmt: skip


@pytest.mark.parametrize("sample", WITH_FEEDS)
def test_feeds_lead_from_one_layer_of_a_block_to_another(sample):
    graph = PRESETS[SAMPLES[sample]["preset"]].feeds
    pairs = {layer: feeds(graph, layer) for layer in LAYERS[sample] if feeds(graph, layer)}
    assert pairs or sample in ("zimage_pixel", "ltxv2_gated")  # these samples hold no second layer
    for second, first in pairs.items():
        assert first != second and feeds(graph, first) is None
        assert first.split(".")[:2] == second.split(".")[:2]


@pytest.mark.parametrize("sample", ["flux2", "flux", "qwen_image", "wan", "hunyuan", "anima", "krea2"])
def test_first_layers_are_there(sample):
    graph = PRESETS[SAMPLES[sample]["preset"]].feeds
    assert all(feeds(graph, layer) in LAYERS[sample] for layer in LAYERS[sample] if feeds(graph, layer))


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.time])
def test_every_embedding_and_vector_has_a_use(name):
    graph = PRESETS[name].time
    terms = [term for vector in graph.vectors.values() for term in vector.terms]
    assert {term.embedding for term in terms} == set(graph.embeddings)
    used = {entry.vector for entry in graph.layers}
    for key, vector in graph.vectors.items():
        assert key in used or any(is_layer(step) for term in vector.terms for step in term.chain)
    assert all(term.chain and is_layer(term.chain[0]) for term in terms if term.optional)


GOOD = {"embeddings": {"time": {"dimension": 8, "factor": 1.0}}, "vectors": {"v": {"terms": [{"embedding": "time", "chain": ["a", "silu"]}], "unless": ["b"]}}}


def test_a_section_becomes_what_it_says():
    graph = parse_time(GOOD | {"layers": [{"layers": "^c$", "vector": "v", "chain": ["silu"]}]})
    assert graph.embeddings == {"time": Embedding(1.0, 8)}
    assert isinstance(graph.vectors["v"], Vector) and graph.vectors["v"].unless == ("b",)
    assert graph.vectors["v"].terms[0].chain == ("a", "silu") and graph.layers[0].chain == ("silu",)
    assert parse_time(None) is None
    assert parse_feeds([{"layers": "^a$", "first": "b", "activation": "silu", "gate_half": "first"}]) == (Feed("^a$", "b", "silu", gate_half="first"),)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"embeddings": {"time": {"dimension": 8, "factor": 1.0, "speed": 2}}}, TypeError),
        ({"embeddings": {"time": {"factor": 1.0}}}, ValueError),
        ({"embeddings": {"time": {"dimension": 8, "dimension_of": "a", "factor": 1.0}}}, ValueError),
        ({"embeddings": {"other": {"dimension": 8, "factor": 1.0}}}, ValueError),
        ({"layers": [{"layers": "^c$", "vector": "w"}]}, ValueError),
        ({"surplus": {}}, ValueError),
    ],
)
def test_a_faulty_time_section_is_refused(change, error):
    with pytest.raises(error):
        parse_time(GOOD | change)


@pytest.mark.parametrize(
    "change", [{"activation": "relu"}, {"gate_half": "third"}, {"gate": "c", "gate_half": "first"}]
)
def test_a_faulty_feed_is_refused(change):
    with pytest.raises(ValueError):
        parse_feeds([{"layers": "^a$", "first": "b", "activation": "silu"} | change])
