"""The journal: what survives a torn, flipped or foreign line is a true prefix, never a guess."""

from __future__ import annotations

import errno
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamquant import errors
from streamquant.checkpoint.journal import VERSION, Journal, Records, differences, read_records

FINGERPRINT = {"source": [{"name": "m.safetensors", "size": 5}], "recipe": {"base": "fp8"}}
LINES = [
    {"unit": 1, "learned": 0.5},
    {"unit": 0, "end": 4096, "state": None, "sums": [0.0, 1.0], "digests": ["aa"]},
    {"unit": 0, "hashes": ["bb"], "sums": [0.0, 2.0]},
    {"unit": 1, "end": 64, "state": 0.5, "sums": [0.0, 1.0], "digests": ["cc"]},
    {"durable": 4},
    {"unit": 1, "hashes": ["dd"], "sums": [0.0, 3.0]},
    {"published": 0},
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".out.safetensors.0123abcd.journal"


def written(path, lines=LINES, fingerprint=FINGERPRINT) -> bytes:
    journal = Journal.create(path, fingerprint)
    for line in lines:
        journal.append(line)
    journal.close()
    return path.read_bytes()


def expected(lines: list[dict]) -> Records:
    """What those lines say, by a second and slower telling."""
    records = Records(FINGERPRINT, lines=1 + len(lines))
    for number, line in enumerate(lines, start=1):
        if "learned" in line:
            records.learned[line["unit"]] = line["learned"]
        elif "unit" in line:
            records.units[line["unit"]] = line
        elif "published" in line:
            records.published.add(line["published"])
        for unit, last in records.units.items():
            claims = [
                at for at, claim in enumerate(lines[:number], 1) if claim.get("unit") == unit and "learned" not in claim
            ]
            synced = max((durable["durable"] for durable in lines[:number] if "durable" in durable), default=0)
            (records.durable.add if "hashes" in last and claims[-1] < synced else records.durable.discard)(unit)
    return records


def test_what_is_written_is_read(path):
    raw = written(path)
    records = read_records(path)
    assert records == Records(FINGERPRINT, {0: LINES[2], 1: LINES[5]}, {1: 0.5}, {0}, {0}, 8, len(raw))


def test_every_line_is_its_hash_a_space_and_json(path):
    first = written(path).splitlines()[0]
    assert json.loads(first[17:]) == {"journal": VERSION, "fingerprint": FINGERPRINT}
    assert first[16:17] == b" " and bytes.fromhex(first[:16].decode())


@pytest.mark.parametrize("repeat", range(3))
def test_every_truncation_leaves_the_whole_lines_before_it(path, repeat):
    raw = written(path)
    ends = [at + 1 for at, byte in enumerate(raw) if byte == ord("\n")]
    for cut in range(ends[0] + repeat, len(raw), 3):
        path.write_bytes(raw[:cut])
        whole = sum(end <= cut for end in ends)
        records = expected(LINES[: whole - 1])
        records.nbytes = ends[whole - 1]
        assert read_records(path) == records


@settings(max_examples=300)
@given(st.data())
def test_a_flipped_bit_ends_the_trusted_part(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "j"
    raw = bytearray(written(path))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    ends = [0, *(number + 1 for number, byte in enumerate(written(path.with_name("k"))) if byte == ord("\n"))]
    whole = sum(end <= at for end in ends) - 1
    if whole == 0:
        with pytest.raises(errors.ResumeError, match="damaged"):
            read_records(path)
        return
    records = expected(LINES[: whole - 1])
    records.nbytes = ends[whole]
    assert read_records(path) == records


def test_lines_after_a_damaged_one_are_not_trusted_even_when_whole(path):
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[3].replace(b"bb", b"bc"), *lines[4:]]))
    assert read_records(path).lines == 3


@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * 4096, b"garbage\n" * 10, b"\x80\x02", b"0" * 16 + b" {}\n"])
def test_garbage_is_no_journal(path, content):
    path.write_bytes(content)
    with pytest.raises(errors.ResumeError, match="damaged or of another version"):
        read_records(path)


