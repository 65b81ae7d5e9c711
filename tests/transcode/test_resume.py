"""What a resume goes on from, and what it refuses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conversions import Watcher, files, hidden, interrupt, the_journal, whole
from small_checkpoints import EVERY_FORMAT, floats, sample, save

import streamquant
from streamquant import FormatChoice, Recipe, errors
from streamquant.checkpoint.journal import read_records
from streamquant.plan import plan
from streamquant.transcode import convert

pytestmark = pytest.mark.usefixtures("small_tiles")
RECIPE = EVERY_FORMAT["fp8-tensor"]
SHARDS = {"shard_size": 60_000}


@pytest.mark.parametrize("recipe", ["fp8-tensor", "int8-row", "nf4-double", "cast-bf16"])
@pytest.mark.parametrize("options", [{}, SHARDS], ids=["one file", "shards"])
def test_stopped_and_resumed(source, out, tmp_path, recipe, options):
    recipe = EVERY_FORMAT[recipe]
    expected = whole(source, tmp_path, recipe, **options)
    first = interrupt(source, out, recipe, 9, **options)
    assert out.name not in files(out.parent) and out.with_suffix(".safetensors.index.json").name not in files(
        out.parent
    )
    watcher = Watcher()
    report = convert(source, out, recipe, resume=True, observer=watcher, **options)
    assert files(out.parent) == expected and hidden(out.parent) == []
    assert report.resumed and any("Resuming" in note for note in watcher.notes)
    assert watcher.done_bytes > 0
    # A resume that takes up a unit in the middle reports that part as one step.
    assert watcher.tiles < first.tiles + 60


def test_a_resumed_run_reports_every_layers_error(source, out, tmp_path):
    (tmp_path / "whole").mkdir()
    straight = convert(source, tmp_path / "whole" / "out.safetensors", RECIPE)
    interrupt(source, out, RECIPE, 12)
    resumed = convert(source, out, RECIPE, resume=True)
    assert not straight.resumed
    assert [layer.relative_error for layer in resumed.layers] == pytest.approx(
        [layer.relative_error for layer in straight.layers]
    )


def test_work_that_is_done_is_not_done_again(source, out, monkeypatch):
    """Only the unit in hand is read again from where its last tile was journaled."""
    from streamquant.checkpoint.reader import TileReader

    interrupt(source, out, RECIPE, 14)
    done = {unit for unit, record in read_records(the_journal(out.parent)).units.items() if "hashes" in record}
    assert done
    read, tile = set(), TileReader.tile
    monkeypatch.setattr(
        TileReader, "tile", lambda self, tensor, *rest: read.add(tensor.name) or tile(self, tensor, *rest)
    )
    convert(source, out, RECIPE, resume=True)
    units = plan(source, RECIPE).units
    assert read.isdisjoint(units[number].key for number in done)


def test_another_budget_io_and_thread_count_may_go_on(source, out, tmp_path, monkeypatch):
    from streamquant import budget

    expected = whole(source, tmp_path, RECIPE)
    interrupt(source, out, RECIPE, 11, threads=1, io="pread")
    monkeypatch.setattr(budget, "TARGET_TILE_BYTES", 1000)
    convert(source, out, RECIPE, resume=True, threads=3, io="mmap")
    assert files(out.parent) == expected


def identities(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when a file is written or replaced; being read changes none of it."""
    found = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found.items()}


@pytest.mark.parametrize("options", [{}, SHARDS], ids=["one file", "shards"])
def test_resuming_what_is_complete_changes_nothing(source, out, options):
    convert(source, out, RECIPE, **options)
    before = identities(out.parent)
    watcher = Watcher()
    report = convert(source, out, RECIPE, resume=True, observer=watcher, **options)
    assert identities(out.parent) == before
    assert any("complete already" in note for note in watcher.notes) and watcher.tiles == 0
    assert report.outputs == [
        out.with_name(file.name) for file in plan(source, RECIPE, name=out.name, **options).files
    ] + ([out.with_name("out.safetensors.index.json")] if options else [])


def test_resuming_with_nothing_begun_starts(source, out, tmp_path):
    watcher = Watcher()
    convert(source, out, RECIPE, resume=True, observer=watcher)
    assert files(out.parent) == whole(source, tmp_path, RECIPE)
    assert any("nothing to resume" in note for note in watcher.notes)


@pytest.mark.parametrize("damage", ["truncated", "other weights", "other recipe", "no index"])
def test_what_is_not_the_complete_output_is_not_taken_for_it(source, out, damage):
    """The name is taken by something else: that is refused, as without --resume."""
    options = SHARDS if damage == "no index" else {}
    convert(source, out, RECIPE, **options)
    if damage == "truncated":
        os.truncate(out, out.stat().st_size - 1)
    elif damage == "other weights":
        # The same names and shapes: every header is the same, only the weights are not.
        save(
            source,
            {
                name: floats(*t.shape, dtype=t.dtype, seed=99) if t.dtype[0] in "BF" else t
                for name, t in sample().items()
            },
        )
    elif damage == "no index":
        out.with_name("out.safetensors.index.json").unlink()
    recipe = EVERY_FORMAT["int8-row"] if damage == "other recipe" else RECIPE
    with pytest.raises(errors.OutputExistsError):
        convert(source, out, recipe, resume=True, **options)


# -- what a resume refuses


def refused(*arguments, **options) -> str:
    with pytest.raises(errors.ResumeError) as caught:
        convert(*arguments, resume=True, **options)
    assert caught.value.exit_code == 9
    return str(caught.value)


