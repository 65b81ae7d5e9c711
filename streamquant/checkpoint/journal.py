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

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from streamquant import errors
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.json_text import load_json

VERSION = 1
_DIGEST = 16


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
    """Appends to a journal file. Every method raises DestinationWriteError when the disk does not take it."""

    def __init__(self, path: Path, descriptor: int, lines: int):
        self.path = path
        self.lines = lines
        self._descriptor = descriptor

    @classmethod
    def create(cls, path: Path, fingerprint: dict[str, Any]) -> Journal:
        """A new journal, owned by this run alone, durable before anything it describes is written."""
        with writing(path):
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        journal = cls(path, descriptor, 0)
        try:
            _lock(descriptor, path)
            journal.append({"journal": VERSION, "fingerprint": fingerprint})
            journal.sync()
        except BaseException:
            journal.close()
            path.unlink()
            raise
        return journal

    @classmethod
    def reopen(cls, path: Path) -> tuple[Journal, Records]:
        """A journal left behind, cut to its valid lines. Raises ResumeError when another process is writing it."""
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
        try:
            _lock(descriptor, path)
            records = read_records(path)
            with writing(path):
                os.ftruncate(descriptor, records.nbytes)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, records.lines), records

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; it reaches the disk with the next `sync` at the latest."""
        with writing(self.path):
            data = memoryview(_encode(record))
            while data:  # a full disk takes a part first, and says only to the rest that it is full
                data = data[os.write(self._descriptor, data) :]
        self.lines += 1

    def sync(self) -> None:
        with writing(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def _encode(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
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
    """The intact beginning of a journal. Raises ResumeError when not even its first line is intact."""
    try:
        with open(path, "rb") as file:
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
    except OSError as error:
        raise errors.ResumeError(f"Cannot read the journal {printable(str(path), 300)}: {error.strerror}.") from None
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


class writing:
    """Turns an OSError into a DestinationWriteError that names the file and what to do."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            where = printable(str(self.path), 300)
            raise errors.DestinationWriteError(
                f"Writing {where} failed: {error.strerror or error}; what was written is kept, mend the cause and go on with "
                f"--resume."
            ) from None


def _lock(descriptor: int, path: Path) -> None:
    """Mark the journal as being written. Two fresh runs never share one; this only guards a resume of a live run."""
    try:
        import fcntl
    except ImportError:  # Windows: a second resume of a live run is not detected there
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise errors.ResumeError(
            f"Another process is writing {printable(str(path), 300)}: wait for it, or stop it, then --resume."
        ) from None
    except OSError:
        return  # a filesystem without locks
