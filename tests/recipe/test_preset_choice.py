"""How presets are chosen and applied: by name, by flag, by the keys, behind any prefix."""

from __future__ import annotations

import pytest
from small_checkpoints import floats, save

from streamquant import Recipe, plan, presets
from streamquant.errors import UsageError
from streamquant.recipe import Rules

FLUX2 = ["double_stream_modulation_img.lin.weight", "img_in.weight", "single_blocks.0.linear1.weight"]
WAN = ["head.modulation", "blocks.0.self_attn.q.weight", "text_embedding.0.weight", "head.head.weight"]
UNKNOWN = ["layers.0.proj.weight", "layers.0.norm.weight", "proj_out.weight", "token_embed.weight"]


def kept(keys: list[str], **recipe) -> set[str]:
    """Layers that stay although they are candidates."""
    rules = Rules(Recipe(**recipe), keys)
    layers = [key.removesuffix(".weight") for key in keys]
    return {layer for layer, key in zip(layers, keys, strict=True) if rules.decide(layer, key).choice is None}


@pytest.mark.parametrize("prefix", presets.PREFIXES)
def test_architectures_are_recognised_behind_every_prefix(prefix):
    for keys, name in ((FLUX2, "flux2"), (WAN, "wan"), (UNKNOWN, "_generic")):
        found, seen = presets.recognise([prefix + key for key in keys])
        assert (found.name, seen) == (name, prefix)


@pytest.mark.parametrize("prefix", presets.PREFIXES)
def test_presets_apply_behind_every_prefix(prefix):
    assert kept([prefix + key for key in FLUX2]) == {f"{prefix}double_stream_modulation_img.lin", f"{prefix}img_in"}


def test_a_prefix_must_be_that_of_most_keys():
    assert presets.find_prefix(["model.diffusion_model.a", "vae.b", "te.c"]) == ""
    assert (
        presets.find_prefix(["model.diffusion_model.a", "model.diffusion_model.b", "te.c"]) == "model.diffusion_model."
    )
    assert presets.find_prefix([]) == ""


def test_a_named_preset_overrides_what_the_keys_say():
    assert kept(UNKNOWN, preset=("flux2",)) == {"layers.0.norm"} < kept(UNKNOWN)
    assert "head.head" not in kept(WAN, preset=("flux2",)) and "head.head" in kept(WAN)


def test_several_presets_keep_what_either_keeps():
    both = kept(FLUX2 + WAN, preset=("flux2", "wan"))
    assert both == kept(FLUX2 + WAN, preset=("flux2",)) | kept(FLUX2 + WAN, preset=("wan",))


def test_what_holds_everywhere_holds_with_every_preset_but_none():
    keys = [*UNKNOWN, "blocks.0.norm1.weight"]
    for name in presets.load_presets():
        if not name.startswith("_"):
            assert "blocks.0.norm1" in kept(keys, preset=(name,)), name
    assert kept(keys, preset=("none",)) == set()


def test_presets_have_their_flags_for_names():
    for flag, name in presets.flags().items():
        assert presets.named(flag).name == presets.named(flag.replace("-", "_").upper()).name == name


@pytest.mark.parametrize("name", ["flux3", "_generic", "_everywhere", ""])
def test_an_unknown_preset_is_refused_with_the_known_ones(name):
    with pytest.raises(UsageError, match=rf"no preset '{name}'.*auto, none, .*flux2.*wan") as caught:
        Rules(Recipe(preset=(name,)), FLUX2)
    assert caught.value.exit_code == 2


def test_none_goes_with_no_other():
    with pytest.raises(UsageError, match="none does not go with other presets"):
        Rules(Recipe(preset=("none", "flux2")), FLUX2)


def test_the_plan_says_what_it_recognised(tmp_path):
    keys = [f"model.diffusion_model.{key}" for key in FLUX2]
    path = save(tmp_path / "m.safetensors", {key: floats(8, 8) for key in keys})
    made = plan(path)
    assert made.architecture == "Flux.2"
    assert made.notes[0] == "Architecture recognised by its keys: Flux.2, with the prefix 'model.diffusion_model.'."
    assert not plan(path, Recipe(preset=("flux2",))).notes


def test_the_plan_says_that_it_recognised_nothing(tmp_path):
    (note,) = plan(save(tmp_path / "m.safetensors", {"layers.0.linear.weight": floats(64, 64)})).notes
    assert note.startswith("Architecture not recognised: ") and "--preset" in note
