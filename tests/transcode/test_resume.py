"""What a resume goes on from, what it refuses, and what damage it notices."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time

import pytest
from conversions import Watcher, files, hidden, interrupt, small_tiles, the_journal, the_partial  # noqa: F401
from small_checkpoints import EVERY_FORMAT, floats, sample, save, save_shards

import streamquant
from streamquant import FormatChoice, Recipe, errors
from streamquant.checkpoint.journal import Journal, read_records
from streamquant.checkpoint.reader import open_checkpoint
from streamquant.plan import plan
from streamquant.transcode import convert

pytestmark = pytest.mark.usefixtures("small_tiles")
RECIPE = EVERY_FORMAT["fp8-tensor"]
SHARDS = {"shard_size": 60_000}


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "source" / "m.safetensors", sample())


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.safetensors"


def whole(source, tmp_path, recipe=RECIPE, **options) -> dict[str, bytes]:
    """An uninterrupted run's files."""
    (tmp_path / "whole").mkdir()
    convert(source, tmp_path / "whole" / "out.safetensors", recipe, **options)
    return files(tmp_path / "whole")


@pytest.mark.parametrize("recipe", ["fp8-tensor", "int8-row", "nf4-double", "cast-bf16"])
@pytest.mark.parametrize("options", [{}, SHARDS], ids=["one file", "shards"])
def test_stopped_and_resumed(source, out, tmp_path, recipe, options):
    recipe = EVERY_FORMAT[recipe]
    expected = whole(source, tmp_path, recipe, **options)
    first = interrupt(source, out, recipe, 9, **options)
    assert out.name not in files(out.parent) and out.with_suffix(".safetensors.index.json").name not in files(out.parent)
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
    monkeypatch.setattr(TileReader, "tile", lambda self, tensor, *rest: read.add(tensor.name) or tile(self, tensor, *rest))
    convert(source, out, RECIPE, resume=True)
    units = plan(source, RECIPE).units
    assert read.isdisjoint(units[number].key for number in done)


def test_another_budget_io_and_thread_count_may_go_on(source, out, tmp_path, monkeypatch):
    from streamquant import budget

    expected = whole(source, tmp_path)
    interrupt(source, out, RECIPE, 11, threads=1, io="pread")
    monkeypatch.setattr(budget, "TARGET_TILE_BYTES", 1000)
    convert(source, out, RECIPE, resume=True, threads=3, io="mmap")
    assert files(out.parent) == expected


@pytest.mark.parametrize("options", [{}, SHARDS], ids=["one file", "shards"])
def test_resuming_what_is_complete_changes_nothing(source, out, options):
    convert(source, out, RECIPE, **options)
    before = {path: path.stat() for path in out.parent.iterdir()}
    watcher = Watcher()
    report = convert(source, out, RECIPE, resume=True, observer=watcher, **options)
    assert {path: path.stat() for path in out.parent.iterdir()} == before
    assert any("complete already" in note for note in watcher.notes) and watcher.tiles == 0
    assert report.outputs == [out.with_name(file.name) for file in plan(source, RECIPE, name=out.name, **options).files] + (
        [out.with_name("out.safetensors.index.json")] if options else []
    )


def test_resuming_with_nothing_begun_starts(source, out, tmp_path):
    watcher = Watcher()
    convert(source, out, RECIPE, resume=True, observer=watcher)
    assert files(out.parent) == whole(source, tmp_path)
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
        save(source, {name: floats(*t.shape, dtype=t.dtype, seed=99) if t.dtype[0] in "BF" else t for name, t in sample().items()})
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


def test_a_second_fresh_run_to_the_same_name_loses_nothing(source, out, tmp_path):
    """Both run; the first to end gets the name; the other's result is kept, and said to be."""
    expected = whole(source, tmp_path)

    def run_beside(tiles: int) -> None:
        if tiles == 5:
            convert(source, out, RECIPE)

    watcher = Watcher(run_beside)
    with pytest.raises(errors.OutputExistsError, match="complete result is kept"):
        convert(source, out, RECIPE, observer=watcher)
    assert files(out.parent) == expected
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
    expected = whole(source, tmp_path)
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


# -- damage


def resumed(source, out, **options) -> int:
    """Resume to the end; returns how many tiles were done again or for the first time."""
    watcher = Watcher()
    convert(source, out, RECIPE, resume=True, observer=watcher, **options)
    assert hidden(out.parent) == []
    return watcher.tiles


def test_a_torn_last_line(source, out, tmp_path):
    expected = whole(source, tmp_path)
    interrupt(source, out, RECIPE, 12)
    journal = the_journal(out.parent)
    os.truncate(journal, journal.stat().st_size - 7)
    resumed(source, out)
    assert files(out.parent) == expected


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_in_the_journal(source, out, tmp_path, seed):
    expected = whole(source, tmp_path)
    interrupt(source, out, RECIPE, 14)
    journal = the_journal(out.parent)
    raw = bytearray(journal.read_bytes())
    raw[random.Random(seed).randrange(raw.index(b"\n"), len(raw))] ^= 0x10
    journal.write_bytes(raw)
    resumed(source, out)
    assert files(out.parent) == expected


@pytest.mark.parametrize("content", [b"garbage\n", b"", b"\0" * 500])
def test_a_journal_that_is_none_beside_a_partial_file_is_refused(source, out, content):
    interrupt(source, out, RECIPE, 5)
    the_journal(out.parent).write_bytes(content)
    message = refused(source, out, RECIPE)
    assert "damaged or of another version" in message and the_partial(out.parent).exists()


def test_an_empty_journal_without_a_partial_file_is_a_run_that_never_began(source, out, tmp_path):
    (out.parent / ".out.safetensors.0123abcd.journal").touch()
    convert(source, out, RECIPE, resume=True)
    assert files(out.parent) == whole(source, tmp_path)