def test_another_source_is_named(source, out):
    interrupt(source, out, RECIPE, 5)
    save(source, sample() | {"z.weight": floats(2, 2)})
    message = refused(source, out, RECIPE)
    assert "source.0.header_sha256 was" in message and "source.0.size was" in message
    assert hidden(out.parent), "the interrupted run must stay"


def test_the_same_source_written_again_is_another(source, out):
    interrupt(source, out, RECIPE, 5)
    os.utime(source, ns=(1, 1))
    assert "source.0.mtime_ns was" in refused(source, out, RECIPE)


def test_another_recipe_is_named(source, out):
    interrupt(source, out, RECIPE, 5)
    message = refused(source, out, Recipe(FormatChoice("fp8"), exclude_layers="qkv"))
    assert 'recipe.exclude_layers was null, is "qkv"' in message


def test_other_shards_are_named(source, out):
    interrupt(source, out, RECIPE, 5)
    assert "output.files.0" in refused(source, out, RECIPE, **SHARDS)


def test_another_version_is_named(source, out, monkeypatch):
    interrupt(source, out, RECIPE, 5)
    monkeypatch.setattr(sys.modules["streamquant.plan"], "__version__", "99.0")
    message = refused(source, out, RECIPE)
    assert f'streamquant was "{streamquant.__version__}", is "99.0"' in message


def test_another_device_class_is_named(source, out, monkeypatch):
    import streamquant.transcode

    interrupt(source, out, RECIPE, 5)
    monkeypatch.setattr(streamquant.transcode, "device_class", lambda device: "cuda sm_90")
    assert 'device was "cpu", is "cuda sm_90"' in refused(source, out, RECIPE)


def test_a_live_run_cannot_be_resumed_beside_itself(source, out):
    """In another process, as it would be; within one, the lock is the same."""
    seen = []

    def resume_too(tiles: int) -> None:
        if tiles == 5:
            seen.append(refused(source, out, RECIPE))

    convert(source, out, RECIPE, observer=Watcher(resume_too))
    assert "Another process" in seen[0] and hidden(out.parent) == []


@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}, {"force": True, **SHARDS}], ids=str)
def test_a_second_run_to_the_same_name_refuses(source, out, tmp_path, options):
    """Shards of two runs must never mix, and one output is enough: also under another spelling of the folder."""
    expected = whole(source, tmp_path, RECIPE)
    (tmp_path / "link").symlink_to(out.parent)
    other = EVERY_FORMAT["nf4"]
    spellings = [out, tmp_path / "link" / out.name, out.parent / ".." / out.parent.name / out.name]
    refusals = []

    def run_beside(tiles: int) -> None:
        if tiles == 5:
            for name in spellings:
                with pytest.raises((errors.PreflightError, errors.ResumeError)) as caught:
                    convert(source, name, other, **options)
                refusals.append(str(caught.value))

    convert(source, out, RECIPE, observer=Watcher(run_beside))
    assert files(out.parent) == expected and hidden(out.parent) == []
    assert len(refusals) == 3
    if "resume" not in options:
        assert all("is running: wait for it" in text for text in refusals)


def test_an_interrupted_run_is_not_resumed_beside_a_live_one(source, out, tmp_path):
    interrupt(source, out, EVERY_FORMAT["nf4"], 5)

    def run_beside(tiles: int) -> None:
        if tiles == 5:
            with pytest.raises(errors.PreflightError, match="is running"):
                convert(source, out, EVERY_FORMAT["nf4"], resume=True)

    convert(source, out, RECIPE, observer=Watcher(run_beside))
    assert len(hidden(out.parent)) == 2, "what was interrupted is kept"
    out.unlink()
    convert(source, out, EVERY_FORMAT["nf4"], resume=True)
    assert hidden(out.parent) == []


def test_an_output_that_appears_meanwhile_is_kept_and_so_is_the_result(source, out, tmp_path):
    expected = whole(source, tmp_path, RECIPE)
    with pytest.raises(errors.OutputExistsError, match="complete result is kept"):
        convert(source, out, RECIPE, observer=Watcher(lambda tiles: out.write_bytes(b"mine") if tiles == 5 else None))
    assert out.read_bytes() == b"mine"
    out.rename(tmp_path / "elsewhere")
    watcher = Watcher()
    convert(source, out, RECIPE, resume=True, observer=watcher)
    assert files(out.parent) == expected and watcher.tiles == 0


# -- several interrupted runs


def test_an_interrupted_run_is_mentioned_to_the_next(source, out):
    interrupt(source, out, RECIPE, 5)
    journal = the_journal(out.parent).name
    watcher = Watcher()
    convert(source, out, EVERY_FORMAT["nf4"], observer=watcher)
    assert any(journal in note and "--resume" in note for note in watcher.notes)
    assert journal in hidden(out.parent)


def test_of_two_interrupted_runs_the_one_with_this_recipe_goes_on(source, out, tmp_path):
    expected = whole(source, tmp_path, RECIPE)
    interrupt(source, out, RECIPE, 9)
    mine = the_journal(out.parent)
    interrupt(source, out, EVERY_FORMAT["nf4"], 5)
    os.utime(mine, ns=(1, 1))
    watcher = Watcher()
    convert(source, out, RECIPE, resume=True, observer=watcher)
    assert files(out.parent) == expected and not mine.exists() and watcher.done_bytes > 0
    assert len(hidden(out.parent)) == 2, "the other run is still there to be resumed"


def test_another_interrupted_run_does_not_hide_that_this_one_is_complete(source, out):
    interrupt(source, out, EVERY_FORMAT["nf4"], 5)
    convert(source, out, RECIPE)
    watcher = Watcher()
    convert(source, out, RECIPE, resume=True, observer=watcher)
    assert any("complete already" in note for note in watcher.notes)
