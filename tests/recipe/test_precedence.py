"""Which rule decides: layer config > custom layers > excluded layers > preset > base format."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import floats, noise, save

from streamquant import FormatChoice, Recipe, plan
from streamquant.errors import UsageError
from streamquant.plan import Unit

FLUX2 = "double_stream_modulation_img.lin"
LAYERS = [
    FLUX2,
    "img_in",
    "final_layer.linear",
    "single_blocks.0.linear1",
    "single_blocks.1.linear1",
    "double_blocks.0.img_mlp.0",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = {f"{layer}.weight": floats(64, 64, seed=number) for number, layer in enumerate(LAYERS)}
    tensors |= {"single_blocks.0.norm.query_norm.scale": floats(64, dtype="F32"), "ids": noise("I64", 4, 4)}
    return save(tmp_path_factory.mktemp("s") / "m.safetensors", tensors)


def decided(source, **recipe) -> dict[str, Unit]:
    return {unit.layer: unit for unit in plan(source, Recipe(**recipe)).units}


def formats(source, **recipe) -> dict[str, str]:
    return {layer: unit.format.name for layer, unit in decided(source, **recipe).items() if layer in LAYERS}


KEPT = dict.fromkeys(LAYERS[:3], "copy")


def test_the_preset_keeps_and_the_base_format_takes_the_rest(source):
    assert formats(source, base=FormatChoice("nf4")) == KEPT | dict.fromkeys(LAYERS[3:], "bnb_nf4")
    units = decided(source, base=FormatChoice("nf4"))
    assert units["img_in"].rule == "preset flux2" and "Flux.2" in units["img_in"].reason
    assert units["single_blocks.0.linear1"].rule == "base format" and units["single_blocks.0.linear1"].reason is None


def test_custom_layers_override_the_preset(source):
    """The project's headline: the layers a preset keeps become FP8, the rest NF4."""
    custom = {"custom_layers": "img_in|txt_in|final_layer", "custom": FormatChoice("fp8")}
    found = formats(source, base=FormatChoice("nf4"), **custom)
    assert found == dict.fromkeys(LAYERS[3:], "bnb_nf4") | {
        FLUX2: "copy", "img_in": "float8_e4m3fn", "final_layer.linear": "float8_e4m3fn",
    }  # fmt: skip


def test_excluded_layers_stay(source):
    units = decided(source, exclude_layers=r"single_blocks\.1")
    assert (units["single_blocks.1.linear1"].format.name, units["single_blocks.1.linear1"].reason) == (
        "copy",
        "excluded",
    )
    assert units["single_blocks.0.linear1"].quantized


def test_custom_overrides_exclude(source):
    found = formats(
        source, exclude_layers="single_blocks", custom_layers=r"single_blocks\.1", custom=FormatChoice("int8")
    )
    assert found["single_blocks.0.linear1"] == "copy" and found["single_blocks.1.linear1"] == "int8_tensorwise"


def test_the_layer_config_overrides_all(source):
    config = (
        (r"single_blocks\.0", FormatChoice("keep")),
        ("single_blocks", FormatChoice("fp4")),  # first match wins
        ("img_in", FormatChoice("int8")),
    )
    units = decided(
        source,
        layer_config=config,
        custom_layers="blocks|img_in",
        custom=FormatChoice("fp8", "row"),
        exclude_layers=r"blocks\.1",
    )
    assert {layer: unit.format.name for layer, unit in units.items() if layer in LAYERS} == {
        "single_blocks.0.linear1": "copy", "single_blocks.1.linear1": "bnb_fp4", "img_in": "int8_tensorwise",
        "double_blocks.0.img_mlp.0": "float8_e4m3fn_rowwise", FLUX2: "copy", "final_layer.linear": "copy",
    }  # fmt: skip
    assert units["single_blocks.0.linear1"].reason == "layer config says keep"
    assert units["img_in"].rule == "layer config 'img_in'"


patterns = st.none() | st.sampled_from(["single", "double", "img_in", r"0\.", "linear", "."])
choices = st.sampled_from([FormatChoice("fp8"), FormatChoice("int8"), FormatChoice("nf4"), FormatChoice("keep")])


