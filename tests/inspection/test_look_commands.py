"""inspect, verify, compare, dequantize and doctor as a person or a program meets them."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from others_layers import EVERY_LAYOUT, bnb4, float8, weight
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file
from small_checkpoints import Tensor, floats, load, metadata_of, save, save_shards

import streamquant
from streamquant import FormatChoice, Recipe, cli
from streamquant.console import Screen
from streamquant.doctor import Check, examine, sound
from streamquant.inspect import inspect
from streamquant.terminal import Rows
from streamquant.verify import verify
from streamquant.views.common import path_line
from streamquant.views.inspect import inspection_view, layers_view
from streamquant.views.verify import checked_layers_view, verdict_view


def run(*arguments: str | Path, columns: int = 160) -> Result:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def lines(result: Result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """source, good, broken (a scale doubled) in one folder."""
    folder = tmp_path_factory.mktemp("commands")
    tensors = {f"blocks.{block}.linear.weight": floats(128, 64, seed=block) for block in range(3)} | {"norm.weight": floats(64)}
    save(folder / "source.safetensors", tensors, {"modelspec.title": "Commands"})
    streamquant.convert(folder / "source.safetensors", folder / "good.safetensors", Recipe(FormatChoice("fp8")))
    stored = load(folder / "good.safetensors")
    scale = stored["blocks.1.linear.weight_scale"]
    doubled = np.frombuffer(scale.data, dtype=np.float32) * 2
    stored["blocks.1.linear.weight_scale"] = scale._replace(data=doubled.tobytes())
    save(folder / "broken.safetensors", stored, metadata_of(folder / "good.safetensors"))
    return folder


def test_inspect_shows_what_is_there(files):
    shown = run("inspect", files / "good.safetensors")
    assert shown.exit_code == 0
    for words in ("float8_e4m3fn", "tensor scale", "stock ComfyUI", "modelspec.title = Commands", "streamquant verify checks them"):
        assert words in shown.stdout
    several = run("inspect", files / "good.safetensors", files / "source.safetensors")
    assert "good.safetensors" in several.stdout and "no layer is quantized" in several.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "float8_e4m3fn (as it comes, without calibration)"),
        (["--rtn"], "float8_e4m3fn (rtn rounding)"),
        (["--structure"], "float8_e4m3fn (learned rounding by structure)"),
        (["--objective", "svd"], "float8_e4m3fn (rounded for the largest singular directions)"),
    ],
)
def test_inspect_says_what_was_rounded_by(files, tmp_path, options, words):
    output = tmp_path / "output.safetensors"
    assert run("convert", files / "source.safetensors", "--output", output, "--preset", "none", *options).exit_code == 0
    assert words in run("inspect", output).stdout


def test_inspect_folds_blocks_in_a_tree_and_lists_layers(files):
    tree = run("inspect", "--tree", files / "good.safetensors").stdout
    assert "blocks.0-2.linear" in tree and "3 x 128 x 64" in tree
    listed = run("inspect", "--layers", files / "good.safetensors").stdout
    assert all(f"blocks.{block}.linear" in listed for block in range(3)) and "norm.weight" in listed


def test_inspect_as_json(files):
    (found,) = lines(run("inspect", "--json", files / "good.safetensors"))
    assert found["event"] == "inspection" and found["loaders"] == "stock ComfyUI"
    assert [layer["name"] for layer in found["layers"]] == [f"blocks.{block}.linear" for block in range(3)]


def test_verify_a_sound_output(files):
    shown = run("verify", files / "source.safetensors", files / "good.safetensors")
    assert shown.exit_code == 0
    assert "sound" in shown.stdout and "unsound" not in shown.stdout and "3 layers decoded" in shown.stdout
    sampled = run("verify", files / "source.safetensors", files / "good.safetensors", "--sample", "5%", "--layers")
    assert sampled.exit_code == 0 and "nothing wrong in the 5%" in sampled.stdout and "blocks.2.linear" in sampled.stdout


def test_verify_an_unsound_output(files):
    shown = run("verify", files / "source.safetensors", files / "broken.safetensors")
    assert shown.exit_code == 11
    assert "blocks.1.linear.weight: its scale is wrong: all of it decodes 2" in shown.stdout
    assert "blocks.1.linear.weight_scale: its bytes are not those that the conversion wrote" in shown.stdout
    assert run("verify", files / "source.safetensors", files / "broken.safetensors", "-q").stdout == ""
    (found,) = lines(run("verify", files / "source.safetensors", files / "broken.safetensors", "--json"))
    assert found["event"] == "verdict" and found["sound"] is False and len(found["findings"]) == 2


def test_hashes_that_a_sample_leaves_out_are_not_told_as_differing(tmp_path):
    source = save(tmp_path / "source.safetensors", {"big.weight": floats(2048, 2048), "small.weight": floats(64, 64)})
    streamquant.convert(source, tmp_path / "output.safetensors", Recipe(FormatChoice("fp8", rounding="rtn")))
    whole, sampled = (run("verify", source, tmp_path / "output.safetensors", *more).stdout for more in ([], ["--sample", "5%"]))
    known = int(re.search(r"(\d+) of \1 hashes agree;", whole)[1])
    agree, looked, rest = map(int, re.search(r"(\d+) of (\d+) hashes agree \((\d+) not looked at\)", sampled).groups())
    assert agree == looked == known - rest and rest > 0


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_of_verify_breaks_after_commas_before_names_get_lines_of_their_own(width):
    numbers = ("layers", "error", "worst", "dB", "cosine", "largest", "saturated")
    cells = ["34", "0.0370", "0.0532", "25.5", "0.99859", "0.071", "0.14%"]
    found = Rows(("format", *numbers), numbers, [["float8_e4m3fn, tensor scale", *cells]], breaks=True)
    shown = [line for line, _ in found.lines(width)]
    assert max(map(len, shown)) <= width and shown[1].split()[-7:] == cells
    assert len(shown) == (3 if width == 80 else 2) and (shown[-1] == "  tensor scale") == (width == 80)


@pytest.mark.parametrize("share", ["0", "-5%", "150%", "much", "nan"])
def test_a_share_that_is_none(files, share):
    shown = run("verify", files / "source.safetensors", files / "good.safetensors", "--sample", share)
    assert shown.exit_code == 2 and "is not a share" in shown.stderr


def test_compare(files, tmp_path):
    nf4 = tmp_path / "nf4.safetensors"
    streamquant.convert(files / "source.safetensors", nf4, Recipe(FormatChoice("nf4")))
    shown = run("compare", files / "good.safetensors", nf4, "--source", files / "source.safetensors")
    assert shown.exit_code == 0
    assert "3 x blocks.0-2.linear" in shown.stdout and "A is nearer to the source in 3 layers, B in 0" in shown.stdout
    assert "blocks.2.linear" in run("compare", files / "good.safetensors", nf4, "--layers").stdout
    (found,) = lines(run("compare", files / "good.safetensors", nf4, "--json"))
    assert found["event"] == "comparison" and len(found["layers"]) == 3


def test_dequantize(files, tmp_path):
    output = tmp_path / "plain.safetensors"
    shown = run("dequantize", files / "good.safetensors", "-o", output, "--dtype", "fp32")
    assert shown.exit_code == 0 and "3 layers decoded (3 float8_e4m3fn)" in shown.stdout
    assert load_file(output)["blocks.0.linear.weight"].dtype == torch.float32
    again = run("dequantize", files / "good.safetensors", "-o", output)
    assert again.exit_code == 4 and "--force" in again.stderr
    (done,) = lines(run("dequantize", files / "good.safetensors", "-o", output, "--force", "--json"))
    assert done["event"] == "done" and done["output"] == str(output)
    link = tmp_path / "linked.safetensors"
    link.symlink_to(files / "good.safetensors")
    assert run("dequantize", link, "-q").exit_code == 0
    assert (tmp_path / "linked-dequantized.safetensors").is_file(), "beside the source as it was named"
    assert run("dequantize", link, "--dtype", "bf16", "-o", f"{tmp_path}/").exit_code == 0
    assert (tmp_path / "linked-bf16.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["inspect", "missing.safetensors"], 5, "no file or folder at missing.safetensors"),
        (["inspect"], 2, "Missing argument"),
        (["verify", "{good}", "missing.safetensors"], 5, "missing.safetensors"),
        (["compare", "{good}", "{source}", "--source", "missing.safetensors"], 5, "missing.safetensors"),
        (["compare", "{source}", "{source}"], 5, "no quantized weight in common"),
        (["dequantize", "{source}"], 4, "plain checkpoint already"),
        (["dequantize", "{good}", "--dtype", "fp8"], 2, "fp8"),
        (["dequantize", "{good}", "-o", "no/such/folder/out.safetensors"], 4, "does not exist"),
    ],
)
def test_refusals_are_a_sentence_and_an_exit_code(files, arguments, code, words):
    names = {name: files / f"{name}.safetensors" for name in ("source", "good")}
    shown = run(*(argument.format(**names) for argument in arguments))
    assert shown.exit_code == code, shown.output
    assert words in shown.stderr and "Traceback" not in shown.output


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "command", [["inspect"], ["inspect", "--tree"], ["inspect", "--layers"], ["verify", "--layers"], ["compare"]]
)
def test_names_from_a_file_are_data(tmp_path, command, columns):
    nasty = "a[red]\x1b[2J\u202eevil"
    w = weight(64, 64)
    raw = w.view(torch.uint8).numpy().tobytes()
    source = save(tmp_path / "source.safetensors", {f"{nasty}.weight": Tensor("BF16", (64, 64), raw)}, {"[bold]key": "\x1b[31mred"})
    output = save(tmp_path / "output.safetensors", float8(w).named(nasty) | {f"{nasty}.stray": floats(2)}, {"[b]k": "\x1b[31m"})
    name, *options = command
    arguments = {"inspect": [output], "verify": [source, output], "compare": [output, output]}[name]
    shown = run(name, *options, *arguments, columns=columns)
    assert "\x1b" not in shown.output and "\u202e" not in shown.output
    expected = "[b]k" if command == ["inspect"] else "[red]"
    assert expected in shown.stdout.replace("\n", ""), "shown, and not taken for markup"


@pytest.mark.parametrize("kind", EVERY_LAYOUT)
def test_every_layout_has_its_screens(tmp_path, kind):
    w = weight(64, 64)
    stored = EVERY_LAYOUT[kind](w)
    source = save(tmp_path / "source.safetensors", {"a.weight": Tensor("BF16", (64, 64), w.view(torch.uint8).numpy().tobytes())})
    output = save(tmp_path / "output.safetensors", stored.named("a"))
    assert run("inspect", output).exit_code == 0
    shown = run("verify", source, output)
    assert shown.exit_code == 0, shown.stdout
    assert "no manifest" in shown.stdout


def test_a_gguf_file_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(48))
    shown = run("inspect", tmp_path / "model.gguf")
    assert shown.exit_code == 0 and "GGUF version 3" in shown.stdout
    refused = run("dequantize", tmp_path / "model.gguf")
    assert refused.exit_code == 5 and "GGUF" in refused.stderr


def test_double_quantized_scales_have_a_range_on_the_screen(tmp_path):
    shown = run("inspect", save(tmp_path / "file.safetensors", bnb4(weight(64, 64), nested=True).named("a"))).stdout
    assert "absmax in 8 bits" in shown and " to " in shown


def test_doctor_has_a_line_for_everything():
    shown = run("doctor")
    assert shown.exit_code == 0
    for words in ("streamquant", "torch", "numba", "processors", "memory", "disk", "GPU" if not torch.cuda.is_available() else "cuda:0"):
        assert words in shown.stdout
    checks = lines(run("doctor", "--json"))
    assert [check["topic"] for check in checks] == [check.topic for check in examine()]


def test_doctor_tells_what_is_missing(monkeypatch):
    import importlib.metadata

    original = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("torch", "numba"):
            raise importlib.metadata.PackageNotFoundError(package)
        return original(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    states = {check.topic: check.state for check in examine()}
    assert (states["torch"], states["numba"], states["numpy"]) == ("problem", "missing", "ok")
    assert run("doctor").exit_code == 1
    assert sound([Check("a", "missing", "")]) and not sound([Check("a", "problem", "")])


def test_dequantize_of_shards_to_a_dtype(tmp_path):
    shards = [bnb4(weight(64, 64), "nf4").named(f"blocks.{shard}") | {f"norm{shard}.weight": floats(64)} for shard in range(2)]
    index = save_shards(tmp_path / "sharded", *shards)
    for dtype, expected in (("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16")):
        shown = run("dequantize", index, "--dtype", dtype)
        assert shown.exit_code == 0 and "2 layers decoded (2 bnb_nf4), 2 tensors copied" in shown.stdout, shown.output
        stored = load(tmp_path / "sharded" / f"model-{dtype}.safetensors")
        assert {stored[f"blocks.{shard}.weight"].dtype for shard in range(2)} == {expected} and len(stored) == 4
        assert stored["norm0.weight"].dtype == "BF16", "what was not quantized is copied"


def test_an_interrupted_dequantize_says_that_it_starts_again(files, tmp_path, monkeypatch):
    assert "starts again from the beginning" in " ".join(run("dequantize", "--help").stdout.split())
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(sys.modules["streamquant.cli.dequantize"], "stop_on_signals", lambda: stop)
    shown = run("dequantize", files / "good.safetensors", "-o", tmp_path / "new.safetensors")
    assert shown.exit_code == 130 and "starts again from the beginning" in shown.stderr and not list(tmp_path.iterdir())


def on_a_terminal(width: int, parts: list) -> str:
    screen = Screen()
    screen.out = Console(file=io.StringIO(), force_terminal=True, no_color=True, width=width)
    screen.show(parts)
    return re.sub(r"\x1b\[[0-9;]*m", "", screen.out.file.getvalue())


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_narrow_terminal_names_are_whole_and_lines_fit(tmp_path, width):
    names = [f"model.diffusion_model.double_blocks.{block}.img_attn.qkv" for block in range(3)]
    source = save(tmp_path / "source.safetensors", {f"{name}.weight": floats(128, 256) for name in names})
    recipe = Recipe(FormatChoice("int8", convrot=True))
    streamquant.convert(source, tmp_path / "output.safetensors", recipe)
    verdict = verify(source, tmp_path / "output.safetensors")
    shown = on_a_terminal(width, [checked_layers_view(verdict), *verdict_view(verdict)[:1]])
    shown += on_a_terminal(width, [layers_view(inspect(tmp_path / "output.safetensors"))])
    assert all(len(line) <= width for line in shown.splitlines()), shown
    assert all(shown.count(name) == 2 for name in names) and "rotated by 256" in shown


@pytest.mark.parametrize(
    "choice",
    [
        FormatChoice("int8", convrot=True), FormatChoice("fp8", "block"), FormatChoice("fp8", "block3d"),
        FormatChoice("nf4", double_quant=True),
    ],
)  # fmt: skip
def test_the_table_of_inspect_fits_80_columns_with_whole_numbers(tmp_path, choice):
    source = save(tmp_path / "source.safetensors", {f"blocks.{i}.weight": floats(256, 512, seed=i) for i in range(3)})
    streamquant.convert(source, tmp_path / "output.safetensors", Recipe(choice))
    found = inspect(tmp_path / "output.safetensors")
    (group,) = found.groups
    narrow, wide, tiny = (on_a_terminal(width, inspection_view(found)) for width in (80, 200, 56))
    assert max(map(len, narrow.splitlines()[1:])) <= 80, narrow  # the first line is the path
    (row,) = [line for line in wide.splitlines() if line.startswith(group.format)]
    assert group.detail in row
    numbers = row[row.index(group.detail) + len(group.detail) :].split()
    (row,) = [line for line in narrow.splitlines() if line.startswith(group.format)]
    assert row.split()[-len(numbers) :] == numbers and all(piece in narrow for piece in re.split(", | blocks", group.detail))
    assert all(word in tiny for word in ("scales", *numbers, *group.detail.split())), "nothing is left out or broken"


def test_sentences_break_between_words_and_paths_do_not():
    words = " ".join(["extraordinarily"] * 20)
    *lines, path, spaced = on_a_terminal(40, [Text(words), Text("/folder" * 20), path_line(Path("/a b" * 20))]).splitlines()
    assert " ".join(lines) == words and all(len(line) <= 40 for line in lines)
    assert path == "/folder" * 20 and spaced == "/a b" * 20
