"""Power cuts: what a disk may hold after one, made from the log of a real run's changes.

What no fsync has covered may have reached the disk or not, page by page, in any order, and a file's new size with or
without its content. Names are changed in the order in which the run changed them (as every journaling filesystem does),
but those that no fsync of the folder has covered may be missing from some point on.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from pathlib import Path

from faults.shim import KINDS

PAGE = 64  # much smaller than a real one: the files here are small
RECORD = struct.Struct("<iiqqqii")


@dataclass(frozen=True)
class Change:
    """One record of the shim's log: a changing call that was made, or an fsync that was begun."""

    kind: str
    is_folder: bool
    inode: int
    offset: int
    length: int
    path: str
    other: str
    data: bytes


def read_log(path: Path) -> list[Change]:
    """All whole records."""
    raw, at, found = path.read_bytes(), 0, []
    while at + RECORD.size <= len(raw):
        kind, is_folder, inode, offset, length, first, second = RECORD.unpack_from(raw, at)
        at += RECORD.size
        names = [raw[at : at + first].decode(), raw[at + first : at + first + second].decode()]
        at += first + second
        size = length if KINDS[kind] == "pwrite" else 0
        found.append(Change(KINDS[kind], bool(is_folder), inode, offset, length, *names, raw[at : at + size]))
        at += size
    return found


@dataclass
class Disk:
    """A folder as a disk has it. files: number -> content; names: -> number. A file's number is its inode, or that of the
    record that made it, less than 0: inodes are given out again."""

    files: dict[int, bytearray] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Disk:
        disk = cls()
        for path in folder.iterdir():
            disk.names[path.name] = path.stat().st_ino
            disk.files[path.stat().st_ino] = bytearray(path.read_bytes())
        return disk

    def put(self, folder: Path) -> None:
        """Make the folder hold this."""
        made: dict[int, Path] = {}
        for name, number in self.names.items():
            if number in made:
                (folder / name).hardlink_to(made[number])
            else:
                (folder / name).write_bytes(self.files[number])
                made[number] = folder / name


def cut(before: Disk, log: list[Change], at: int, dice: random.Random) -> Disk:
    """What the disk may hold when power fails after the first `at` records of the log."""
    disk = Disk({number: bytearray(content) for number, content in before.files.items()}, dict(before.names))
    files = _files_of(log[:at])
    synced: dict[int, int] = {}
    names_synced = 0
    for number, change in enumerate(log[:at]):
        if change.kind in ("fsync", "fdatasync"):
            if change.is_folder:
                names_synced = number
            else:
                synced[files[number]] = number
    # How much of it reached the disk by itself: nothing, everything, or by chance; the same for all, or page by page.
    chance = dice.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    lost_from = dice.randint(names_synced, at)
    for number, change in enumerate(log[:at]):
        if change.kind in ("create", "rename", "link", "unlink"):
            if number < lost_from:
                _rename(disk, change, files[number])
        elif change.kind in ("pwrite", "ftruncate", "fallocate"):
            certain = number < synced.get(files[number], -1)
            _write(disk.files.setdefault(files[number], bytearray()), change, dice, 1.0 if certain else chance)
    return disk


def _files_of(log: list[Change]) -> list[int]:
    """The number of the file that each record is about."""
    made: dict[int, int] = {}
    found = []
    for number, change in enumerate(log):
        if change.kind == "create":
            made[change.inode] = -1 - number
        found.append(made.get(change.inode, change.inode))
    return found


def _rename(disk: Disk, change: Change, file: int) -> None:
    name, other = (path.rsplit("/", 1)[-1] for path in (change.path, change.other))
    if change.kind == "create":
        disk.names[name] = file
        disk.files.setdefault(file, bytearray())
    elif change.kind == "link":
        disk.names[other] = disk.names[name]
    elif change.kind == "rename":
        disk.names[other] = disk.names.pop(name)
    else:
        disk.names.pop(name, None)


def _write(content: bytearray, change: Change, dice: random.Random, chance: float) -> None:
    end = change.offset + change.length
    if change.kind != "pwrite":
        if dice.random() < chance and (change.kind == "ftruncate" or change.length > len(content)):
            content[:] = content[: change.length].ljust(change.length, b"\0")
        return
    if end > len(content) and dice.random() < chance:
        content.extend(bytes(end - len(content)))
    begin = change.offset
    while begin < end:
        stop = min(begin // PAGE * PAGE + PAGE, end)
        if dice.random() < chance and stop <= len(content):
            content[begin:stop] = change.data[begin - change.offset : stop - change.offset]
        begin = stop