@pytest.mark.parametrize("seed", range(8))
def test_damage_after_the_last_durable_mark_is_noticed_and_done_again(source, out, tmp_path, monkeypatch, seed):
    """Bytes that the journal claims and the disk lost: a page that never arrived reads as zeros."""
    from streamquant import pour

    monkeypatch.setattr(pour, "SYNC_BYTES", 1 << 30)
    expected = whole(source, tmp_path)
    interrupt(source, out, RECIPE, 14)
    with the_partial(out.parent).open("r+b") as file:
        file.seek(random.Random(seed).randrange(file.seek(0, 2) - 3000))
        file.write(bytes(3000))
    resumed(source, out)
    assert files(out.parent) == expected


def test_units_under_a_durable_mark_are_not_read_again(source, out, monkeypatch):
    from streamquant import pour, session

    monkeypatch.setattr(pour, "SYNC_BYTES", 1)
    stop = threading.Event()
    # The sync runs beside the work; a little patience lets it come to an end before the run does.
    watcher = Watcher(lambda tiles: time.sleep(0.005) or (tiles == 30 and stop.set()))
    with pytest.raises(errors.InterruptedRunError):
        convert(source, out, RECIPE, observer=watcher, stop=stop)
    records = read_records(the_journal(out.parent))
    assert records.durable
    hashed = []
    hashes = session._hashes
    monkeypatch.setattr(session, "_hashes", lambda s, unit, end: hashed.append(unit.index) or hashes(s, unit, end))
    convert(source, out, RECIPE, resume=True)
    assert hashed and records.durable.isdisjoint(hashed)


def test_a_partial_file_that_is_gone_or_of_another_size(source, out):
    interrupt(source, out, RECIPE, 5)
    partial = the_partial(out.parent)
    os.truncate(partial, 100)
    assert "planned size" in refused(source, out, RECIPE)
    partial.unlink()
    assert "is gone" in refused(source, out, RECIPE)


def test_a_published_shard_that_was_replaced(source, out):
    stop = threading.Event()
    watcher = Watcher(lambda tiles: stop.set() if files(out.parent) else None)
    with pytest.raises(errors.InterruptedRunError):
        convert(source, out, RECIPE, observer=watcher, stop=stop, **SHARDS)
    for name, content in files(out.parent).items():
        out.with_name(name).write_bytes(b"x" * len(content))
    assert "not what the interrupted run wrote" in refused(source, out, RECIPE, **SHARDS)


def test_the_output_that_appeared_meanwhile_is_not_replaced(source, out, tmp_path):
    interrupt(source, out, RECIPE, 5)
    out.write_bytes(b"mine")
    with pytest.raises(errors.OutputExistsError):
        convert(source, out, RECIPE, resume=True)
    assert out.read_bytes() == b"mine"
    convert(source, out, RECIPE, resume=True, force=True)
    assert files(out.parent) == whole(source, tmp_path)


def test_a_stop_before_the_first_tile_and_one_after_the_last(source, out, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(errors.InterruptedRunError):
        convert(source, out, RECIPE, stop=stop)
    tiles = resumed(source, out)
    assert files(out.parent) == whole(source, tmp_path)
    out.unlink()
    interrupt(source, out, RECIPE, tiles - 1)
    resumed(source, out)
    assert files(out.parent) == files(tmp_path / "whole")


def test_a_bug_or_a_full_memory_keeps_what_was_written(source, out, tmp_path):
    """Whatever breaks off the work, hours of it are not thrown away."""

    def fail(tiles: int) -> None:
        if tiles == 9:
            raise MemoryError

    with pytest.raises(MemoryError):
        convert(source, out, RECIPE, observer=Watcher(fail))
    resumed(source, out)
    assert files(out.parent) == whole(source, tmp_path)


def test_a_sharded_source_is_resumed(tmp_path, out):
    tensors = sample()
    names = list(tensors)
    index = save_shards(tmp_path / "s", {n: tensors[n] for n in names[:5]}, {n: tensors[n] for n in names[5:]})
    expected = whole(index, tmp_path)
    interrupt(index, out, RECIPE, 12)
    resumed(index, out)
    assert files(out.parent) == expected


def test_a_resume_leaves_no_descriptor_open(source, out):
    interrupt(source, out, RECIPE, 5)
    out.write_bytes(b"taken")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(errors.OutputExistsError):
            convert(source, out, RECIPE, resume=True)
    assert len(os.listdir("/proc/self/fd")) == before
    Journal.reopen(the_journal(out.parent))[0].close()


_SLOW = """
import sys, time
sys.path[:0] = [{tests!r}, {repository!r}]
from small_checkpoints import EVERY_FORMAT
from streamquant import budget, pour
from streamquant.options import Silent
from streamquant.transcode import convert
budget.TARGET_TILE_BYTES, pour.SYNC_BYTES = 4096, 20_000
class Slow(Silent):
    def started(self, *_): print("started", flush=True)
    def progress(self, *_): time.sleep(0.02)
convert(sys.argv[1], sys.argv[2], EVERY_FORMAT["fp8-tensor"], observer=Slow(), resume=True)
"""


def test_killed_at_any_moment_of_wall_time(source, out, tmp_path):
    """A process of its own, killed from outside whenever it happens to be."""
    expected = whole(source, tmp_path)
    tests = os.path.dirname(os.path.dirname(__file__))
    code = _SLOW.format(tests=tests, repository=os.path.dirname(tests))
    for delay in (0.05, 0.3, 0.6):
        process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert files(out.parent) == {} and open_checkpoint(source).size
    resumed(source, out)
    assert files(out.parent) == expected
