"""What a person sees on a terminal: words and numbers are whole, and a bar is one line."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from small_checkpoints import floats, of_values, save

import streamquant
from streamquant import FormatChoice, Recipe, transcode, verify
from streamquant.console import Screen
from streamquant.errors import OutputExistsError
from streamquant.progress import observing, watching
from streamquant.report import LayerResult, Report
from streamquant.terminal import LONGEST_LABEL, MARGIN, Rows, progress_bar, say, wrapped
from streamquant.transcode import Options, dry_run
from streamquant.views.common import path_line
from streamquant.views.convert import plan_view, report_view

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def terminal(width: int, **more) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=30, highlight=False, **more)


def shown(console: Console) -> str:
    return ESCAPES.sub("", console.file.getvalue())


words = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=30)


@given(st.lists(st.lists(words, max_size=12), max_size=4), st.integers(0, 6), st.integers(1, 90))
def test_sentences_break_between_words_only(lines, indent, width):
    text = "\n".join(" " * indent + " ".join(line) for line in lines)
    made = wrapped(Text(text), width).plain
    assert made.split() == text.split(), "every word is whole and in its place"
    for line in made.split("\n"):
        assert cell_len(line) <= width or len(line.split()) == 1
    assert wrapped(Text(text), 10**6).plain.split("\n") == [line.rstrip() for line in text.split("\n")]


def test_lines_after_the_first_stand_under_what_a_label_says():
    text = Text.assemble(("made by   ", "bold"), "streamquant 0.1.0 from src.safetensors: bnb_nf4")
    assert wrapped(text, 40).plain == "made by   streamquant 0.1.0 from\n          src.safetensors: bnb_nf4"
    assert wrapped(Text("  img_in.weight: its scale is wrong"), 24).plain == "  img_in.weight: its\n    scale is wrong"
    unlabelled = Text(f"{'x' * LONGEST_LABEL}  one two three four")
    assert wrapped(unlabelled, 24).plain == f"{'x' * LONGEST_LABEL}  one two\nthree four"


def test_styles_stay_on_their_words():
    made = wrapped(Text.assemble(("error: ", "bold red"), "one two ", ("three", "green")), 10)
    assert [(made.plain[span.start : span.end].strip(), str(span.style)) for span in made.spans if span.style] == [
        ("error:", "bold red"), ("three", "green")
    ]  # fmt: skip


def test_what_is_to_be_copied_is_never_broken_and_logs_are_not_wrapped():
    console = terminal(20)
    say(console, Text("/a folder/with several/spaces in its/name", no_wrap=True))
    assert shown(console) == "/a folder/with several/spaces in its/name\n"
    log = Console(file=io.StringIO(), width=20)
    say(log, Text("a sentence of more than twenty columns"))
    assert log.file.getvalue() == "a sentence of more than twenty columns\n"


def test_an_error_is_whole_words_and_the_command_that_goes_on_is_one_line():
    screen = Screen(err=terminal(60))
    command = "streamquant convert model.safetensors --bnb-4bit --flux2 -o somewhere/else.safetensors --resume"
    screen.fail(OutputExistsError("The output /data/model-fp8.safetensors exists: --force replaces it when done."), command)
    *sentence, last = shown(screen.err).splitlines()
    assert " ".join(sentence).split() == (
        "error: The output /data/model-fp8.safetensors exists: --force replaces it when done.".split()
    )
    assert all(len(line) <= 60 for line in sentence) and last == f"go on with: {command}"


@pytest.mark.parametrize("width", [50, 72, 80, 100, 120, 200])
@pytest.mark.parametrize("total", [100_677_488, 64_449_111_222])
def test_a_bar_is_one_line_of_whole_numbers(width, total):
    console = terminal(width)
    with progress_bar(console, "memory", "tensor") as bar:
        name = "model.diffusion_model.double_blocks.12.img_attn.qkv.weight" * 3
        task = bar.add_task("", total=total, memory="152/1024 MiB RAM", tensor=name)
        bar.update(task, completed=total // 3)
        bar.refresh()
    lines = [line for line in re.split(r"[\r\n]+", shown(console)) if line.strip()]
    assert lines and all(cell_len(line.rstrip()) <= width - MARGIN for line in lines)
    done = "33.6/100.7 MB" if total < 10**9 else "21.5/64.4 GB"
    assert f"33% {done}" in lines[-1], lines
    if width >= 80:
        assert "152/1024 MiB RAM" in lines[-1] and "model.diff" in lines[-1], lines


def test_columns_stand_under_each_other_whatever_letters_are_in_a_name():
    found = Rows(("layer", "size"), ("size",), [["块.0", "12 kB"], ["block.10", "3 kB"]])
    assert {cell_len(line) for line, _ in found.lines()} == {len("block.10  12 kB")}


def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen(err=terminal(80))
    with observing(screen) as observer:
        assert type(observer.meter).__name__ == "Lines"
    monkeypatch.setenv("TERM", "xterm")
    with observing(screen) as observer:
        assert type(observer.meter).__name__ == "Bar"


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_run_of_all_says_what_it_waits_for(tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(transcode, "why_no_jit", lambda: None)
    monkeypatch.setattr(transcode, "is_compiled", lambda: compiled)
    source = save(tmp_path / "source.safetensors", {"blocks.0.linear.weight": floats(64, 64)})
    for screen in (Screen(err=terminal(200)), Screen(err=Console(file=io.StringIO()))):
        with observing(screen) as observer:
            streamquant.convert(source, tmp_path / "o.safetensors", observer=observer, options=Options(device="cpu", force=True))
        assert ("kernels are compiled" in shown(screen.err)) is not compiled


@pytest.mark.parametrize("compiled", [False, True])
def test_so_does_the_first_look_of_verify(tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(verify, "why_no_jit", lambda: None)
    monkeypatch.setattr(verify, "is_compiled", lambda kernels: compiled)
    source = save(tmp_path / "source.safetensors", {"blocks.0.linear.weight": floats(64, 64)})
    streamquant.convert(source, tmp_path / "o.safetensors")
    for screen in (Screen(err=terminal(200)), Screen(err=Console(file=io.StringIO())), Screen(err=terminal(200), quiet=True)):
        with watching(screen) as watcher:
            verify.verify(source, tmp_path / "o.safetensors", watcher=watcher)
        assert ("kernels are compiled" in shown(screen.err)) is not (compiled or screen.quiet)


def test_paths_of_outputs_are_one_line(tmp_path):
    screen = Screen(out=terminal(30))
    path = Path("/a very/long folder/with a name/of several words/model.safetensors")
    screen.show([path_line(path)])
    assert shown(screen.out) == f"{path}\n"


def test_a_run_that_went_on_tells_no_speed_of_the_whole(tmp_path):
    source, output = save(tmp_path / "source.safetensors", {"blocks.0.linear.weight": floats(64, 64)}), tmp_path / "o.safetensors"
    first = streamquant.convert(source, output)
    again = streamquant.convert(source, output, options=Options(resume=True))
    told = []
    for report in (first, again):
        screen = Screen(out=terminal(100))
        screen.show(report_view(report))
        told.append(shown(screen.out))
    assert "B/s, peak" in told[0] and "resuming" not in told[0]
    assert "B/s" not in told[1] and " s since resuming, peak" in told[1]


def test_a_dry_run_says_that_the_disk_is_too_small(tmp_path):
    output = tmp_path / "o.safetensors"
    plan, tiles, _ = dry_run(save(tmp_path / "source.safetensors", {"blocks.0.linear.weight": floats(64, 64)}), output)
    for free, small in ((plan.output_size - 1, True), (plan.output_size + 1, False)):
        screen = Screen(out=terminal(100))
        screen.show(plan_view(plan, tiles, free, output))
        assert ("too little" in shown(screen.out)) == small


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_layers_that_hold_nan_are_told_and_not_counted_as_exact(tmp_path, kind):
    weights = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
    weights[1, 3, 4] = np.nan
    tensors = {f"blocks.{block}.linear.weight": of_values(values, "F32") for block, values in enumerate(weights)}
    recipe = Recipe(FormatChoice(kind), allow_nonfinite=True)
    report = streamquant.convert(save(tmp_path / "source.safetensors", tensors), tmp_path / "output.safetensors", recipe)
    sound, damaged = report.layers
    assert sound.relative_error > 0 and damaged.relative_error is None
    assert report.by_format()[0].mean_relative_error == sound.relative_error
    screen = Screen(out=terminal(100))
    screen.show(report_view(report))
    assert "1 layer holds NaN or infinity" in shown(screen.out)


def test_a_cast_of_nan_has_no_error_either(tmp_path):
    tensors = {"blocks.0.linear.weight": floats(64, 64), "blocks.0.norm.weight": of_values([1.0, np.nan, 0.3], "F32")}
    recipe = Recipe(FormatChoice("fp8"), cast="BF16", allow_nonfinite=True)
    report = streamquant.convert(save(tmp_path / "source.safetensors", tensors), tmp_path / "output.safetensors", recipe)
    assert {layer.key: layer.relative_error for layer in report.layers}["blocks.0.norm.weight"] is None
    screen = Screen(out=terminal(100))
    screen.show(report_view(report))
    assert "1 layer holds NaN or infinity" in shown(screen.out)


@pytest.mark.parametrize("width", [80, 100, None])
def test_the_tables_of_convert_have_whole_numbers_at_any_width(tmp_path, width):
    regex = "img_in|txt_in|final_layer|single_blocks"
    formats = {"bnb_nf4": FormatChoice("nf4"), "float8_e4m3fn_blockwise": FormatChoice("fp8", "block")}
    recipe = Recipe(formats["bnb_nf4"], custom_layers=regex, custom=formats["float8_e4m3fn_blockwise"])
    layers = [LayerResult(f"{name}.weight", name, "", None, 937_000_000, 348_600_000, 0.1265, "time sweep", 0.1298, 0.1266)
              for name in formats]  # fmt: skip
    report = Report([Path("o.safetensors")], "", layers, {}, 10**9, 5 * 10**8, 3.0, False, 2**27)
    names = ("single_blocks.0.linear1", "double_blocks.0.linear1")
    source = save(tmp_path / "source.safetensors", {f"{name}.weight": floats(256, 256) for name in names})
    plan, tiles, _ = dry_run(source, tmp_path / "o.safetensors", recipe)
    screen = Screen(out=terminal(width) if width else Console(file=io.StringIO()))
    screen.show(report_view(report))
    screen.show(plan_view(plan, tiles, 10**12, tmp_path / "o.safetensors"))
    told = shown(screen.out).splitlines()
    rows = [line.split("  ") for line in told if line.startswith(tuple(formats))]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        [name, "1", "937.0 MB", "348.6 MB", "0.1265", "0.1298 → 0.1266"] for name in formats
    ]
    assert any(re.search(r"base format .* bnb_nf4 +1 +131.1 kB +37\.\d kB *$", line) for line in told), told
    if width:
        assert all(len(line.rstrip()) <= width for line in told if str(tmp_path) not in line), told
    else:
        assert f"custom layers '{regex}'" in shown(screen.out), "in a log a name can be searched for"