def test_another_version_is_refused(path, monkeypatch):
    from streamquant.checkpoint import journal

    monkeypatch.setattr(journal, "VERSION", VERSION + 1)
    written(path)
    monkeypatch.undo()
    with pytest.raises(errors.ResumeError, match="another version"):
        read_records(path)


def test_an_absent_journal_is_an_error_of_resuming(path):
    with pytest.raises(errors.ResumeError, match="is gone"):
        read_records(path)


unit_lines = st.builds(lambda unit: {"unit": unit, "hashes": ["x"]}, st.integers(0, 4)) | st.builds(
    lambda unit: {"unit": unit, "end": 1}, st.integers(0, 4)
)


@settings(max_examples=300)
@given(st.lists(unit_lines | st.just("sync") | st.just("synced"), max_size=25))
def test_only_what_was_written_before_a_sync_began_is_durable(tmp_path_factory, events):
    """Units may be done again after a resume; a sync of their first version says nothing of the second."""
    lines, pending = [], None
    for event in events:
        if event == "sync":
            pending = 1 + len(lines)
        elif event == "synced":
            if pending is not None:
                lines.append({"durable": pending})
        else:
            lines.append(event)
    path = tmp_path_factory.mktemp("durable") / "j"
    written(path, lines)
    assert read_records(path).durable == expected(lines).durable


@pytest.mark.timeout(120)  # a few seconds; looking at all lines again at each sync would take many minutes
def test_a_long_journal_is_read_in_linear_time(path):
    lines = []
    for unit in range(60_000):
        lines += [{"unit": unit, "hashes": []}, {"durable": 1 + len(lines)}]
    written(path, lines)
    assert len(read_records(path).durable) == 59_999


def test_reopening_cuts_off_the_torn_end_and_goes_on(path):
    raw = written(path)
    path.write_bytes(raw + raw[-20:-3])
    journal, records = Journal.reopen(path)
    assert (path.read_bytes(), journal.lines, records.lines) == (raw, 8, 8)
    journal.append({"published": 1})
    journal.sync()
    journal.close()
    assert read_records(path).published == {0, 1} and journal.lines == 9


def test_a_journal_in_use_cannot_be_taken_up(path):
    journal = Journal.create(path, FINGERPRINT)
    before = path.read_bytes()
    with pytest.raises(errors.ResumeError, match="Another process"):
        Journal.reopen(path)
    assert path.read_bytes() == before
    journal.close()
    reopened, _ = Journal.reopen(path)
    with pytest.raises(errors.ResumeError, match="Another process"):
        Journal.reopen(path)
    reopened.close()


def test_a_journal_is_never_shared_by_two_fresh_runs(path):
    Journal.create(path, FINGERPRINT).close()
    with pytest.raises(errors.DestinationWriteError, match="File exists"):
        Journal.create(path, FINGERPRINT)
    assert path.exists()


def test_disk_full_while_it_is_created_leaves_nothing(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", full)
        with pytest.raises(errors.DestinationWriteError, match="No space left on device"):
            Journal.create(path, FINGERPRINT)
    assert not path.exists(), "the next --resume would find a journal without a first line"
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["a.b.1 was 2, is 3"]),
        ({"a": {"b": 1}, "c": 0}, {"a": None, "c": 0}, ["a.b was 1, is null"]),
        ({"a": []}, {"a": ["x"]}, ["a was [], is null", 'a.0 was null, is "x"']),
        ({"x": "s" * 99}, {"x": "t"}, [f'x was "{"s" * 79}... (101 characters), is "t"']),
    ],
)
def test_differences_are_named_by_their_place(old, new, told):
    assert differences(old, new) == told


def test_a_write_that_takes_only_a_part_is_finished(path, monkeypatch):
    whole = written(path)
    path.unlink()
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, bytes(data)[: max(len(data) // 3, 1)]))
    assert written(path) == whole


def test_a_disk_that_takes_a_part_and_is_full_then_is_called_full(path, monkeypatch):
    journal = Journal.create(path, FINGERPRINT)
    real_write, calls = os.write, []

    def fill(descriptor: int, data) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(descriptor, bytes(data)[:5])

    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(errors.DestinationWriteError, match="No space left on device"):
        journal.append({"unit": 0})
    monkeypatch.undo()
    journal.close()
    assert read_records(path).units == {}, "half a line is none"
