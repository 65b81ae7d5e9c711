"""The documents say what the results say; tables and pictures are of the rows that they should be of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import quality_results, report, results
from benchmarks.__main__ import main
from benchmarks.machine import REPOSITORY
from benchmarks.report import losses, marks, selection, tables
from benchmarks.report.equal_bytes import points
from benchmarks.results import Result

PEER = selection.PEER


def test_the_documents_say_what_the_results_say() -> None:
    assert list(report.stale()) == [], "run: python -m benchmarks report"


def test_every_picture_that_a_document_shows_is_there() -> None:
    for name in report.DOCUMENTS:
        document = REPOSITORY / name
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / picture).is_file(), f"{name} shows {picture}"


def test_parts_are_replaced_between_their_marks() -> None:
    text = "before\n<!-- report: a -->\nold\n<!-- /report: a -->\nbetween\n<!-- report: b -->\n<!-- /report: b -->\nafter\n"
    once = marks.filled(text, {"a": "new | 1\n", "b": "\\1 stays\n"})
    assert "old" not in once and "\nnew | 1\n" in once and "\n\\1 stays\n" in once
    assert once.startswith("before\n") and "\nbetween\n" in once and once.endswith("after\n")
    assert marks.filled(once, {"a": "new | 1\n", "b": "\\1 stays\n"}) == once
    with pytest.raises(ValueError, match="no such part: b"):
        marks.filled(text, {"a": ""})
    with pytest.raises(ValueError, match="begun and not ended"):
        marks.filled(text.replace("<!-- /report: a -->\n", ""), {"a": "", "b": ""})


def conversion(case: str, seconds: dict[str, float | None], source: str = "4GB", cache: str = "cold file") -> list[Result]:
    """One session: who took how long; None failed."""
    return [
        results.result(
            "convert", case, name, [] if took is None else [took], source=source, size_bytes=4 * 10**9, output_bytes=2 * 10**9,
            peak_anonymous_bytes=100 << 20, cache=cache, note="" if took is not None else "has no format for it",
        )
        for name, took in seconds.items()
    ]  # fmt: skip


def test_of_each_conversion_the_newest_complete_and_cold_session_is_shown() -> None:
    rows = [
        *conversion("fp8-tensor", {"cp": 9.0, "streamquant": 9.0, PEER: 90.0}),
        *conversion("fp8-tensor", {"cp": 4.0, "streamquant": 2.0, PEER: 50.0}),
        *conversion("fp8-tensor", {"cp": 1.0, "streamquant": 1.0}),
        *conversion("fp8-tensor", {"cp": 1.0, "streamquant": 1.0, PEER: None}),
        *conversion("fp8-tensor", {"cp": 1.0, "streamquant": 1.0, PEER: 7.0}, source="1GB"),
        *conversion("fp8-tensor", {"cp": 1.0, "streamquant": 1.0, PEER: 7.0}, cache="warm"),
        *conversion("nf4", {"cp": 4.0, "streamquant": 3.0, PEER: None}),
    ]
    lines = tables.conversion_table(rows).splitlines()
    assert lines[2] == "| FP8, tensor scale | 2.0 | 4.0 | 0.50 | 50 s, 100 MiB | 25.0 | 100 MiB |"
    assert lines[3] == "| NF4 | 3.0 | 4.0 | 0.75 | does not write it |  | 100 MiB |"
    assert rows[0].cpu in lines[-1] and rows[0].commit in lines[-1]


def test_formats_measured_at_several_sizes_are_shown_smallest_first() -> None:
    def sized(size: int, rows: list[Result]) -> list[Result]:
        return [replace(row, size_bytes=size) for row in rows]

    rows = [
        *sized(64 * 10**9, conversion("nf4", {"cp": None, "streamquant": 64.0}, source="flux2-dev-sparse")),
        *sized(10**9, conversion("nf4", {"cp": 4.0, "streamquant": 1.0, PEER: 9.0}, source="1GB")),
        *sized(10**9, conversion("nf4", {"cp": 4.0, "streamquant": 2.0, PEER: 8.0}, source="1GB")),
        *sized(10**9, conversion("nf4", {"cp": 4.0, "streamquant": 1.0}, source="1GB", cache="warm")),
        *conversion("fp8-tensor", {"cp": 1.0, "streamquant": 1.0}),
    ]
    lines = tables.size_table(rows).splitlines()[2:]
    assert lines[0] == "| NF4 | 1GB | 2.0 s | 2.00 GB | 0.50 | 8 s, 100 MiB | 100 MiB |"
    assert lines[1] == "| NF4 | flux2-dev | 64.0 s | 0.06 GB | sparse: no copy |  | 100 MiB |"
    assert lines[2] == ""


def killed(seconds: float, moments: dict[str, float], name: str = "streamquant", cache: str = "cold file") -> list[Result]:
    """One session of kills: the uninterrupted run's time; by moment the share that was lost, ten times that written again."""

    def row(metric: str, value: float, detail: str) -> Result:
        return results.result(
            "faults", "nf4", name, [value], source="1GB", metric=metric, detail=detail, output_bytes=10**8, cache=cache
        )

    rows = [row("seconds", seconds, "uninterrupted")]
    for moment, lost in moments.items():
        values = {"seconds": seconds / 2, "seconds lost": lost, "share lost": lost, "bytes written again": 1e7 * lost}
        rows += [row(metric, value, f"killed at {moment}") for metric, value in values.items()]
    return rows


