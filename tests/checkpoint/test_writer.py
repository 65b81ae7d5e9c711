"""Partial files and their publication: never a byte too many under a final name, never another's file replaced."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamquant import errors
from streamquant.checkpoint import writer
from streamquant.checkpoint.positioned import read_at, write_at
from streamquant.checkpoint.writer import Names, PartialFile, find_journals, rename_new, write_file

HEADER = b"H" * 16


@pytest.fixture
def part(tmp_path):
    partial = PartialFile(tmp_path / ".out.0123abcd.partial", tmp_path / "out", 5000)
    yield partial
    partial.close()


def failing(code: int):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_partial_file_has_its_full_size_at_once_and_takes_bytes_anywhere(part):
    part.create(HEADER)
    assert part.partial.read_bytes() == HEADER + bytes(5000 - 16)
    part.write(4990, memoryview(b"0123456789"))
    part.write(100, memoryview(b"abc"))
    assert (part.read(4990, 10), part.read(99, 5), part.read(4998, 100)) == (b"0123456789", b"\0abc\0", b"89")
    assert not part.final.exists()


def test_space_is_reserved_before_a_weight_is_read(part):
    part.create(HEADER)
    assert part.preallocated == (part.partial.stat().st_blocks * 512 >= 5000)


def test_a_filesystem_that_cannot_reserve(part, monkeypatch):
    def refuse(*_):
        writer.ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(writer, "_fallocate", refuse)
    part.create(HEADER)
    assert not part.preallocated and part.partial.stat().st_size == 5000


def test_a_filesystem_that_is_full(part, monkeypatch):
    def refuse(*_):
        writer.ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(writer, "_fallocate", refuse)
    with pytest.raises(errors.DestinationWriteError, match="No space left"):
        part.create(HEADER)


def test_publishing_gives_the_name_and_takes_the_partial_away(part):
    part.create(HEADER)
    inode = part.partial.stat().st_ino
    part.publish(replace=False)
    assert part.final.stat().st_ino == inode and not part.partial.exists()


def test_permissions_are_the_users_own(part):
    """Not the 0600 of a temporary file: a ComfyUI under another user must be able to read it."""
    old = os.umask(0o022)
    try:
        part.create(HEADER)
        part.publish(replace=False)
    finally:
        os.umask(old)
    assert stat.S_IMODE(part.final.stat().st_mode) == 0o644


def test_publishing_replaces_only_when_told_to(part):
    part.final.write_bytes(b"old")
    part.create(HEADER)
    with pytest.raises(errors.OutputExistsError):
        part.publish(replace=False)
    assert part.final.read_bytes() == b"old" and part.partial.exists()
    part.reopen(HEADER)
    part.publish(replace=True)
    assert part.final.stat().st_size == 5000 and not part.partial.exists()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK])
def test_without_hard_links_a_rename_does(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "link", failing(code))
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"new")
    rename_new(source, target)
    assert target.read_bytes() == b"new" and not source.exists()
    source.write_bytes(b"newer")
    with pytest.raises(errors.OutputExistsError):
        rename_new(source, target)
    assert (target.read_bytes(), source.read_bytes()) == (b"new", b"newer")


def test_a_dangling_link_is_not_written_through(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"new")
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.OutputExistsError):
        rename_new(source, target)
    assert not (tmp_path / "elsewhere").exists()


def test_reopening_puts_the_header_back(part):
    """Killed or without power before the header reached the disk: the planned one is written again."""
    part.create(HEADER)
    part.write(0, memoryview(bytes(16)))
    part.write(100, memoryview(b"abc"))
    part.close()
    part.reopen(HEADER)
    assert part.read(0, 16) == HEADER and part.read(100, 3) == b"abc"


def test_reopening_another_file_is_refused(part):
    with pytest.raises(errors.ResumeError, match="is gone"):
        part.reopen(HEADER)
    part.create(HEADER)
    part.close()
    os.truncate(part.partial, 4999)
    with pytest.raises(errors.ResumeError, match="planned size of 5,000 bytes"):
        part.reopen(HEADER)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync", "link"])
def test_every_failing_call_is_named(part, monkeypatch, call):
    part.create(HEADER)
    with monkeypatch.context() as broken:
        broken.setattr(os, call, failing(errno.EIO))
        with pytest.raises(errors.DestinationWriteError, match=r"Input/output error.*--resume"):
            {"pwrite": lambda: part.write(0, memoryview(b"x")), "fdatasync": part.sync}.get(
                call, lambda: part.publish(replace=False)
            )()
    assert part.partial.exists() and not part.final.exists()


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "index.json"
    path.write_bytes(b"old")
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", failing(errno.EIO))
        with pytest.raises(errors.DestinationWriteError):
            write_file(path, [b"ne", b"w"], "0123abcd")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["index.json"]
    write_file(path, [b"new", b"", b"er"], "0123abcd")
    assert path.read_bytes() == b"newer" and [entry.name for entry in tmp_path.iterdir()] == ["index.json"]


@pytest.mark.skipif(os.name != "posix", reason="only POSIX systems sync folders")
def test_the_name_of_a_file_is_durable(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(stat.S_IFMT(os.fstat(number).st_mode)) or sync(number))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    write_file(tmp_path / "index.json", [b"new"], "0123abcd")
    assert calls == [stat.S_IFREG, "replace", stat.S_IFDIR]


# -- names


def test_names_lie_beside_the_destination_hidden_and_owned_by_the_run():
    names = Names(Path("/models/flux.safetensors"), "0123abcd")
    assert names.journal == Path("/models/.flux.safetensors.0123abcd.journal")
    assert names.partial("flux-00001-of-00002.safetensors") == Path(
        "/models/.flux-00001-of-00002.safetensors.0123abcd.partial"
    )
    assert len({Names.fresh(Path("x")).run for _ in range(100)}) == 100


def test_journals_are_found_newest_first_and_no_other_file_is(tmp_path):
    destination = tmp_path / "out.safetensors"
    for age, run in enumerate(["00000001", "0000000a", "00000002"]):
        names = Names(destination, run)
        names.journal.touch()
        os.utime(names.journal, (age, age))
    for stranger in (".out.safetensors.0123.journal", ".out.safetensors.0000000G.journal",
                     "out.safetensors.00000003.journal",
                     ".out.safetensors.00000004.partial", ".out.safetensors.x.00000005.journal",
                     ".other.safetensors.00000006.journal"):  # fmt: skip
        (tmp_path / stranger).touch()
    # A journal that is gone before it is looked at: its run has just ended.
    (tmp_path / ".out.safetensors.00000007.journal").symlink_to(tmp_path / "gone")
    assert [names.run for names in find_journals(destination)] == ["00000002", "0000000a", "00000001"]
    assert find_journals(tmp_path / "absent" / "out.safetensors") == []


# -- positioned reads and writes


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=200)), max_size=8), st.integers(1, 50), st.booleans())
def test_short_transfers_are_continued(tmp_path_factory, writes, at_most, positioned):
    """A call may transfer less than asked, and some systems have only lseek."""
    path = tmp_path_factory.mktemp("p") / "f"
    content = bytearray(600)
    with pytest.MonkeyPatch.context() as patch, path.open("w+b") as file:
        if positioned:
            pwrite, preadv = os.pwrite, os.preadv
            patch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:at_most], offset))
            patch.setattr(os, "preadv", lambda fd, parts, offset: preadv(fd, [parts[0][:at_most]], offset))
        else:
            write, read = os.write, os.read
            patch.delattr(os, "pwrite")
            patch.delattr(os, "preadv")
            patch.setattr(os, "write", lambda fd, data: write(fd, data[:at_most]))
            patch.setattr(os, "read", lambda fd, count: read(fd, min(count, at_most)))
        os.ftruncate(file.fileno(), 600)
        for offset, data in writes:
            write_at(file.fileno(), memoryview(data), offset)
            content[offset : offset + len(data)] = data
        buffer = bytearray(700)
        assert read_at(file.fileno(), memoryview(buffer), 0) == 600
    assert buffer[:600] == content
