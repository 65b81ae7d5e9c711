"""Regular expressions a person gives: compiled with a clear complaint, found where they should be, stopped in time."""

from __future__ import annotations

import pytest
from small_checkpoints import floats, noise, save

from streamquant import FormatChoice, Recipe, patterns, plan
from streamquant.errors import PatternError
from streamquant.patterns import Pattern

CUSTOM = FormatChoice("int8")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = {f"blocks.{n}.qkv.weight": floats(8, 8) for n in range(5)}
    tensors |= {
        "norm.weight": floats(8),
        "conv.weight": floats(2, 2, 2, 2),
        "ids": noise("I64", 4),
        "q.weight": noise("I8", 2, 2),
    }
    return save(tmp_path_factory.mktemp("s") / "m.safetensors", tensors)


def complaint(make) -> str:
    with pytest.raises(PatternError) as caught:
        make()
    assert caught.value.exit_code == 2
    return str(caught.value)


def recipes(pattern: str) -> dict[str, Recipe]:
    """The pattern in each place where one can be given, by the name the complaint must give that place."""
    return {
        "--custom-layers": Recipe(custom_layers=pattern, custom=CUSTOM),
        "--exclude-layers": Recipe(exclude_layers=pattern),
        "layer config entry 2": Recipe(layer_config=(("blocks", CUSTOM), (pattern, CUSTOM))),
    }


@pytest.mark.parametrize("place", recipes(""))
def test_a_pattern_that_finds_nothing_is_told_what_names_look_like(source, place):
    message = complaint(lambda: plan(source, recipes("blokcs")[place]))
    assert message.startswith(f"{place} 'blokcs' finds no tensor")
    assert message.count("'blocks.") == 3 and message.endswith(".")


@pytest.mark.parametrize("place", recipes(""))
@pytest.mark.parametrize("pattern", ["norm", "conv", "^ids$", r"^q\."])
def test_a_pattern_that_finds_only_what_cannot_be_quantized_says_so(source, place, pattern):
    message = complaint(lambda: plan(source, recipes(pattern)[place]))
    assert f"{place} {pattern!r} finds only tensors that cannot be quantized, such as '" in message


def test_where_there_is_no_matrix_at_all(tmp_path):
    path = save(tmp_path / "m.safetensors", {"a": floats(4)})
    assert "there is no 2-D tensor" in complaint(lambda: plan(path, Recipe(exclude_layers="x")))


def test_a_pattern_shadowed_by_an_earlier_one_is_no_mistake(source):
    plan(source, Recipe(layer_config=((r"blocks", CUSTOM), (r"blocks\.1", CUSTOM)), exclude_layers="qkv"))


@pytest.mark.parametrize(
    ("pattern", "position"),
    [("(", 1), ("a(b", 3), ("[z-a]", 3), ("a**", 2), (r"(?P<x", 5), ("a\\", 2), ("*", 0), ("(?<=a+", 6)],
)
def test_an_invalid_pattern_shows_where(pattern, position):
    message = complaint(lambda: Pattern(pattern, "--custom-layers"))
    first, shown, caret = message.split("\n")
    assert first.startswith("--custom-layers is not a valid regular expression: ")
    assert shown == f"    {pattern}"
    assert caret.strip() == "^" and abs(caret.index("^") - 4 - position) <= 1, (caret.index("^") - 4, position)


@pytest.mark.parametrize("place", recipes(""))
def test_an_invalid_pattern_names_its_place(source, place):
    assert complaint(lambda: plan(source, recipes("(")[place])).startswith(place)


def test_a_catastrophic_pattern_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(patterns, "SEARCH_SECONDS", 0.2)
    path = save(tmp_path / "m.safetensors", {"a" * 60 + ".weight": floats(4, 4), "b.weight": floats(4, 4)})
    message = complaint(lambda: plan(path, Recipe(exclude_layers=r"^(\w|a|aa)+\.[vx]eight")))
    assert "takes more than 0.2 s on one name" in message and "(a+)+" in message
