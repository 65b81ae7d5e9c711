"""The journal beside a partial output: what has been written, what is durable, and of which conversion.

One JSON value per line, each line led by its own xxh3_64, so that a torn, flipped or foreign line ends the trusted
part. The first line is the fingerprint of the conversion; then, in the order of the work:

    {"unit": 3, "learned": …}                     first pass over unit 3 done
    {"unit": 3, "end": 4096, "state": …, …}       elements [0, 4096) of unit 3 written
    {"unit": 3, "hashes": […], …}                 unit 3 complete
    {"durable": 42}                               all that the first 42 lines claim survives a power loss
    {"published": 0}                              output file 0 has its final name

A line may be claimed before its data is durable; whoever resumes checks such claims against the partial file by the
hashes they carry.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from streamquant import errors
from streamquant.checkpoint.calls import UNSUPPORTED, close, remove, writing
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.json_text import load_json
from streamquant.checkpoint.positioned import close_read, opened

VERSION = 1
_DIGEST = 16
LOCK_ATTEMPTS, LOCK_WAIT = 5, 0.05  # seconds between two
_to_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass
class Records:
    """What a journal says. units: last record of each; learned: first-pass results; durable: trusted units.

    lines: how many lines were valid; nbytes: how long they are.
    """

    fingerprint: dict[str, Any]
    units: dict[int, dict[str, Any]] = field(default_factory=dict)
    learned: dict[int, Any] = field(default_factory=dict)
    durable: set[int] = field(default_factory=set)
    published: set[int] = field(default_factory=set)
    lines: int = 0
    nbytes: int = 0


class Journal:
    """Appends to a journal file. Every method raises DestinationWriteError when the disk does not take it.

    lines: how many there are. locked: whether the filesystem could mark it as being written.
    """

    def __init__(self, path: Path, descriptor: int, lines: int):
        self.path = path
        self.lines = lines
        self.locked = True
        self._descriptor = descriptor

    @classmethod
    def create(cls, path: Path, fingerprint: dict[str, Any]) -> Journal:
        """A new journal, owned by this run alone, durable before anything it describes is written."""
        with writing(path):
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        journal = cls(path, descriptor, 0)
        try:
            journal.locked = _lock(descriptor, path)
            journal.append({"journal": VERSION, "fingerprint": fingerprint})
            journal.sync()
        except BaseException:
            journal.abandon()
            with contextlib.suppress(errors.DestinationWriteError):  # the first failure is the one to be told
                remove(path)
            raise
        return journal

    @classmethod
    def reopen(cls, path: Path) -> tuple[Journal, Records]:
        """A journal left behind, cut to its valid lines. Raises ResumeError when another process is writing it."""
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
        try:
            locked = _lock(descriptor, path)
            records = read_records(path)
            with writing(path):
                os.ftruncate(descriptor, records.nbytes)
        except BaseException:
            close_read(descriptor)
            raise
        journal = cls(path, descriptor, records.lines)
        journal.locked = locked
        return journal, records

    def append(self, *records: dict[str, Any]) -> None:
        """Add a line for each record; they reach the disk with the next `sync` at the latest."""
        with writing(self.path):
            data = memoryview(b"".join(map(_encode, records)))
            while data:  # a full disk takes a part first, and says only to the rest that it is full
                data = data[os.write(self._descriptor, data) :]
        self.lines += len(records)

    def sync(self) -> None:
        with writing(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with writing(self.path):
                close(descriptor)

    def abandon(self) -> None:
        """Close on the way out of a failure, which is the one to be told."""
        with contextlib.suppress(errors.DestinationWriteError):
            self.close()


def _encode(record: dict[str, Any]) -> bytes:
    text = _to_json(record).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _decode(line: bytes, load: Callable[[bytes], Any] = json.loads) -> dict[str, Any] | None:
    """The record of one line, or None when the line is not intact. load: json.loads, for there may be a million lines."""
    if len(line) < _DIGEST + 2 or not line.endswith(b"\n") or line[_DIGEST : _DIGEST + 1] != b" ":
        return None
    text = line[_DIGEST + 1 : -1]
    if xxhash.xxh3_64_hexdigest(text).encode() != line[:_DIGEST]:
        return None
    try:
        record = load(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_records(path: Path) -> Records:
    """The intact beginning of a journal. Raises ResumeError when not even its first line is intact, DestinationWriteError
    when it cannot be read."""
    try:
        with opened(path) as file:
            first = _decode(file.readline(), load_json)  # its values are compared and shown, at any depth
            fingerprint = first.get("fingerprint") if first else None
            if not isinstance(fingerprint, dict) or first.get("journal") != VERSION:
                raise errors.ResumeError(
                    f"The journal {printable(str(path), 300)} is damaged or of another version: delete it and its .partial "
                    f"file, and convert from the start."
                )
            records = Records(fingerprint, lines=1, nbytes=file.tell())
            history: dict[int, int] = {}
            for line in file:
                record = _decode(line)
                if record is None or not _is_well_formed(record):
                    break
                _take(record, records, history)
                records.lines += 1
                records.nbytes += len(line)
    except FileNotFoundError:
        raise errors.ResumeError(f"The journal {printable(str(path), 300)} is gone: convert from the start.") from None
    except OSError as error:
        where = printable(str(path), 300)
        raise errors.DestinationWriteError(f"Reading {where} failed: {error.strerror}; mend the cause and --resume.") from None
    return records


def _is_well_formed(record: dict[str, Any]) -> bool:
    """Whether the numbers in a record are numbers; what a unit's record claims is checked when it is used."""
    numbers = [record[key] for key in ("unit", "durable", "published") if key in record]
    return all(type(number) is int for number in numbers) and ("learned" not in record or "unit" in record)