@settings(max_examples=200)
@given(
    st.lists(st.tuples(patterns.filter(bool), choices), max_size=3),
    patterns,
    patterns,
    st.sampled_from([("auto",), ("none",)]),
)
def test_precedence_as_a_law(source, config, custom, exclude, preset):
    """The decision, spelled out as the rule of the first that speaks."""
    import re

    recipe = Recipe(
        FormatChoice("fp4"), custom, FormatChoice("fp8_e5m2") if custom else None, exclude, tuple(config), preset
    )
    for unit in plan(source, Recipe(**{**vars(recipe), "cast": "BF16"})).units:
        if unit.layer not in LAYERS:
            continue
        from_config = [choice for pattern, choice in config if re.search(pattern, unit.layer)]
        if from_config:
            expected = from_config[0]
        elif custom and re.search(custom, unit.layer):
            expected = FormatChoice("fp8_e5m2")
        elif (exclude and re.search(exclude, unit.layer)) or (preset == ("auto",) and unit.layer in KEPT):
            expected = FormatChoice("keep")
        else:
            expected = FormatChoice("fp4")
        assert unit.format.name == (expected.format.name if expected.format else "copy"), unit


def test_patterns_are_found_in_the_layers_name_and_in_the_whole_key(source):
    assert formats(source, exclude_layers=r"^img_in$", preset=("none",))["img_in"] == "copy"
    assert formats(source, exclude_layers=r"^img_in\.weight$", preset=("none",))["img_in"] == "copy"


def test_preset_none_lifts_every_restriction(source):
    assert set(formats(source, preset=("none",)).values()) == {"float8_e4m3fn"}


# -- requests that make no sense


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: FormatChoice("fp16"), "There is no format 'fp16': take one of fp8"),
        (lambda: FormatChoice("fp8", "column"), "Scaling mode 'column' does not go with fp8: fp8 takes tensor, row"),
        (lambda: FormatChoice("int8", "block3d"), "does not go with int8"),
        (lambda: FormatChoice("fp8_e5m2", "row"), "does not go with fp8_e5m2"),
        (lambda: FormatChoice("nf4", "row"), "nf4 has no scaling mode"),
        (lambda: FormatChoice("nf4", block_size=48), "no block size 48: take one of 32, 64"),
        (lambda: FormatChoice("fp8", "block", 0), "at least 1, not 0"),
        (lambda: FormatChoice("int8", "block", -128), "at least 1, not -128"),
        (lambda: FormatChoice("fp8", double_quant=True), "belongs to nf4 and fp4"),
        (lambda: FormatChoice("fp8", rounding="up"), "There is no rounding 'up'"),
        (lambda: Recipe(custom_layers="x"), "--custom-layers needs --custom-type"),
        (lambda: Recipe(custom=FormatChoice("fp8")), "--custom-type needs --custom-layers"),
        (lambda: Recipe(cast="F32"), "Cannot cast to 'F32'"),
    ],
)
def test_contradictory_requests(make, told):
    with pytest.raises(UsageError) as caught:
        make()
    assert told in str(caught.value) and caught.value.exit_code == 2


def test_block2d_is_block():
    assert FormatChoice("fp8", "block2d") == FormatChoice("fp8", "block")


def test_a_recipe_describes_all_that_decides(source):
    """Two recipes that differ anywhere must differ in what provenance records and a resume compares."""
    different = [
        Recipe(), Recipe(FormatChoice("fp8", "row")), Recipe(FormatChoice("fp8", "block")),
        Recipe(FormatChoice("fp8", "block", 64)),
        Recipe(FormatChoice("fp8", "block3d")), Recipe(FormatChoice("int8")), Recipe(FormatChoice("int8", "tensor")),
        Recipe(FormatChoice("nf4")), Recipe(FormatChoice("nf4", block_size=32)),
        Recipe(FormatChoice("nf4", double_quant=True)),
        Recipe(FormatChoice("nf4", heur=True)), Recipe(FormatChoice("keep")), Recipe(exclude_layers="a"),
        Recipe(custom_layers="a", custom=FormatChoice("fp8")), Recipe(custom_layers="a", custom=FormatChoice("fp4")),
        Recipe(layer_config=(("a", FormatChoice("fp8")),)), Recipe(layer_config=(("a", FormatChoice("keep")),)),
        Recipe(preset=("none",)), Recipe(preset=("flux2",)), Recipe(comfy_quant=True), Recipe(cast="BF16"),
        Recipe(allow_nonfinite=True), Recipe(seed=1),
    ]  # fmt: skip
    described = [str(recipe.describe()) for recipe in different]
    assert len(set(described)) == len(different)