def test_of_each_kill_the_newest_cold_session_is_shown_in_the_order_of_the_moments() -> None:
    rows = [
        *killed(9.0, {"10%": 0.9}, PEER), *killed(8.0, {"20%": 0.1}), *killed(4.0, {"5%": 0.3, "10%": 0.5}),
        *killed(1.0, {"5%": 0.1, "10%": 0.1}, cache="warm"),
    ]  # fmt: skip
    lines = tables.recovery_table(rows).splitlines()[2:5]
    assert lines == [
        "| streamquant | NF4 | killed at 5% | 4.0 s | 2.0 s | 0.3 s | 3.0 MB |  |",
        "| streamquant | NF4 | killed at 10% | 4.0 s | 2.0 s | 0.5 s | 5.0 MB |  |",
        f"| {PEER} | NF4 | killed at 10% | 9.0 s | 4.5 s | 0.9 s | everything |  |",
    ]


def test_kernels_stand_beside_the_fastest_other() -> None:
    seconds = {"plain torch": 0.4, "streamquant": 0.1, "slow 1": 0.9, "fast 2": 0.25}
    rows = [
        results.result("kernels", "nf4 6144x6144 bf16, 2 threads", name, [took], size_bytes=2 * 10**8)
        for name, took in seconds.items()
    ]
    assert "| NF4 | 1 billion | 2 GB | 4 x | 2.5 x (fast 2) |" in tables.kernel_table(rows)
    elsewhere = [replace(row, device="some GPU", p50=9.0) for row in rows]
    assert tables.kernel_table([*rows, *elsewhere]) == tables.kernel_table(rows), "the CPU's table is the CPU's"
    assert "FP4" not in tables.kernel_table(rows)


@pytest.fixture
def quality() -> list[Result]:
    """A thousand weights: ours in 8 bits, and rivals smaller and worse, as small and better, larger and better."""

    def cell(contender: str, format: str, error: float, size: int) -> Result:
        return quality_results.score(
            "2026", "MiniLM-L6", format, contender, "1 - cosine", error, size_bytes=2000, output_bytes=size
        )

    return [
        cell("streamquant no-data", "int8-row", 0.10, 1000),
        cell("streamquant sketch", "int8-row", 0.04, 1000),
        cell("streamquant rtn", "int8-row", 0.01, 1000),
        cell("small 1", "int4", 0.5, 500),
        cell("draw 1", "int8", 0.0995, 1000),
        cell("better 1", "int8", 0.08, 1005),
        cell("worse 1", "fp8", 0.2, 1100),
    ]


