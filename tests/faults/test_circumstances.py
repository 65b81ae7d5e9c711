"""What happens around a conversion: other conversions, sources and folders that go, odd names, clocks, odd journals."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conversions import Watcher, hidden
from faults.scenarios import TILES, make_sources
from small_checkpoints import EVERY_FORMAT, floats, save

from streamquant import budget, errors, pour
from streamquant.transcode import convert

RECIPE = EVERY_FORMAT["fp8-tensor"]
COMMAND = [sys.executable, "-m", "streamquant"]
FLAGS = ["--fp8", "--rtn", "--preset", "none"]


def meanwhile(act, tiles: int = 5) -> Watcher:
    """Does something when so many tiles are done."""
    return Watcher(lambda done: act() if done == tiles else None)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(budget, "TARGET_TILE_BYTES", 4096)
    monkeypatch.setattr(pour, "SYNC_BYTES", 16_000)


@pytest.fixture
def source(tmp_path) -> Path:
    return make_sources(tmp_path / "source")[0]


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.safetensors"


@pytest.fixture
def expected(source, tmp_path) -> bytes:
    (tmp_path / "whole").mkdir()
    convert(source, tmp_path / "whole" / "out.safetensors", RECIPE)
    return (tmp_path / "whole" / "out.safetensors").read_bytes()


def interrupt(source: Path, out: Path, tiles: int = 8, recipe=RECIPE) -> Path:
    """Break a conversion off at once, where `conversions.interrupt` lets it come to a stop; returns its journal."""

    def stop():
        raise KeyboardInterrupt

    before = set(out.parent.glob(".*.journal"))
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, recipe, observer=meanwhile(stop, tiles))
    (journal,) = set(out.parent.glob(".*.journal")) - before
    return journal


# -- other conversions


def test_many_conversions_started_at_once(tmp_path):
    """However they meet, one file comes out, of one of them, and those that refuse leave nothing."""
    source = save(tmp_path / "m.safetensors", {f"l{n}.weight": floats(512, 512, seed=n) for n in range(8)})
    out = tmp_path / "out.safetensors"
    (tmp_path / "link").symlink_to(tmp_path)
    flags = [["--fp8"], ["--bnb-4bit"], ["--int8"]]
    wholes = []
    for number, flag in enumerate(flags):
        convert_by = [*COMMAND, "convert", str(source), *flag, "--rtn", "--preset", "none", "-q"]
        subprocess.run([*convert_by, "-o", str(tmp_path / f"whole{number}.safetensors")], check=True)
        wholes.append((tmp_path / f"whole{number}.safetensors").read_bytes())
    names = [out, tmp_path / "link" / out.name, tmp_path / "link" / ".." / tmp_path.name / out.name]
    running = [
        subprocess.Popen(
            [*COMMAND, "convert", str(source), *flag, "--rtn", "--preset", "none", "--force", "-q", "-o", str(name)],
            stderr=subprocess.PIPE, text=True,
        )
        for flag, name in zip(flags, names, strict=True)
    ]  # fmt: skip
    told = [process.communicate()[1] for process in running]
    codes = [process.returncode for process in running]
    assert set(codes) <= {0, 4}, told
    assert all("is running" in text for text, code in zip(told, codes, strict=True) if code), told
    assert hidden(tmp_path) == []
    if 0 in codes:
        assert out.read_bytes() in [whole for whole, code in zip(wholes, codes, strict=True) if code == 0]
    else:
        assert not out.exists()


# -- sources and folders that go


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("how", ["delete", "replace"])
def test_a_source_whose_name_goes_while_it_is_read(source, out, expected, io, how):
    """What is open stays; the output is that of the file that was opened."""

    def go():
        if how == "delete":
            source.unlink()
        else:
            save(source.with_name("new"), {"other": floats(4, 4)}).replace(source)

    convert(source, out, RECIPE, observer=meanwhile(go), io=io)
    assert out.read_bytes() == expected


def test_a_resume_with_the_source_replaced_is_refused(source, out):
    interrupt(source, out)
    other = source.with_name("new")
    shutil.copy(source, other)  # the same header and size, but another time
    with other.open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"changed!")
    other.replace(source)
    with pytest.raises(errors.ResumeError, match="mtime_ns was"):
        convert(source, out, RECIPE, resume=True)


@pytest.mark.parametrize("how", ["remove", "rename"])
@pytest.mark.parametrize("tiles", [1, 5, 15])
def test_a_destination_folder_that_goes(source, out, tmp_path, how, tiles):
    def go():
        shutil.rmtree(out.parent) if how == "remove" else out.parent.rename(tmp_path / "elsewhere")

    with pytest.raises(errors.DestinationWriteError, match="No such file") as caught:
        convert(source, out, RECIPE, observer=meanwhile(go, tiles))
    assert caught.value.exit_code == 7 and not out.parent.exists()
    if how == "rename":  # put back, it goes on
        (tmp_path / "elsewhere").rename(out.parent)
        convert(source, out, RECIPE, resume=True)
        assert hidden(out.parent) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom a read-only folder stops")
def test_a_read_only_folder(source, out):
    out.parent.chmod(0o500)
    with pytest.raises(errors.PreflightError, match="cannot be written to"):
        convert(source, out, RECIPE)


# -- names


NAMES = ["with space", "ünï çødé 模型", "new\nline", "tab\tquote'\"$x`", "-dash", "{braces}[red]", "..dots", "a\\b", "\x1b[31m"]


@pytest.mark.parametrize("name", NAMES)
def test_odd_names(ordeals, server, source, tmp_path, name):
    """Nothing in a name is taken for anything but a name; and the command that is printed, given to a shell, goes on."""
    ordeals("two passes")  # warms the server up
    (tmp_path / name / "x").mkdir(parents=True)
    moved = source.rename(tmp_path / name / f"{name}.safetensors")
    folder = tmp_path / name / "x" / ".."
    out = folder / f"{name} out.safetensors"
    arguments = ["convert", str(moved), "-o", str(out), *FLAGS]
    job = {"arguments": arguments, "source": str(moved), "destination": str(folder), **TILES}
    full = {"at": 9, "how": "fail", "error": errno.ENOSPC, "sticky": True, "calls": {"destination": ["pwrite"]}}
    result = server.run(**job, orders=full)
    assert result.exit == 7 and not out.exists(), result.err
    printed = result.err[result.err.index("go on with: streamquant ") :].removeprefix("go on with: streamquant ")
    assert printed.count("\n") == 1 and not re.search("[\x00-\x09\x0b-\x1f]", printed)
    shell = shutil.which("bash") or pytest.skip("needs bash: that is where $'\\n' can be written")
    words = subprocess.run([shell, "-c", f'printf "%s\\0" {printed}'], capture_output=True, text=True, check=True).stdout
    assert words.split("\0")[:-1] == [*arguments, "--resume"]
    result = server.run(**job | {"arguments": [*arguments, "--resume"]})
    left = [path for path in folder.iterdir() if path.suffix in (".journal", ".partial")]
    assert result.exit == 0 and out.exists() and not left, result.err
    result = server.run(**job)
    assert result.exit == 4 and "\x1b" not in result.err, result.err


@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}, {"resume": True, "force": True}], ids=str)
def test_a_dangling_link_for_a_destination(source, out, tmp_path, expected, options):
    """It is a name that is taken; with --force the link is replaced, and nothing is written where it points."""
    out.symlink_to(tmp_path / "nowhere")
    if "force" not in options:
        with pytest.raises(errors.OutputExistsError):
            convert(source, out, RECIPE, **options)
        assert out.is_symlink() and hidden(out.parent) == []
    else:
        convert(source, out, RECIPE, **options)
        assert not out.is_symlink() and out.read_bytes() == expected
    assert not (tmp_path / "nowhere").exists()


# -- clocks


@pytest.mark.parametrize("shift", [-(10**9), 10**9], ids=["long ago", "in the future"])
def test_clocks_that_jump(source, out, expected, shift):
    """Times only ever tell two files apart, or order journals; none is compared with the clock."""
    when = int(time.time()) + shift
    os.utime(source, (when, when))
    interrupt(source, out)
    for path in out.parent.iterdir():
        os.utime(path, (when - 5, when - 5))
    convert(source, out, RECIPE, resume=True)
    assert out.read_bytes() == expected and hidden(out.parent) == []


# -- journals


@pytest.fixture
def begun(source, out):
    """An interrupted run: its journal and its partial file."""
    journal = interrupt(source, out, 14)
    (partial,) = out.parent.glob(".*.partial")
    return journal, partial


def outcome(source: Path, out: Path, expected: bytes, *allowed: type) -> str:
    """Resume: the right bytes, or one of these refusals; anything else fails."""
    try:
        convert(source, out, RECIPE, resume=True)
    except allowed as refusal:
        assert not out.exists()
        return type(refusal).__name__
    assert out.read_bytes() == expected
    out.unlink()
    return "done"


def restore(out: Path, journal: tuple[Path, bytes], partial: tuple[Path, bytes]) -> None:
    for path in out.parent.iterdir():
        path.unlink()
    journal[0].write_bytes(journal[1])
    partial[0].write_bytes(partial[1])


def test_a_journal_cut_at_any_byte(source, out, expected, begun):
    journal, partial = ((path, path.read_bytes()) for path in begun)
    first_line = journal[1].index(b"\n")
    told = set()
    for length in [*range(0, first_line + 3, 97), *range(first_line - 2, len(journal[1]), 41), len(journal[1])]:
        restore(out, (journal[0], journal[1][:length]), partial)
        told.add((length > first_line, outcome(source, out, expected, errors.ResumeError)))
    assert told == {(False, "ResumeError"), (True, "done")}


def test_a_journal_with_any_bit_flipped(source, out, expected, begun):
    journal, partial = ((path, path.read_bytes()) for path in begun)
    first_line = journal[1].index(b"\n")
    for at in [*range(0, first_line, 211), *range(first_line, len(journal[1]), 61)]:
        damaged = bytearray(journal[1])
        damaged[at] ^= 1 << at % 8
        restore(out, (journal[0], bytes(damaged)), partial)
        found = outcome(source, out, expected, errors.ResumeError)
        assert found == ("ResumeError" if at <= first_line else "done"), at


def test_lines_of_a_journal_in_another_order_or_twice(source, out, expected, begun):
    """Each line is whole; what they claim does not bear out, or is claimed again."""
    journal, partial = ((path, path.read_bytes()) for path in begun)
    lines = journal[1].splitlines(keepends=True)
    for shuffled in (lines[:1] + lines[:0:-1], lines + lines[1:], lines[:1] + lines[3:], [*lines[:1], *lines[5:6], *lines[1:]]):
        restore(out, (journal[0], b"".join(shuffled)), partial)
        outcome(source, out, expected, errors.ResumeError)


def test_the_journal_of_another_source_or_recipe(source, out, expected, begun, tmp_path):
    """Under the right name, beside a partial file of the right size."""
    journal, partial = ((path, path.read_bytes()) for path in begun)
    (tmp_path / "other").mkdir()
    other = save(tmp_path / "other" / source.name, {"l.weight": floats(64, 64)})
    for foreign in (interrupt(other, tmp_path / "other" / out.name, 2),
                    interrupt(source, tmp_path / "other" / out.name, 6, EVERY_FORMAT["nf4"])):  # fmt: skip
        restore(out, (journal[0], foreign.read_bytes()), partial)
        assert outcome(source, out, expected, errors.ResumeError) == "ResumeError"
    restore(out, journal, partial)
    assert outcome(source, out, expected) == "done"


def test_the_partial_file_of_another_run(source, out, expected, begun, tmp_path):
    """What a `durable` line vouches for is believed; what it does not is looked at, and done again."""
    journal, partial = ((path, path.read_bytes()) for path in begun)
    lines = [line for line in journal[1].splitlines(keepends=True) if b'"durable"' not in line]
    restore(out, (journal[0], b"".join(lines)), (partial[0], bytes(len(partial[1]))))
    assert outcome(source, out, expected) == "done"
