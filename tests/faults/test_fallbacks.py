"""Filesystems that lack something (network drives, exFAT): another way is taken only where the call says so, and said."""

from __future__ import annotations

import errno

import pytest

# What is missing: (call, in which folder, errnos that say so, what the screen says)
LACKING = {
    "reservation": ("fallocate", "destination", ("EOPNOTSUPP", "ENOSYS", "EINVAL"), "cannot reserve space"),
    "hard links": ("link", "destination", ("EPERM", "EOPNOTSUPP", "ENOSYS", "EMLINK"), "no hard links"),
    "locks": ("flock", "destination", ("ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL"), "no locks"),
    "mappings": ("mmap", "source", ("ENODEV", "EOPNOTSUPP"), "read instead of mapped"),
    "read-ahead": ("fadvise", "source", ("EINVAL", "ENOSYS", "ESPIPE"), ""),
}
CASES = [(what, code) for what, (_, _, codes, _) in LACKING.items() for code in codes]


@pytest.mark.parametrize(("what", "code"), CASES, ids=[f"{what}, {code}" for what, code in CASES])
def test_what_a_filesystem_lacks_is_done_without_and_said(ordeals, what, code):
    call, where, _, said = LACKING[what]
    ordeal = ordeals("two passes")
    folder = ordeal.make(f"{call}-{code}")
    orders = {"at": 1, "how": "fail", "error": getattr(errno, code), "sticky": True, "calls": {where: [call]}}
    result = ordeal.run(folder, orders=orders)
    assert result.exit == 0 and result.struck, result.err
    assert said in result.err
    ordeal.check_done(folder, result.err)


@pytest.mark.parametrize("code", ["EINVAL", "ENOSYS"])
def test_names_that_cannot_be_made_durable(ordeals, code):
    """Only for folders: a file that cannot be synced is a fault."""
    ordeal = ordeals("two passes")
    folder = ordeal.make(f"names-{code}")
    orders = {"how": "fail", "error": getattr(errno, code), "calls": {"destination": ["fsync"]}}
    told = []
    for at in range(1, 9):
        result = ordeal.run(folder, "--force", orders=orders | {"at": at})
        folder_synced = result.path == str(folder)
        assert result.exit == (0 if folder_synced else 7), (at, result.path, result.err)
        told.append("cannot make names durable" in result.err)
        ordeal.run(folder, "--resume", "--force")
    assert any(told)


@pytest.mark.parametrize("name", ["shards", "over an old file"])
def test_nothing_is_there_at_once(ordeals, name):
    """As on exFAT behind a network: no reservation, no links, no locks."""
    ordeal = ordeals(name)
    folder = ordeal.make("bare")
    calls = {"destination": ["fallocate", "link", "flock"]}
    orders = {"at": 1, "how": "fail", "error": errno.EOPNOTSUPP, "sticky": True, "calls": calls}
    result = ordeal.run(folder, orders=orders)
    assert result.exit == 0, result.err
    ordeal.check_done(folder, result.err)
    assert result.err.count("no hard links") == (name == "shards"), "said once, however many shards"


@pytest.mark.parametrize("code", ["EIO", "EACCES", "ENOSPC"])
def test_any_other_answer_is_a_fault(ordeals, code):
    ordeal = ordeals("two passes")
    for call in ("fallocate", "flock"):
        folder = ordeal.make(f"fault-{call}-{code}")
        orders = {"at": 1, "how": "fail", "error": getattr(errno, code), "calls": {"destination": [call]}}
        result = ordeal.run(folder, orders=orders)
        assert result.exit == 7, result.err
        assert ordeal.run(folder, "--resume").exit == 0
        ordeal.check_done(folder, result.err)


def test_without_links_a_file_that_appeared_is_not_replaced(ordeals):
    """The look comes first there: what is in the way before the name is given stays."""
    ordeal = ordeals("two passes")
    folder = ordeal.make("in-the-way")
    result = ordeal.run(folder, orders={"at": 1, "how": "kill before", "calls": {"destination": ["link"]}})
    assert result.killed
    (folder / "out.safetensors").write_bytes(b"mine")
    orders = {"at": 1, "how": "fail", "error": errno.EPERM, "sticky": True, "calls": {"destination": ["link"]}}
    result = ordeal.run(folder, "--resume", orders=orders)
    assert result.exit == 4 and (folder / "out.safetensors").read_bytes() == b"mine", result.err