def test_losses_are_found_at_equal_bytes(quality: list[Result]) -> None:
    found = points(quality, "MiniLM-L6", "1 - cosine")
    assert {point.bits for point in found if point.method} == {8.0}
    assert not any(point.method == "rtn" for point in found), "ours are as they come, and calibrated"
    lost = {rival.contender: (mine, calibrated) for rival, mine, calibrated in losses.quality_losses(found)}
    assert list(lost) == ["small 1", "better 1"]
    assert lost["small 1"] == (None, None)
    assert [point.error for point in lost["better 1"]] == [0.10, 0.04]
    table = losses.quality_loss_table(quality)
    assert "| MiniLM-L6 | better 1 | int8 | 8.04 | 0.08 | 0.1 (int8-row, 8.00 bits) | 0.04 (int8-row, 8.00 bits) |" in table
    assert "nothing as small" in table


def test_synthetic_layers_are_judged_by_the_mean_of_their_output_errors() -> None:
    def cell(time: str, contender: str, error: float, detail: str = "", metric: str = "layer output error") -> Result:
        return quality_results.score(
            time, "synthetic Flux.2 layers", "nf4", contender, metric, error, detail=detail, size_bytes=2000, output_bytes=563
        )

    rows = [
        cell("2025-06-01", "streamquant no-data", 0.9),
        cell("2026-06-01", "streamquant no-data", 0.2),
        cell("2026-06-01", "streamquant no-data", 0.4, "a"),
        cell("2026-06-01", "streamquant no-data", 2.0, "a", "worst layer"),
        cell("2026-06-01", "streamquant sketch", 0.1),
        cell("2026-06-01", "torchao 0.18.0", 0.15),
        cell("2026-06-01", "torchao 0.18.0", 0.01, "a"),
    ]
    table = tables.quality_table(rows)
    assert table.startswith("synthetic Flux.2 layers, error of layer outputs, relative, geometric mean:\n")
    assert [line for line in table.splitlines() if line.startswith("| 4.5")] == [
        "| 4.50 | **streamquant**, calibrated | nf4 | 0.1 |",
        "| 4.50 | torchao 0.18.0 | nf4 | 0.15 |",
        "| 4.50 | **streamquant**, as it comes | nf4 | 0.2 |",
    ]
    assert rows[0].cpu in table and "2025" not in table, "what was measured anew counts no more"
    lost = losses.quality_loss_table(rows)
    assert "| synthetic Flux.2 layers | torchao 0.18.0 | nf4 | 4.50 | 0.15 | 0.2 (nf4, 4.50 bits) | 0.1 (nf4, 4.50 bits) |" in lost


def test_whoever_is_faster_is_named() -> None:
    rows = {"convert": conversion("nf4", {"cp": 2.0, "streamquant": 3.0})}
    rows["decode"] = [
        results.result("decode", "fp4 6144x6144 to bf16, 2 threads", name, [took], size_bytes=1)
        for name, took in {"fast 1": 0.5, "draw 1": 0.98, "streamquant": 1.0}.items()
    ]
    table = losses.speed_loss_table(lambda name: rows.get(name, []))
    assert "| a whole conversion to NF4 | cp | 2 | 3 | 1.50 |" in table and "| decoding FP4 | fast 1 | 0.5 | 1 | 2.00 |" in table
    assert "draw 1" not in table


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What is drawn, by the name of its file, kept open."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    from matplotlib import pyplot

    from benchmarks.report import style

    drawn: dict[str, object] = {}
    save = style.save
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.setdefault(path.name, figure) and save(figure, path))
    yield drawn
    pyplot.close("all")


