"""The report page: right numbers, nothing from outside, names as data, and a real browser that draws it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from small_checkpoints import floats, save

import streamquant
from streamquant import FormatChoice, Recipe, cli, errors
from streamquant.verify import verify

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

from streamquant.pages import prepare_page, write_conversion_page, write_verdict_page
from streamquant.pages.pictures import Point, blocks_and_kinds, error_against_size, heat_map
from streamquant.pages.samples import BINS, histogram, sample_layers

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = 'a"><script>alert(1)</script>$x^2$.0'


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    tensors = {f"blocks.{block}.{kind}.weight": floats(64, 128, seed=10 * block + number)
               for block in range(4) for number, kind in enumerate(("attn.qkv", "mlp.up"))}  # fmt: skip
    tensors |= {"img_in.weight": floats(64, 64), f"{NASTY}.weight": floats(64, 64), "norm.weight": floats(64)}
    save(folder / "source.safetensors", tensors)
    recipe = Recipe(FormatChoice("nf4"), custom_layers="img_in", custom=FormatChoice("fp8"))
    report = streamquant.convert(folder / "source.safetensors", folder / "output.safetensors", recipe)
    write_conversion_page(folder / "conversion", folder / "source.safetensors", report)
    verdict = verify(folder / "source.safetensors", folder / "output.safetensors")
    assert write_verdict_page(folder / "verdict", verdict) == folder / "verdict" / "report.html"
    return folder


def page(files: Path, kind: str = "verdict") -> str:
    return (files / kind / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["verdict", "conversion"])
def test_a_page_needs_nothing_beside_it(files, kind):
    text = page(files, kind)
    assert [entry.name for entry in (files / kind).iterdir()] == ["report.html"]
    assert "default-src 'none'" in text
    addresses = set(re.findall(r"https?://[^\s\"'<>;]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of vocabularies, not loaded"
    assert not re.search(r"\b(src|href)=[\"'](?!#)", re.sub(r"xlink:href", "", text)), (
        "no picture, script or style from elsewhere"
    )


def test_the_numbers_are_the_verdict_s(files):
    verdict = verify(files / "source.safetensors", files / "output.safetensors")
    text = page(files)
    for layer in verdict.layers:
        assert f"{layer.relative_error:.4f}" in text
    assert "sound" in text and f"{verdict.hashed[0]:,} of {verdict.hashes_known:,} hashes agree" in text
    recipe = json.loads(
        text[text.index("<pre>") + 5 : text.index("</pre>")].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">")
    )
    assert recipe["made by"]["recipe"]["custom_layers"] == "img_in"
    assert recipe["page written with"]["streamquant"] == streamquant.__version__


def test_names_are_data(files):
    text = page(files)
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text


def test_pictures_are_sound_svg_in_the_page_s_own_colour(files):
    pictures = re.findall(r"<svg.*?</svg>", page(files), flags=re.DOTALL)
    assert len(pictures) == 2
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "currentColor" in picture and "<image" not in picture and "#010203" not in picture


def test_blocks_and_kinds():
    points = [Point(f"x.{block}.{kind}", "f", block + number / 10, 1) for block in (3, 1) for number, kind in enumerate("ab")]
    points += [Point("head", "f", 9.0, 1), Point("x.7.a", "f", float("inf"), 1), Point("x.2.b", "f", 5.0, 1)]
    ((stack, (blocks, kinds, grid)),) = blocks_and_kinds(points).items()
    assert (stack, blocks, kinds) == ("x", [1, 2, 3], ["a", "b"])
    np.testing.assert_array_equal(grid, [[1.0, np.nan, 3.0], [1.1, 5.0, 3.1]])


def test_where_there_is_nothing_to_draw():
    assert heat_map([]) is None and error_against_size([]) is None
    assert heat_map([Point("head", "f", 0.1, 5)]) is None
    assert error_against_size([Point("x.0.a", "f", 0.0, 5), Point("x.1.a", "f", float("inf"), 5)]) is None
    equal = [Point(f"x.{block}.a", "f", 0.1, 5) for block in range(3)]
    assert heat_map(equal) and error_against_size(equal)


def test_histograms_count_every_value(files):
    samples = sample_layers(files / "source.safetensors", files / "output.safetensors")
    assert set(samples) == {
        f"{layer.key}" for layer in verify(files / "source.safetensors", files / "output.safetensors").layers
    }
    found = samples["blocks.0.attn.qkv.weight"]
    assert sum(found.weights.counts) == sum(found.errors.counts) == 64 * 128
    assert sum(found.scales.counts) == 64 * 128 // 64
    assert samples["img_in.weight"].scales is None, "one scale makes no histogram"
    values = np.array([-2.0, -1, 0, 1, 2, np.nan, np.inf])
    assert sum(histogram(values, True).counts) == 5 and len(histogram(values, True).counts) == BINS
    assert histogram(np.array([np.nan]), True) is None
    assert sum(histogram(np.zeros(7), False).counts) == sum(histogram(np.zeros(7), True).counts) == 7


def test_an_unsound_output_has_its_findings_on_the_page(tmp_path, files):
    other = save(tmp_path / "other.safetensors", {"img_in.weight": floats(64, 64, seed=77)})
    verdict = verify(other, files / "output.safetensors")
    text = write_verdict_page(tmp_path / "page", verdict).read_text(encoding="utf-8")
    assert "What is unsound" in text and "nothing tried explains how" in text


def test_verify_writes_a_page_on_request(tmp_path, files):
    arguments = ["verify", files / "source.safetensors", files / "output.safetensors", "--report", tmp_path / "new" / "page"]
    shown = CliRunner().invoke(cli.main, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert str(tmp_path / "new" / "page" / "report.html") in shown.stdout
    (tmp_path / "file").write_text("")
    refused = CliRunner().invoke(cli.main, list(map(str, [*arguments[:-1], tmp_path / "file" / "page"])))
    assert refused.exit_code == errors.DestinationWriteError.exit_code, refused.output


def test_a_page_that_cannot_be_written_is_told_before_the_conversion(tmp_path, files, monkeypatch):
    command = ["convert", files / "source.safetensors", "-o", tmp_path / "new.safetensors", "--simple", "--report"]
    (tmp_path / "file").write_text("")
    refused = CliRunner().invoke(cli.main, list(map(str, [*command, tmp_path / "file" / "page"])))
    assert refused.exit_code == errors.DestinationWriteError.exit_code, refused.output
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib", None)
        refused = CliRunner().invoke(cli.main, list(map(str, [*command, tmp_path / "page"])))
    assert refused.exit_code == errors.UsageError.exit_code and "pip install matplotlib" in refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing was converted"
    done = CliRunner().invoke(cli.main, list(map(str, [*command, tmp_path / "page"])))
    assert f"report  {tmp_path / 'page' / 'report.html'}" in done.stdout
    assert done.exit_code == 0 and [path.name for path in (tmp_path / "page").iterdir()] == ["report.html"], done.output


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to draw the page with")
def test_a_real_browser_draws_it(files, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    address = (files / "verdict" / "report.html").as_uri()
    dumped = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True).stdout
    place = dumped[dumped.index('id="histograms"') : dumped.index('id="samples"')]
    assert place.count("<figure>") == 3 and place.count("<rect") == 3 * BINS, "the script ran and drew three histograms"


@pytest.mark.parametrize("errors_", [(0.0062, 0.008), (0.02, 0.14), (0.1, 0.1), (1e-6, 2e-6), (0.001, 0.9)])
def test_the_picture_of_errors_has_labels_whatever_they_span(errors_):
    points = [Point(f"layer{index}", "nf4", error, 1000 * (index + 1)) for index, error in enumerate(errors_)]
    picture = error_against_size(points)
    axis = picture[picture.index("axis_2") : picture.index("relative error</text>")]
    labels = re.findall(r">([0-9.e−-]+)</text>", axis)
    assert len(set(labels)) == len(labels) >= 2, labels


def told(document: str, tmp_path: Path) -> Any:
    """What a script at the end of a page says by `tell`, in a real browser."""
    tell = """<script>function tell(value) {
      const said = document.createElement("pre");
      said.id = "told";
      said.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(value))));
      document.body.appendChild(said);
    }</script>"""
    driven = tmp_path / "driven.html"
    driven.write_text(document.replace("<body>", f"<body>{tell}", 1), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    dumped = subprocess.run([*command, driven.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(base64.b64decode(re.search(r'id="told">([^<]+)<', dumped)[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to draw the page with")
def test_a_click_on_a_cell_or_a_row_chooses_its_layer(files, tmp_path):
    driver = """<script>
      const choice = document.getElementById("layer"), clicked = [];
      document.querySelector("details").open = true;
      for (const about of document.querySelectorAll("[data-layer]")) {
        const inner = about.querySelector("td") || about;
        choice.selectedIndex = -1;
        document.getElementById("histograms").replaceChildren();
        inner.dispatchEvent(new MouseEvent("click", { bubbles: true }));
        clicked.push([about.tagName, about.dataset.layer, choice.options[choice.selectedIndex].textContent,
                      document.querySelectorAll("#histograms figure").length]);
      }
      tell(clicked);
    </script>"""
    clicked = told(page(files) + driver, tmp_path)
    layers = {f"blocks.{block}.{kind}" for block in range(4) for kind in ("attn.qkv", "mlp.up")}
    assert {asked for tag, asked, _, _ in clicked if tag == "path"} == layers
    assert {asked for tag, asked, _, _ in clicked if tag == "TR"} == layers | {"img_in", NASTY}
    assert all(asked == chosen and figures >= 2 for _, asked, chosen, figures in clicked), clicked


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to draw the page with")
@pytest.mark.parametrize("stack", ["blocks", "model.diffusion_model.transformer.double_stream_blocks", "m" * 300])
@pytest.mark.parametrize("blocks", [2, 40])
def test_nothing_in_the_heat_map_covers_anything_else(tmp_path, stack, blocks):
    points = [Point(f"{stack}.{block}.{kind}", "nf4", 0.1 + block / 100, 100) for block in range(blocks) for kind in "abcdef"]
    points += [Point(f"{stack}.single.{block}.{kind}", "nf4", 0.2, 100) for block in range(3) for kind in ("linear1", "w" * 90)]
    driver = """<script>
      const parts = [...document.querySelectorAll("svg text"), ...document.querySelectorAll("svg [id^=QuadMesh], svg [id^=stack]")];
      tell(parts.map((part) => { const box = part.getBoundingClientRect();
        return [part.textContent.trim().slice(0, 60) || part.id, box.left, box.top, box.right, box.bottom]; }));
    </script>"""
    boxes = told(f"<!doctype html><meta charset=utf-8><body>{heat_map(points)}{driver}", tmp_path)
    assert len(boxes) > 12
    for place, (name, left, top, right, bottom) in enumerate(boxes):
        for other, left2, top2, right2, bottom2 in boxes[:place]:
            apart = min(right, right2) - max(left, left2) <= 1 or min(bottom, bottom2) - max(top, top2) <= 3
            assert apart, (name, other)


def test_cells_name_their_layers_whatever_is_missing_between_them():
    points = [Point(f"x.{block}.{kind}", "f", 0.1 * (1 + block), 1) for block, kind in [(0, "a"), (1, "b"), (2, "a"), (2, "b")]]
    points.append(Point("x.1.a", "f", 0.0, 1))
    tree = ElementTree.fromstring(heat_map(points))
    cells = [cell for cell in tree.iter() if "data-layer" in cell.attrib]
    assert {cell.attrib["data-layer"] for cell in cells} == {point.name for point in points}
    shown = {cell.attrib["data-layer"]: cell[0].text for cell in cells}
    assert shown["x.2.b"] == "x.2.b: 0.3" and shown["x.1.a"] == "x.1.a: 0"
    places = {cell.attrib["data-layer"]: re.match(r"M ([\d.]+) ([\d.]+)", cell.attrib["d"]).groups() for cell in cells}
    assert places["x.0.a"][1] == places["x.2.a"][1] and places["x.2.a"][0] == places["x.2.b"][0], "a kind is a row"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to draw the page with")
def test_choosing_a_layer_in_a_real_browser_draws_its_histograms(files, tmp_path):
    """Every layer that can be chosen is chosen in turn, by the event that a person's choice makes."""
    driver = """<script>
      const layer = document.getElementById("layer"), chosen = [];
      for (const option of layer.options) {
        layer.value = option.value;
        layer.dispatchEvent(new Event("change", { bubbles: true }));
        const heights = [...document.querySelectorAll("#histograms figure")].map((figure) =>
          [...figure.querySelectorAll("rect")].map((bar) => Number(bar.getAttribute("height"))));
        chosen.push([option.textContent, heights]);
      }
      tell(chosen);
    </script>"""
    chosen = told(page(files) + driver, tmp_path)
    samples = json.loads(re.search(r'id="samples">(.*?)</script>', page(files), re.DOTALL)[1])
    assert len(chosen) == len(samples) > 2
    for (_, figures), sample in zip(chosen, samples, strict=True):
        drawn = [sample["weights"], sample["errors"], *([sample["scales"]] if sample["scales"] else [])]
        assert len(figures) == len(drawn)
        for heights, found in zip(figures, drawn, strict=True):
            assert heights == pytest.approx([120 * count / max(found["counts"]) for count in found["counts"]])


def test_a_folder_that_cannot_be_made_is_told_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.DestinationWriteError, match="mend the cause, or name another folder with --report") as caught:
        prepare_page(tmp_path / "file" / "page")
    assert "resume" not in str(caught.value)
