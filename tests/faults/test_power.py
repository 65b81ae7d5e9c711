"""The disk that power cuts are played on: what an fsync covered is there, and a file is not another with its old inode."""

from __future__ import annotations

import random

from faults.power import Change, Disk, cut

FOLDER = 2


def create(inode: int, path: str) -> Change:
    return Change("create", False, inode, 0, 0, path, "", b"")


def change(kind: str, inode: int, length: int = 0, data: bytes = b"", path: str = "", other: str = "") -> Change:
    return Change(kind, inode == FOLDER, inode, 0, len(data) or length, path, other, data)


# An old file goes; the next one is given its inode, is shorter, and is synced with its name.
REUSED = [
    change("unlink", 7, path="d/old"),
    create(7, "d/new"),
    change("fallocate", 7, 3),
    change("pwrite", 7, data=b"new"),
    change("fsync", 7),
    change("fsync", FOLDER),
    create(8, "d/more"),
]


def test_what_is_synced_is_there_whatever_file_had_its_inode_before():
    before = Disk({7: bytearray(b"an old file")}, {"old": 7})
    for seed in range(40):
        after = cut(before, REUSED, len(REUSED), random.Random(seed))
        assert {name: bytes(after.files[number]) for name, number in after.names.items() if name != "more"} == {"new": b"new"}


def test_an_old_file_whose_removal_was_lost_holds_what_it_held():
    before = Disk({7: bytearray(b"an old file")}, {"old": 7})
    found = set()
    for seed in range(100):
        after = cut(before, REUSED, 5, random.Random(seed))
        found |= {(name, bytes(after.files[number])) for name, number in after.names.items()}
    assert ("old", b"an old file") in found
    assert {content for name, content in found if name == "old"} == {b"an old file"}
    assert {content for name, content in found if name == "new"} == {b"new"}  # synced, but its name may be missing
