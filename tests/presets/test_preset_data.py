"""The preset data files against key names of real checkpoints. Reads the files themselves, not the code that loads them."""

import fnmatch
import re
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "streamquant" / "presets"
PREFIX = "model.diffusion_model."
BUILT_IN = ("_everywhere", "_generic")

FLAGS = """flux2 t5xxl wan hunyuan qwen zimage zimage-refiner distillation-large distillation-small nerf-large nerf-small
radiance mistral visual anima lens krea2 boogu ideogram4 ltxv2 gemma4 qwen35 generic-text
flux chroma qwen-image lumina""".split()


def load(path):
    with open(path, "rb") as f:
        return tomllib.load(f)


PRESETS = {p.stem: load(p) for p in sorted(FOLDER.glob("*.toml"))}
SAMPLES = load(HERE / "keys.toml")
NAMED = {n: p for n, p in PRESETS.items() if n not in BUILT_IN}
RECOGNISED = sorted((n for n, p in NAMED.items() if "recognise" in p), key=lambda n: NAMED[n]["order"])


def strip(key):
    return key[len(PREFIX):] if key.startswith(PREFIX) else key


def layer(key):
    return key[: -len(".weight")] if key.endswith(".weight") else key


def matches(rule, keys):
    found = lambda glob: any(fnmatch.fnmatchcase(k, glob) for k in keys)
    return all(found(g) for g in rule["all"]) and not any(found(g) for g in rule.get("none", ()))


def recognise(keys):
    return next((n for n in RECOGNISED if matches(NAMED[n]["recognise"], keys)), "")


def is_kept(preset, name):
    return any(re.search(r, name) for p in (preset, "_everywhere") for r in PRESETS[p]["keep"])


def expected(sample):
    s = SAMPLES[sample]
    return s.get("recognised_as", s["preset"])


# -- the files themselves

