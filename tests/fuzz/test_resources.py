"""What a hostile file may cost: memory in proportion to the bytes that are really there, time in proportion to the same.

Each attack is read in a process of its own, whose peak of resident memory is measured. A header of a million well-formed tensors
takes some ten times its own length; the worst that was found takes less than twenty times, and nothing takes more because a
number says so.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

TIMES = 22  # memory, in lengths of what is read
SPARE = 96 << 20  # bytes, whatever the length
CPU_SECONDS = 120  # for 100 MB; the slowest takes a fifth of that
LENGTH = 8 << 20
FULL = 100_000_000  # the format's limit

READ = """
import resource, sys
from streamquant.checkpoint.reader import open_checkpoint
from streamquant.errors import StreamquantError
from streamquant.stored import read_contents
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
try:
    found = read_contents(open_checkpoint(sys.argv[1]))
    what = str(len(found.checkpoint.tensors)) + " tensors"
except StreamquantError as error:
    what = type(error).__name__
    assert len(str(error)) < 5000, len(str(error))
print(peak() - before, what)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")


def cost(path: Path) -> tuple[int, str]:
    """(bytes at the peak over the idle process, what came of it)."""
    code = READ.format(seconds=CPU_SECONDS)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, _, what = done.stdout.strip().partition(" ")
    return int(peak), what


def filled(start: str, unit: str, end: str, length: int = LENGTH) -> bytes:
    """`start`, as many units as fit into the length, `end`."""
    count = (length - len(start) - len(end)) // len(unit)
    return (start + unit * count + end).encode()


def numbered(start: str, unit: str, end: str, length: int = LENGTH) -> bytes:
    """The same with a number in each unit, so that keys differ."""
    count = (length - len(start) - len(end)) // (len(unit % 10**7) + 1)
    return (start + ",".join(unit % (10**7 + number) for number in range(count)) + end).encode()


def million() -> bytes:
    entry = '"model.diffusion_model.blocks.%d.w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return numbered("{", entry, "}", FULL)


SHAPE = '{"a":{"dtype":"U8","data_offsets":[0,1],"shape":['
# Name -> (how the header is made, when it is asked for: some are of 100 MB; what comes of it)
HEADERS = {
    "lists": (partial(filled, '{"a":[', "[],", "[]]}"), "TensorEntryError"),
    "lists in lists": (partial(filled, '{"a":[', "[[]],", "[]]}"), "TensorEntryError"),
    "objects": (partial(filled, '{"a":[', "{},", "{}]}"), "TensorEntryError"),
    "objects with a key": (partial(filled, '{"a":[', '{"":0},', "{}]}"), "TensorEntryError"),
    "objects just allowed": (partial(filled, '{"a":[', '{"aaaaaaaaaa":0},', "{}]}"), "TensorEntryError"),
    "brackets without end": (partial(filled, '{"a":', "[", ""), "TensorEntryError"),
    "brackets in a name": (partial(filled, '{"', "[{", '":0}'), "TensorEntryError"),
    "numbers": (partial(filled, SHAPE, "999,", "1]}}"), "ShapeError"),
    "zeros": (partial(filled, SHAPE, "0,", "1]}}"), "SizeMismatchError"),
    "fractions": (partial(filled, '{"a":[', "1.5,", "1]}"), "TensorEntryError"),
    "words": (partial(filled, '{"a":[', '"ab",', "1]}"), "TensorEntryError"),
    "digits": (partial(filled, '{"a":', "9", "}"), "TensorEntryError"),
    "one key again and again": (partial(filled, "{", '"a":0,', '"a":0}'), "DuplicateKeyError"),
    "short entries": (partial(numbered, "{", '"%d":0', "}"), "TensorEntryError"),
    "metadata": (partial(numbered, '{"__metadata__":{', '"%d":""', "}}"), "0 tensors"),
    "control characters": (partial(filled, "{", "\x07", ""), "HeaderNotJsonError"),
    "escapes": (partial(filled, '{"', "\\u0041", '":0}'), "TensorEntryError"),
    "spaces": (partial(filled, "{}", " ", ""), "0 tensors"),
    "JSON bomb in the metadata": (
        partial(filled, '{"__metadata__":{"_quantization_metadata":"', "[],", '"}}'), "MetadataError"),
    "our own entry a bomb": (partial(filled, '{"__metadata__":{"streamquant":"', "[[", '"}}'), "0 tensors"),
    "100 MB of control characters": (partial(filled, "{", "\x07", "", FULL), "HeaderNotJsonError"),
    "100 MB of lists": (partial(filled, '{"a":[', "[],", "[]]}", FULL), "TensorEntryError"),
    "100 MB, more than a million tensors": (million, "1111111 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_memory_for_a_header(name, tmp_path):
    make, expected = HEADERS[name]
    raw = make()
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    peak, what = cost(path)
    assert what == expected
    assert peak <= TIMES * len(raw) + SPARE, f"{peak / len(raw):.1f} times its length"


@pytest.mark.parametrize("start", ['{"weight_map":[', '{"metadata":[', "["])
@pytest.mark.parametrize("unit", ["[],", '{"":0},', "1,", '"ab",'])
def test_memory_for_an_index(start, unit, tmp_path):
    path = tmp_path / "hostile.safetensors.index.json"
    path.write_bytes(filled(start, unit, "0]}" if start[0] == "{" else "0]"))
    peak, what = cost(path)
    assert what == "IndexFileError" and peak <= TIMES * LENGTH + SPARE, f"{what}, {peak / LENGTH:.1f} times its length"


def test_an_index_of_ten_thousand_missing_shards(tmp_path):
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {f"{n}.weight": f"{n}.safetensors" for n in range(10_000)}}))
    assert cost(path)[1] == "ShardMissingError"


@pytest.mark.parametrize("dimension", [2**31, 2**61 - 1, 2**63, 2**64, 10**30])
@pytest.mark.parametrize("dtype", ["F64", "F4"])
def test_nothing_is_allocated_because_a_shape_says_so(dimension, dtype, tmp_path):
    """Claims of exabytes, with offsets that agree, in files of a few hundred bytes."""
    bits = {"F64": 64, "F4": 4}[dtype]
    end = dimension * bits // 8
    path = tmp_path / "hostile.safetensors"
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": [dimension], "data_offsets": [0, end]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    peak, what = cost(path)
    assert what in ("TruncatedFileError", "ShapeError", "TensorEntryError", "SizeMismatchError") and peak < SPARE


@pytest.mark.parametrize("length", [2**20, 10**8, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_nothing_is_allocated_because_a_length_says_so(length, tmp_path):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":')
    peak, what = cost(path)
    assert what in ("HeaderPastEndError", "HeaderLengthError") and peak < SPARE


def test_a_process_of_little_memory_refuses_too(tmp_path):
    """The bound holds in earnest: a bomb that would take a hundred lengths is refused where there is no room for it."""
    raw = HEADERS["objects with a key"][0]()
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    code = READ.format(seconds=CPU_SECONDS).replace("try:", "size = int(open('/proc/self/statm').read().split()[0]) * 4096 + "
                                                    f"{TIMES * LENGTH + SPARE}\nresource.setrlimit(resource.RLIMIT_AS, (size, size))\ntry:")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and "TensorEntryError" in done.stdout, done.stderr[-2000:]
