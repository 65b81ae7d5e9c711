"""Layer-config files: TOML and JSON that say the same, and each way in which one can be wrong."""

from __future__ import annotations

import pytest
from small_checkpoints import EVERY_FORMAT, floats, save

from streamquant import FormatChoice, Recipe, plan
from streamquant.errors import LayerConfigError
from streamquant.layer_config import DISK_NAMES, read_layer_config

TOML = r"""
# the attention in 8 bits
['double_blocks\.0\.']
format = "int8"
scaling_mode = "block"
block_size = 64

[final_layer]
format = "keep"

["img_in"]
format = "nf4"
block_size = 128
double_quant = true
heur = true
"""
JSON = r"""{
  "double_blocks\\.0\\.": {"format": "int8", "scaling_mode": "block", "block_size": 64},
  "final_layer": "keep",
  "img_in": {"format": "nf4", "block_size": 128, "double_quant": true, "heur": true}
}"""
BOTH = (
    (r"double_blocks\.0\.", FormatChoice("int8", "block", 64)),
    ("final_layer", FormatChoice("keep")),
    ("img_in", FormatChoice("nf4", block_size=128, double_quant=True, heur=True)),
)


@pytest.mark.parametrize(("name", "text"), [("c.toml", TOML), ("c.json", JSON), ("C.JSON", JSON), ("c", TOML)])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_toml_and_json_say_the_same_in_their_order(tmp_path, name, text, start):
    """Also with the mark that some editors put before the text."""
    (tmp_path / name).write_text(start + text, encoding="utf-8")
    assert read_layer_config(tmp_path / name) == BOTH
    assert read_layer_config(str(tmp_path / name)) == BOTH


@pytest.mark.parametrize("name", DISK_NAMES)
def test_the_names_on_disk_are_formats_too(tmp_path, name):
    """What `inspect` shows can be written back into a config."""
    path = tmp_path / "c.json"
    path.write_text(f'{{"x": "{name}"}}')
    ((_, choice),) = read_layer_config(path)
    assert choice.format.name == name


def test_every_format_has_a_name_on_disk():
    names = {unit.base.format.name for unit in EVERY_FORMAT.values() if unit.base.format}
    assert names == set(DISK_NAMES)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("c.toml", "[x", "not valid TOML"),
        ("c.toml", JSON, "not valid TOML"),
        ("c.toml", "[x]\nformat='fp8'\n[x]\nformat='int8'", "not valid TOML"),
        ("c.json", TOML, "not valid JSON"),
        ("c.json", "", "not valid JSON"),
        ("c.json", "[" * 100_000, "not valid JSON"),
        ("c.json", '["fp8"]', "must be a table"),
        ("c.json", "null", "must be a table"),
        ("c.json", "{}", "must be a table"),
        ("c.toml", "", "must be a table"),
        ("c.json", '{"x": 8}', "entry 'x'"),
        ("c.json", '{"x": null}', "entry 'x'"),
        ("c.json", '{"x": []}', "entry 'x'"),
        ("c.json", '{"x": {}}', "missing required field `format`"),
        ("c.json", '{"x": {"format": 8}}', "Expected `str`, got `int`"),
        ("c.json", '{"x": {"format": "fp8", "scale": 1}}', "unknown field `scale`"),
        ("c.json", '{"x": {"format": "nf4", "block_size": "64"}}', "Expected `int | null`, got `str`"),
        ("c.json", '{"x": {"format": "nf4", "block_size": true}}', "block_size"),
        ("c.json", '{"x": {"format": "nf4", "block_size": 100}}', "no block size 100"),
        ("c.json", '{"x": "int4"}', "there is no format 'int4', take one of fp8"),
        ("c.json", '{"x": "mxfp8"}', "there is no format 'mxfp8'"),
        ("c.json", '{"x": {"format": "fp8", "double_quant": true}}', "belongs to nf4 and fp4"),
        ("c.json", '{"x": {"format": "keep", "scaling_mode": "row"}}', "keep has no scaling mode"),
        ("c.toml", "[double_blocks.0]\nformat = 'fp8'", "entry 'double_blocks'"),
        ("c.json", '{"x": "fp8", "x": "int8"}', "'x' twice"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, told):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(LayerConfigError) as caught:
        read_layer_config(path)
    message = str(caught.value)
    assert told in message and str(path) in message and caught.value.exit_code == 2
    assert message.endswith(".") and not message.endswith("..") and "\n" not in message


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff\xfe\0")]
)
def test_what_cannot_be_read(tmp_path, make):
    make(tmp_path / "c.toml")
    with pytest.raises(LayerConfigError, match="Cannot read the layer config"):
        read_layer_config(tmp_path / "c.toml")


def test_from_the_file_to_the_plan(tmp_path):
    (tmp_path / "c.toml").write_text(TOML)
    names = ["double_blocks.0.qkv", "double_blocks.1.qkv", "final_layer.linear", "img_in"]
    source = save(tmp_path / "m.safetensors", {f"{name}.weight": floats(128, 128) for name in names})
    made = plan(source, Recipe(layer_config=read_layer_config(tmp_path / "c.toml"), preset=("none",)))
    assert [unit.format.name for unit in sorted(made.units, key=lambda unit: unit.key)] == [
        "int8_blockwise", "float8_e4m3fn", "copy", "bnb_nf4",
    ]  # fmt: skip
