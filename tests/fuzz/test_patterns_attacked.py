"""Regular expressions of the user as an attack: bounded in time and memory, and explained with a caret where they are wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_checkpoints import floats, save

from streamquant import cli, patterns
from streamquant.errors import LayerConfigError, PatternError
from streamquant.layer_config import read_layer_config
from streamquant.patterns import Pattern


def complaint(text: str) -> str:
    with pytest.raises(PatternError) as caught:
        found = Pattern(text, "--custom-layers")
        for name in ("double_blocks.0.img_attn.qkv", "a" * 60 + "!"):
            found.finds(name, f"{name}.weight")
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["a{1000000000}", "(?:a?){1000000}", "(?:(?:a{1000}){1000}){1000}", "((a|b){5000}){5000}", "[(]a{99999999}", "[)](?:b{300}){300}",
     "(" * 50 + "a{20}" + "){20}" * 50],
)  # fmt: skip
def test_repetitions_that_would_fill_the_memory_are_refused(text):
    began = time.process_time()
    assert "fills the memory" in complaint(text)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ["a{3}", r"\d{1,4}\.\d{1,4}", "(a{10}){10}", "x{0}", "{", "a{,3}", "[a{2}]", "(?:blocks|layers){1,50}"])
def test_repetitions_in_use_are_not(text):
    Pattern(text, "--custom-layers")


@pytest.mark.parametrize("text", ["(?R)", "a(?R)?b", "(a(?1)?)", "(?P<x>a)(?&x)", "(?P<x>a)(?P>x)"])
def test_patterns_that_call_themselves_are_refused(text):
    """The engine's time limit does not hold for them: (?R) fills half a gigabyte first."""
    assert "calls a part of itself" in complaint(text)


def test_what_only_looks_like_a_call_is_taken():
    assert Pattern(r"\(?R", "x").finds("R", "R")


@pytest.mark.parametrize("text", [r"(a+)+$", r"^(\w|a|aa)+\.x", r"(a|a)*$", r"(?:a*)*b", r"(?i)(a+)+$", r"((a+)+)+$", r"(?=(a+)+$)x"])
def test_catastrophic_patterns_end(text, monkeypatch):
    """Whether the engine sees through it or is stopped: the answer comes."""
    monkeypatch.setattr(patterns, "SEARCH_SECONDS", 0.3)
    began = time.process_time()
    try:
        Pattern(text, "x").finds("a" * 40_000 + "!", "a" * 40_000 + "!.weight")
    except PatternError as error:
        assert "takes more than 0.3 s on one name" in str(error)
    assert time.process_time() - began < 10


def test_all_names_together_have_a_limit(monkeypatch):
    """None of 200,000 names takes long, and all together would take a day."""
    monkeypatch.setattr(patterns, "TOTAL_SECONDS", 0.5)
    found, began = Pattern(r"^(\w|\w\w)+!", "--exclude-layers"), time.process_time()
    with pytest.raises(PatternError, match="takes more than 0.5 s on the names of one checkpoint") as caught:
        for number in range(200_000):
            found.finds("a" * 22, f"{'a' * 22}.{number}")
    assert time.process_time() - began < 10 and "nested repetition" in str(caught.value) and number < 199_999


def test_a_sane_pattern_over_200_000_names_is_far_from_the_limit():
    found = Pattern(r"(double|single)_blocks\.\d+\.(img|txt)_mlp\.[02]$", "x")
    for number in range(200_000):
        found.finds(f"model.diffusion_model.double_blocks.{number}.img_mlp.1", f"double_blocks.{number}.weight")
    assert found._clock[0] < patterns.TOTAL_SECONDS / 2


@pytest.mark.parametrize(
    ("text", "position"),
    [("(", 1), ("ok|a**", 5), ("x" * 500 + "(", 501), ("\x1b[31m(", 6), ("a\n(b", 4), ("中文(", 3), ("x" * 200 + "[z-a]" + "y" * 200, 203)],
)
def test_the_caret_stands_under_the_fault(text, position):
    from rich.cells import cell_len

    said, shown, caret = complaint(text).split("\n")
    assert said.startswith("--custom-layers is not a valid regular expression: ") and said.endswith(".")
    assert shown.isprintable() and len(shown) < 140
    column = caret.index("^")
    assert caret.strip() == "^" and 0 <= column <= cell_len(shown)
    end = f"position {position:,}." in said or f"position {position - 1:,}." in said or f"position {position + 1:,}." in said
    assert end, said


def test_too_long_and_empty():
    assert "1,000,000 characters long" in complaint("a" * 1_000_000)
    assert "is empty, which finds every layer" in complaint("")
    assert Pattern("|".join(f"double_blocks.{n}.img_attn.qkv" for n in range(4000)), "x").finds("double_blocks.7.img_attn.qkv", "x")


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [(r"(?<=img_)attn", "img_attn", True), (r"(?<!txt_)attn", "txt_attn", False), ("(?i)IMG", "img", True), (r"(a)\1", "aa", True),
     (r"\p{Greek}", "α", True), ("^$", "x", False), (".", "x", True), ("(?x) i m g # all of it", "img", True), (r"\.", "a.b", True)],
)  # fmt: skip
def test_what_a_regular_expression_can_do_works(text, name, found):
    assert Pattern(text, "x").finds(name, name) is found


@pytest.mark.parametrize("text", ["(?V0)(?V1)a", r"\L<words>", r"\p{Foo}", r"\N{NO SUCH}", "(?P<1>a)", "(" * 5000 + ")" * 5000, "(?<=(?<=a)"])
def test_what_the_engine_refuses_in_other_ways_is_a_complaint_too(text):
    assert complaint(text).startswith("--custom-layers ")


@pytest.mark.parametrize("flag", ["--custom-layers", "--exclude-layers"])
def test_on_the_screen(tmp_path, flag):
    source = save(tmp_path / "m.safetensors", {"a.weight": floats(64, 64)})
    more = ["--custom-type", "int8"] if flag == "--custom-layers" else []
    done = CliRunner().invoke(cli.main, ["convert", str(source), flag, "img_in|(txt_in", *more, "--dry-run"])
    assert done.exit_code == 2
    said, shown, caret = done.stderr.rstrip("\n").split("\n")
    assert f"{flag} is not a valid regular expression" in said and shown == "    img_in|(txt_in" and caret.strip() == "^"


@pytest.mark.parametrize("name", ["c.toml", "c.json"])
def test_in_a_layer_config_with_file_and_key(tmp_path, name):
    path = tmp_path / name
    text = json.dumps({"ok": "fp8", "img_in|(txt_in": "int8"}) if name == "c.json" else "ok = 'fp8'\n'img_in|(txt_in' = 'int8'\n"
    path.write_text(text)
    source = save(tmp_path / "m.safetensors", {"a.weight": floats(64, 64)})
    done = CliRunner().invoke(cli.main, ["convert", str(source), "--layer-config", str(path), "--dry-run"])
    assert done.exit_code == 2
    said, shown, caret = done.stderr.rstrip("\n").split("\n")
    assert str(path) in said and "entry 'img_in|(txt_in'" in said and "is not a valid regular expression" in said
    assert shown == "    img_in|(txt_in" and caret.index("^") >= 4


def test_a_layer_config_is_bounded(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"#" * (17 << 20))
    with pytest.raises(LayerConfigError, match="larger than"):
        read_layer_config(tmp_path / "c.toml")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero, a file without end")
def test_a_layer_config_without_end_is_bounded():
    with pytest.raises(LayerConfigError, match="larger than"):
        read_layer_config(Path("/dev/zero"))