@pytest.mark.parametrize("name", PRESETS)
def test_every_file_follows_the_schema(name):
    preset = PRESETS[name]
    assert all(isinstance(r, str) and r for r in preset["keep"])
    if name == "_everywhere":
        assert set(preset) == {"keep"}
        return
    assert set(preset) <= {"title", "flags", "order", "keep", "remove", "recognise", "time", "feeds"}
    assert preset["title"] and isinstance(preset["order"], int)
    if "recognise" in preset:
        assert set(preset["recognise"]) == {"all", "none"}
        assert preset["recognise"]["all"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_regex_compiles(name):
    for regex in PRESETS[name]["keep"] + PRESETS[name].get("remove", []):
        re.compile(regex)


def test_every_flag_selects_exactly_one_preset():
    flags = [f for p in NAMED.values() for f in p["flags"]]
    assert len(flags) == len(set(flags))
    assert set(FLAGS) <= set(flags)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", f) for f in flags)
    assert all(p["flags"] for p in NAMED.values())


def test_aliases():
    assert {"qwen", "qwen-image"} <= set(PRESETS["qwen_image"]["flags"])
    assert {"chroma", "distillation-large"} <= set(PRESETS["chroma"]["flags"])


def test_no_two_presets_share_an_order():
    orders = [p["order"] for n, p in PRESETS.items() if n != "_everywhere"]
    assert len(orders) == len(set(orders))
    assert max(orders) == PRESETS["_generic"]["order"]


def test_every_preset_has_a_sample():
    assert {s["preset"] for s in SAMPLES.values()} == set(PRESETS) - {"_everywhere"}


def test_nothing_repeats_what_holds_everywhere():
    common = set(PRESETS["_everywhere"]["keep"])
    for name, preset in NAMED.items():
        assert not common & set(preset["keep"]), name
        assert len(preset["keep"]) == len(set(preset["keep"])), name


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("layer_name", [
    "blocks.3.attn.heads", "overhead", "blocks.3.overhead", "blast", "blocks.3.firstly", "lastly", "my_final_layers", "img_into",
    "enormous", "abnormal.weights", "biased", "unshared", "blocks.3.attn.qkv", "single_blocks.3.linear1", "blocks.10.mlp.fc1",
])
def test_regexes_are_bound_to_whole_segments(name, layer_name):
    assert not is_kept(name, layer_name)


# -- samples

@pytest.mark.parametrize("sample", SAMPLES)
def test_sample_is_consistent(sample):
    s = SAMPLES[sample]
    names = [layer(k) for k in s["keys"]]
    assert 15 <= len(names) <= 60
    assert len(names) == len(set(names))
    assert set(s["kept"]) <= set(names)
    assert set(s["quantizable"]) <= set(names)
    assert not set(s["kept"]) & set(s["quantizable"])


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("sample", SAMPLES)
def test_sample_is_recognised(sample, prefix):
    keys = [strip(prefix + k) for k in SAMPLES[sample]["keys"]]
    assert recognise(keys) == expected(sample)


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_earlier_preset_recognises_the_sample(sample):
    hits = [n for n in RECOGNISED if matches(NAMED[n]["recognise"], SAMPLES[sample]["keys"])]
    want = expected(sample)
    limit = PRESETS[want]["order"] if want else float("inf")
    assert not [n for n in hits if NAMED[n]["order"] < limit]
    assert (want in hits) if want else not hits


@pytest.mark.parametrize("sample", SAMPLES)
def test_kept_layers_are_kept(sample):
    s = SAMPLES[sample]
    assert not [n for n in s["kept"] if not is_kept(s["preset"], n)]


@pytest.mark.parametrize("sample", SAMPLES)
def test_quantizable_layers_are_not_kept(sample):
    s = SAMPLES[sample]
    assert not [n for n in s["quantizable"] if is_kept(s["preset"], n)]


@pytest.mark.parametrize("sample", SAMPLES)
def test_nothing_of_a_sample_is_removed(sample):
    s = SAMPLES[sample]
    assert not [k for k in s["keys"] for r in PRESETS[s["preset"]].get("remove", ()) if re.search(r, k)]


def test_flux2_keeps_exactly_its_own_layers():
    s = SAMPLES["flux2"]
    own = {n for n in map(layer, s["keys"]) if any(re.search(r, n) for r in PRESETS["flux2"]["keep"])}
    assert {n.split(".")[0] for n in own} == {
        "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",
        "guidance_in", "time_in", "final_layer", "img_in", "txt_in",
    }
    assert len(PRESETS["flux2"]["keep"]) == 6


@pytest.mark.parametrize("sample", ["anima", "cosmos_predict2"])
def test_the_prefix_net_may_stay(sample):
    s = SAMPLES[sample]
    assert recognise(["net." + k for k in s["keys"]]) == "anima"
    assert all(is_kept("anima", "net." + n) for n in s["kept"])
    assert not any(is_kept("anima", "net." + n) for n in s["quantizable"])


@pytest.mark.parametrize("sample", ["gemma4", "qwen35", "generic_text", "generic_text_qwen25_vl"])
def test_text_encoders_under_the_names_of_their_authors(sample):
    keys = [k.replace("model.", "model.language_model.", 1) if k.startswith("model.") else "model." + k for k in SAMPLES[sample]["keys"]]
    assert recognise(keys) == expected(sample)


# -- rules without a sample

@pytest.mark.parametrize("name", ["layer0", "a", "linear", "blocks.0.attn.qkv", "blocks.0.attn.proj_out", "layers.11.mlp.out_proj",
                                  "blocks.3.head", "double_blocks.0.img_attn.proj", "transformer_blocks.7.attn.to_out.0",
                                  "encoder.layers.2.proj_in", "single_blocks.1.linear2", "heads", "overhead"])
def test_the_generic_rule_leaves_ordinary_layers_to_be_quantized(name):
    assert not is_kept("_generic", name)


@pytest.mark.parametrize("name", """
    img_in txt_in x_in x_embedder patch_embed.proj proj_in conv_in context_embedder time_in.in_layer guidance_in.out_layer
    vector_in.in_layer time_embed.0 timestep_embedder.linear_1 t_embedder.mlp.2 t_embedder.1.linear_1 pooler.dense proj_out
    final_layer.linear norm_out.linear conv_out lm_head head classifier score out_proj transformer.wte transformer.wpe
    embeddings.word_embeddings embeddings.token_type_embeddings bert.embeddings.position_embeddings label_emb.0.0
    time_text_embed.timestep_embedder.linear_1 caption_projection.linear_1 double_stream_modulation_img.linear
    blocks.0.norm1 first_stage_model.decoder.mid.attn_1.q model.embed_tokens model.proj_out blocks.4.mlp.router
""".split())
def test_the_generic_rule_keeps_the_usual_first_and_last_layers(name):
    assert is_kept("_generic", name)


def test_t5_loses_its_decoder_and_nothing_else():
    removed = lambda key: any(re.search(r, key) for r in PRESETS["t5xxl"]["remove"])
    assert removed("decoder.block.0.layer.1.EncDecAttention.q.weight")
    assert removed("decoder.final_layer_norm.weight")
    assert removed("lm_head.weight")
    assert not removed("encoder.block.0.layer.0.SelfAttention.q.weight")
    assert not removed("shared.weight")
    assert not removed("first_stage_model.decoder.conv_in.weight")


def test_only_t5_removes_anything():
    assert [n for n, p in PRESETS.items() if p.get("remove")] == ["t5xxl"]