def _take(record: dict[str, Any], records: Records, history: dict[int, int]) -> None:
    """Merge one line. history: completed unit -> its line number, of those that no `durable` line covers yet."""
    if "learned" in record:
        records.learned[record["unit"]] = record["learned"]
    elif "unit" in record:
        records.units[record["unit"]] = record
        # A unit that is done again after a failed check is covered by no durable line that speaks of the first time.
        records.durable.discard(record["unit"])
        history.pop(record["unit"], None)
        if "hashes" in record:
            history[record["unit"]] = records.lines
    elif "durable" in record:
        covered = [unit for unit, line in history.items() if line < record["durable"]]
        records.durable.update(covered)
        for unit in covered:
            del history[unit]
    elif "published" in record:
        records.published.add(record["published"])


def differences(old: Any, new: Any) -> list[str]:
    """How two fingerprints differ, one phrase per difference, named by its place."""
    before, after = dict(_leaves(old, "")), dict(_leaves(new, ""))
    return [
        f"{printable(place)} was {printable(json.dumps(before.get(place)), 80)}, "
        f"is {printable(json.dumps(after.get(place)), 80)}"
        for place in sorted(before.keys() | after.keys())
        if before.get(place) != after.get(place)
    ]


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every scalar in nested dicts and lists, with its dotted place."""
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{place}.{key}" if place else str(key))
    else:
        yield place, value


def _lock(descriptor: int, path: Path) -> bool:
    """Mark the journal as being written, for whoever would write to the same destination. Returns whether that can be done.

    Raises ResumeError when another process has marked it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    for _ in range(LOCK_ATTEMPTS):
        with writing(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(LOCK_WAIT)  # `in_use` holds the lock for a moment when it looks
            except OSError as error:
                if error.errno not in UNSUPPORTED | {errno.ENOLCK}:
                    raise
                return False
    raise errors.ResumeError(
        f"Another process is writing {printable(str(path), 300)}: wait for it, or stop it, then --resume."
    )


def in_use(path: Path) -> bool:
    """Whether a live process is writing this journal. False where the filesystem has no locks."""
    try:
        import fcntl
    except ImportError:
        return False
    with writing(path):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # its run ends at this very moment
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in UNSUPPORTED | {errno.ENOLCK}:
                raise
        finally:
            close_read(descriptor)
    return False
