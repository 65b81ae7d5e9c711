"""Faults under the commands that only read, and under `dequantize`, which leaves nothing behind when it fails."""

from __future__ import annotations

import errno
import random
import re

import pytest
from faults.scenarios import TILES
from faults.shim import KINDS

READS = ("open", "stat", "read", "mmap", "opendir")
CODES = {"EIO": ("fail", READS), "ESTALE": ("fail", READS), "EMFILE": ("fail", ("open",)), "the file ends": ("end", ("read",))}


@pytest.fixture(scope="module")
def files(server, sources, tmp_path_factory):
    """A source, an output of it, and commands over them that have run once, so that the server is warm."""
    folder = tmp_path_factory.mktemp("commands")
    source, _ = sources
    output = folder / "output.safetensors"
    flags = ["--bnb-4bit", "--rtn", "--preset", "none"]
    server.warm_up(arguments=["convert", str(source), "-o", str(output), *flags], **TILES)
    return source, output, folder


def commands(source, output, folder) -> dict[str, list[str]]:
    return {
        "verify": ["verify", str(source), str(output), "--threads", "1"],
        "verify, mapped": ["verify", str(source), str(output), "--threads", "1", "--io", "mmap"],
        "compare": ["compare", str(output), str(output), "--source", str(source), "--threads", "1"],
        "inspect": ["inspect", str(output)],
        "dequantize": ["dequantize", str(output), "-o", str(folder / "new" / "plain.safetensors"), "--threads", "1", "--force"],
    }


@pytest.mark.parametrize("name", ["verify", "verify, mapped", "compare", "inspect", "dequantize"])
def test_reading_that_fails(server, files, name):
    """One sentence and exit code 6; an interruption and a short read are not noticed."""
    source, output, folder = files
    arguments = commands(*files)[name]
    (folder / "new").mkdir(exist_ok=True)
    server.warm_up(arguments=arguments, **TILES)
    watched = output if name in ("inspect", "dequantize") else source
    job = {"arguments": arguments, "source": str(watched), "destination": str(folder / "new"), **TILES}
    whole = server.run(**job)
    assert whole.exit == 0
    dice, told = random.Random(name), set()
    for code, (how, kinds) in CODES.items():
        calls = sum(whole.kinds["source"].get(kind, 0) for kind in kinds)
        for at in {1, *(dice.randint(1, calls) for _ in range(4))}:
            orders = {"at": at, "how": how, "error": getattr(errno, code, 0), "calls": {"source": kinds}}
            result = server.run(**job, orders=orders)
            trail = f"{name}: {code} at {at} ({result.kind} {result.path})\n{result.err}"
            if result.exit == 0:  # a look of Python's own, or the look for a pickle's first bytes
                assert result.kind in ("stat", "read"), trail
                continue
            assert result.exit in ({5, 6} if how == "end" else {6}), trail
            assert "Traceback" not in result.err and len(re.findall("^error: ", result.err, re.M)) == 1, trail
            told.add(code)
    assert told
    for how, error in (("fail", errno.EINTR), ("short", 0)):
        orders = {"at": 1, "how": how, "error": error, "sticky": how == "short", "calls": {"source": ["read"]}}
        assert server.run(**job, orders=orders).exit == 0


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EROFS"])
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
def test_dequantize_leaves_nothing_behind(server, files, code, sticky):
    _, _, folder = files
    arguments = commands(*files)["dequantize"]
    new = folder / "new"
    new.mkdir(exist_ok=True)
    (new / "plain.safetensors").write_bytes(b"old")
    kinds = KINDS[KINDS.index("write") : KINDS.index("unlink")]
    job = {"arguments": arguments, "source": "/nowhere", "destination": str(new), **TILES}
    dice, calls = random.Random(code), sum(server.run(**job).kinds["destination"].get(kind, 0) for kind in kinds)
    (new / "plain.safetensors").write_bytes(b"old")
    for at in {1, 2, calls, calls - 1, *(dice.randint(1, calls) for _ in range(3))}:
        orders = {"at": at, "how": "fail", "error": getattr(errno, code), "sticky": sticky, "calls": {"destination": kinds}}
        result = server.run(**job, orders=orders)
        trail = f"{code} at {at} ({result.kind} {result.path})\n{result.err}"
        assert result.exit == 7 and "Traceback" not in result.err, trail
        left = {path.name: path.read_bytes() for path in new.iterdir()}
        # The last call makes the name durable: the new file has it by then, and is whole.
        assert list(left) == ["plain.safetensors"] and (left["plain.safetensors"] == b"old" or at == calls), trail
