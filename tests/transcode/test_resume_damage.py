"""What damage a resume notices, in the journal and in the partial files, and what it makes good."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time

import pytest
from conversions import Watcher, files, hidden, interrupt, the_journal, the_partial, whole
from small_checkpoints import EVERY_FORMAT, sample, save_shards

from streamquant import errors, pour, session
from streamquant.checkpoint.journal import Journal, read_records
from streamquant.transcode import convert

pytestmark = pytest.mark.usefixtures("small_tiles")
RECIPE = EVERY_FORMAT["fp8-tensor"]
SHARDS = {"shard_size": 60_000}


def refused(*arguments, **options) -> str:
    with pytest.raises(errors.ResumeError) as caught:
        convert(*arguments, resume=True, **options)
    return str(caught.value)


def resumed(source, out, **options) -> int:
    """Resume to the end; returns how many tiles were done again or for the first time."""
    watcher = Watcher()
    convert(source, out, RECIPE, resume=True, observer=watcher, **options)
    assert hidden(out.parent) == []
    return watcher.tiles


def test_a_torn_last_line(source, out, tmp_path):
    expected = whole(source, tmp_path, RECIPE)
    interrupt(source, out, RECIPE, 12)
    journal = the_journal(out.parent)
    os.truncate(journal, journal.stat().st_size - 7)
    resumed(source, out)
    assert files(out.parent) == expected


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_in_the_journal(source, out, tmp_path, seed):
    expected = whole(source, tmp_path, RECIPE)
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
    assert files(out.parent) == whole(source, tmp_path, RECIPE)


@pytest.mark.parametrize("seed", range(8))
def test_damage_after_the_last_durable_mark_is_noticed_and_done_again(source, out, tmp_path, monkeypatch, seed):
    """Bytes that the journal claims and the disk lost: a page that never arrived reads as zeros."""
    monkeypatch.setattr(pour, "SYNC_BYTES", 1 << 30)
    expected = whole(source, tmp_path, RECIPE)
    interrupt(source, out, RECIPE, 14)
    with the_partial(out.parent).open("r+b") as file:
        file.seek(random.Random(seed).randrange(file.seek(0, 2) - 3000))
        file.write(bytes(3000))
    resumed(source, out)
    assert files(out.parent) == expected


def test_units_under_a_durable_mark_are_not_read_again(source, out, monkeypatch):
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
    assert files(out.parent) == whole(source, tmp_path, RECIPE)


def test_a_stop_before_the_first_tile_and_one_after_the_last(source, out, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(errors.InterruptedRunError):
        convert(source, out, RECIPE, stop=stop)
    tiles = resumed(source, out)
    assert files(out.parent) == whole(source, tmp_path, RECIPE)
    out.unlink()
    interrupt(source, out, RECIPE, tiles - 1)
    resumed(source, out)
    assert files(out.parent) == files(tmp_path / "whole")


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, SystemExit, BrokenPipeError, ZeroDivisionError])
def test_whatever_breaks_off_the_work_what_was_written_is_kept(source, out, tmp_path, kind):
    """Hours of it are not thrown away for a bug, a full memory, a closed terminal."""

    def fail(tiles: int) -> None:
        if tiles == 9:
            raise kind

    with pytest.raises(kind):
        convert(source, out, RECIPE, observer=Watcher(fail))
    resumed(source, out)
    assert files(out.parent) == whole(source, tmp_path, RECIPE)


def test_a_sharded_source_is_resumed(tmp_path, out):
    tensors = sample()
    names = list(tensors)
    index = save_shards(tmp_path / "s", {n: tensors[n] for n in names[:5]}, {n: tensors[n] for n in names[5:]})
    expected = whole(index, tmp_path, RECIPE)
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
    expected = whole(source, tmp_path, RECIPE)
    tests = os.path.dirname(os.path.dirname(__file__))
    code = _SLOW.format(tests=tests, repository=os.path.dirname(tests))
    for delay in (0.05, 0.3, 0.6):
        process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert files(out.parent) == {}
    resumed(source, out)
    assert files(out.parent) == expected