def test_memory_beyond_what_was_measured_is_dashed_and_said(figures: dict, tmp_path: Path) -> None:
    from benchmarks.report import conversion_pictures

    def row(name: str, size: float, peak: float) -> Result:
        (one,) = conversion("fp8-tensor", {name: 1.0})
        return replace(one, size_bytes=int(size), peak_anonymous_bytes=int(peak))

    rows = [row("streamquant", size, 90 << 20) for size in (1e9, 4e9, 64e9)]
    rows += [row(PEER, size, 2e8 + 0.6 * size) for size in (1e9, 2e9, 4e9)]
    conversion_pictures.memory(rows, tmp_path / "memory.svg")
    (axis,) = figures["memory.svg"].axes
    (dashed,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert dashed.get_label() == "extrapolated, not measured"
    sizes, peaks = dashed.get_data()
    assert sizes[0] == 4e9 and np.allclose(peaks, 2e8 + 0.6 * sizes)
    assert "<dc:date>" not in (tmp_path / "memory.svg").read_text(), "the same results give the same file"


def test_recovery_has_a_bar_for_each_kill(figures: dict, tmp_path: Path) -> None:
    from benchmarks.report import conversion_pictures

    conversion_pictures.recovery([*killed(4.0, {"5%": 0.3, "10%": -0.1}), *killed(9.0, {"50%": 0.9}, PEER)], tmp_path / "recovery.svg")
    left, right = figures["recovery.svg"].axes
    assert [bar.get_width() for bar in left.patches] == pytest.approx([0.3, 0, 0.9]), "seconds"
    assert [bar.get_width() for bar in right.patches] == pytest.approx([3, 0]), "percent of the output; the peer starts again"


def test_of_each_number_of_tensors_the_newest_time_is_drawn(figures: dict, tmp_path: Path) -> None:
    from benchmarks.report import conversion_pictures

    rows = [
        results.result("tensors", f"{count} tensors", name, [took])
        for count, name, took in ((200, "plan", 2.0), (100, "plan", 9.0), (100, "open", 0.5), (100, "plan", 1.0))
    ]
    conversion_pictures.tensor_counts(rows, tmp_path / "tensors.svg")
    (axis,) = figures["tensors.svg"].axes
    drawn = {line.get_label(): [list(part) for part in line.get_data()] for line in axis.lines}
    assert drawn == {"plan": [[100, 200], [1.0, 2.0]], "open": [[100], [0.5]]}


def test_quality_has_a_mark_for_each_tool_and_format(figures: dict, quality: list[Result], tmp_path: Path) -> None:
    from benchmarks.report import quality_pictures, style

    known = [row for row in quality if row.contender.startswith("streamquant")]
    known += [replace(row, contender=f"torchao {i}") for i, row in enumerate(quality) if "streamquant" not in row.contender]
    quality_pictures.at_equal_bytes(known, tmp_path / "quality.svg")
    few, many = figures["quality.svg"].axes
    marks_of = [(line.get_color(), *line.get_data()[1]) for axis in (few, many) for line in axis.lines]
    ours, theirs = style.TOOLS["streamquant"]["color"], style.TOOLS["torchao"]["color"]
    assert sorted(marks_of) == sorted(
        [(ours, 0.1), (ours, 0.04), (theirs, 0.5), (theirs, 0.0995), (theirs, 0.08), (theirs, 0.2)]
    )
    assert len(few.lines) == 1, "4 bits are apart from 8"
    names = [text.get_text() for text in many.texts]
    assert names == ["fp8, torchao", "int8-row", "int8, torchao", "int8, torchao", "int8-row"], "from the largest error down"


def test_the_two_ways_of_one_tool_are_told_apart_in_the_picture(
    figures: dict, quality: list[Result], tmp_path: Path
) -> None:
    from benchmarks.report import quality_pictures

    ways = ("--simple", "learned")
    rows = [replace(quality[3 + i], contender=f"convert-to-quant 1.3.4 {way}", output_bytes=1000) for i, way in enumerate(ways)]
    quality_pictures.at_equal_bytes(rows, tmp_path / "quality.svg")
    names = [text.get_text() for text in figures["quality.svg"].axes[1].texts]
    assert names == ["int4, convert-to-quant --simple", "int8, convert-to-quant learned"]


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert report.pictures(lambda name: [], tmp_path) == []
    assert set(report.parts(lambda name: [])) == set().union(
        *(marks.names((REPOSITORY / name).read_text(encoding="utf-8")) for name in report.DOCUMENTS)
    )


def test_the_command_line_shows_and_checks() -> None:
    runner = CliRunner()
    shown = runner.invoke(main, ["show", "quality", "--last", "2"])
    assert shown.exit_code == 0 and shown.output
    wrong = runner.invoke(main, ["show", "beauty"])
    assert wrong.exit_code == 2 and "convert" in wrong.output
    assert runner.invoke(main, ["report", "--check"]).exit_code == 0
