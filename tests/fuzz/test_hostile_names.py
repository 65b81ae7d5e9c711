"""One checkpoint whose names, metadata, recipe and own file name are hostile, driven through every command.

What reaches the screen holds no control characters, nothing invisible or reordering, and no markup that rich has taken for its own;
--json is one JSON document a line; a report page has no element, attribute or script that a name has put there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fuzz.safe import is_safe
from small_checkpoints import Tensor, floats, of_values, save

from streamquant.pages.page import POLICY

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066\x00\r\b"
MARKUP = "[red]x[/red][link=https://evil.example]y[/link]\\[bold]"
HTML = "</script></pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'`&<!--"
LAYERS = [f"blocks.{n}.{text}" for n in range(2) for text in (ESCAPES, MARKUP, HTML)] + ["blocks.1." + "9" * 5000]
FILE = "\x1b[31m[red]\u202e<img src=x onerror=alert(1)> \"'$(touch x);.safetensors"
METADATA = {"modelspec.title": ESCAPES + MARKUP + HTML, MARKUP: HTML, ESCAPES: "x", HTML: "</script>"}


def hostile(folder: Path) -> Path:
    tensors = {f"{layer}.weight": floats(64, 64, seed=number) for number, layer in enumerate(LAYERS)}
    tensors |= {f"{ESCAPES}{MARKUP}{HTML}.bias": floats(8), "deep." * 3000 + "x": floats(2)}
    return save(folder / FILE, tensors, METADATA)


def quantized(folder: Path) -> Path:
    """Markers, recipes and formats that say hostile things."""
    codes = Tensor("F8_E4M3", (64, 64), bytes(range(64)) * 64)
    marker = json.dumps({"format": f"float8_e4m3fn{ESCAPES}{MARKUP}{HTML}"}).encode()
    entry = {"version": ESCAPES, "recipe": {"base": {"format": MARKUP + ESCAPES, "rounding": HTML}, "custom_layers": ESCAPES + HTML,
             "preset": [ESCAPES]}, "source": [{"name": ESCAPES + MARKUP}]}  # fmt: skip
    tensors = {}
    for layer in LAYERS:
        tensors |= {f"{layer}.weight": codes, f"{layer}.weight_scale": of_values(np.full(64, 0.01), "F32"),
                    f"{layer}.comfy_quant": Tensor("U8", (len(marker),), marker)}  # fmt: skip
    return save(folder / f"q{FILE}", tensors, METADATA | {"streamquant": json.dumps(entry)})


def calibration(folder: Path) -> Path:
    tensors = {}
    for layer in LAYERS:
        tensors |= {f"{layer}.count": Tensor("I64", (), (9).to_bytes(8, "little")), f"{layer}.mean": of_values(np.full(64, 3e38), "F32"),
                    f"{layer}.diagonal": of_values(np.full(64, 3e38), "F32"), f"{layer}.hessian": of_values(np.eye(64), "F32")}  # fmt: skip
    meta = {"format": "streamquant-calibration", "version": "1", "kind": "dense", "seed": "0", "keys": "module"}
    return save(folder / f"c{FILE}", tensors, meta)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    hostile(folder), quantized(folder), calibration(folder)
    done = run(folder, "convert", FILE, "--preset", "none", "-o", f"out{FILE}", "--rtn", "--threads", "1")
    assert done.returncode == 0, done.stderr
    return folder


def run(folder: Path, *arguments: str, columns: int = 100) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": str(columns), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run([sys.executable, "-m", "streamquant", *arguments], cwd=folder, env=environment, capture_output=True)


SOURCE, QUANTIZED, CALIBRATION, OUTPUT = FILE, f"q{FILE}", f"c{FILE}", f"out{FILE}"
PLAIN = ["--preset", "none", "--rtn", "--threads", "1"]
COMMANDS = {
    "convert": ["convert", SOURCE, *PLAIN, "-o", "a.safetensors", "--force"],
    "convert, learned": ["convert", SOURCE, "--preset", "none", "--int8", "--calibration", CALIBRATION, "-o", "b.safetensors", "--force"],
    "convert, shards": ["convert", SOURCE, *PLAIN, "-o", f"s{FILE}", "--shard-size", "20kB", "--force"],
    "convert a quantized one": ["convert", QUANTIZED, "-o", "c.safetensors"],
    "dry run": ["convert", SOURCE, *PLAIN, "--dry-run", "--custom-layers", r"\x1b|red|script", "--custom-type", "int8"],
    "dry run with heur": ["convert", SOURCE, *PLAIN, "--dry-run", "--fp8", "--scaling-mode", "block", "--heur"],
    "pattern": ["convert", SOURCE, "--exclude-layers", f"({ESCAPES.replace(chr(0), '')}", "--dry-run"],
    "pattern finds none": ["convert", SOURCE, "--exclude-layers", "\x1b[3]nothing", "--dry-run"],
    "inspect": ["inspect", SOURCE, QUANTIZED, OUTPUT], "inspect --layers": ["inspect", "--layers", SOURCE, QUANTIZED],
    "inspect --tree": ["inspect", "--tree", SOURCE, QUANTIZED], "inspect what is missing": ["inspect", f"missing{FILE}"],
    "inspect, long name": ["inspect", "n\x1b" * 400], "verify": ["verify", SOURCE, OUTPUT, "--layers"], "verify wrong": ["verify", SOURCE, QUANTIZED],
    "compare": ["compare", OUTPUT, SOURCE, "--source", SOURCE, "--layers"], "compare folded": ["compare", QUANTIZED, OUTPUT],
    "dequantize": ["dequantize", OUTPUT, "--force"], "dequantize a foreign one": ["dequantize", QUANTIZED, "-o", "d.safetensors", "--force"],
    "calibration inspect": ["calibration", "inspect", CALIBRATION], "calibration of another": ["calibration", "inspect", SOURCE],
    "calibration merge": ["calibration", "merge", CALIBRATION, CALIBRATION, "-o", f"m{FILE}", "--force"],
    "output exists": ["convert", SOURCE, *PLAIN, "-o", OUTPUT], "no such option": ["convert", "--\x1b[31m"],
    "no such command": ["\x1b[31mconvert"], "too many arguments": ["convert", SOURCE, QUANTIZED],
    "layer config": ["convert", SOURCE, "--layer-config", f"missing{FILE}"], "preset": ["convert", SOURCE, "--preset", "\x1b[31m"],
    "device": ["convert", SOURCE, *PLAIN, "--device", "\x1b[31m"], "comfyui-install": ["comfyui-install", f"missing{FILE}"],
    "no folder": ["convert", SOURCE, *PLAIN, "-o", f"no{FILE}/x.safetensors"], "long output": ["convert", SOURCE, *PLAIN, "-o", "\x1bo" * 300],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_hostile_reaches_the_screen(folder, name):
    done = run(folder, *COMMANDS[name], columns=80)
    for output in (done.stdout, done.stderr):
        text = output.decode("utf-8")
        assert is_safe(text), ascii(text)[:2000]
        assert "Traceback" not in text and "Warning" not in text, text[-3000:]
    assert done.returncode in (0, 2, 4, 5, 7, 8, 9, 10, 11), done.stderr


@pytest.mark.parametrize("name", ["inspect", "verify", "compare"])
def test_markup_is_shown_and_not_obeyed(folder, name):
    shown = run(folder, *COMMANDS[name], columns=4000).stdout.decode()
    assert "[red]x[/red]" in shown and "\\x1b]0;owned" in shown


JSON = ["convert", "convert, learned", "convert a quantized one", "dry run", "inspect", "verify", "verify wrong", "compare", "dequantize",
        "calibration inspect", "calibration of another", "calibration merge", "inspect what is missing", "output exists"]  # fmt: skip


@pytest.mark.parametrize("name", JSON)
def test_json_stays_one_document_a_line(folder, name):
    options = [option for option in COMMANDS[name] if option != "--layers"]
    done = run(folder, *options, "--json")
    lines = done.stdout.decode("ascii").splitlines()
    assert lines
    for line in lines:
        found = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert isinstance(found, dict) and found["event"]


class Page(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts.append(data)


@pytest.mark.parametrize("command", [["verify", SOURCE, OUTPUT], ["verify", SOURCE, QUANTIZED], ["convert", SOURCE, *PLAIN, "-o", f"r{FILE}", "--force"]])
def test_nothing_hostile_is_on_a_report_page(folder, tmp_path, command):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    done = run(folder, *command, "--report", str(tmp_path / "report"))
    assert done.returncode in (0, 11) and b"Traceback" not in done.stderr, done.stderr
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert is_safe(text)
    page = Page()
    page.feed(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "iframe", "object", "embed", "link", "base", "form", "a"}, tags
    assert sum(tag == "script" for tag, _ in page.elements) <= 2 and not any("alert" in script for script in page.scripts)
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("src", "action", "formaction", "srcdoc") for name in attributes), (tag, attributes)
        assert all("javascript:" not in (value or "") for value in attributes.values())
        for value in (attributes.get(name) for name in ("href", "xlink:href")):
            assert value is None or value.startswith("#"), (tag, attributes)
    assert POLICY in text and "default-src 'none'" in POLICY
