"""The memory ceiling, measured from outside: what a conversion takes over the idle process, whatever the file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_checkpoints import EVERY_FORMAT

from benchmarks.checkpoints import write_checkpoint
from benchmarks.process import anonymous_bytes
from benchmarks.shapes import flux_of_size, one_tensor
from streamquant.transcode import convert

MIB = 1 << 20
BUDGET = 256 * MIB
FORMATS = ["fp8-tensor", "int8-row", "nf4", "nf4-double"]
RUN = """
import sys
sys.path[:0] = [{tests!r}, {repository!r}]
from small_checkpoints import EVERY_FORMAT
from streamquant.transcode import convert
print("idle", flush=True)
input()
for name in {formats!r}:
    options = dict(memory_budget={budget}, io={io!r}, threads={threads}, force=True)
    convert({source!r}, {destination!r}, EVERY_FORMAT[name], **options)
    print(name, flush=True)
    input()
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")


def peaks(source: Path, formats: list[str], io: str = "mmap", threads: int = 2) -> dict[str, int]:
    """Format -> most anonymous memory while converting to it, over the process that has imported but not begun.

    The formats are converted one after the other in one process; what one leaves allocated counts against the next.
    """
    tests = Path(__file__).resolve().parent.parent
    code = RUN.format(
        tests=str(tests), repository=str(tests.parent), formats=formats, source=str(source),
        destination=str(source.with_name("out.safetensors")), budget=BUDGET, io=io, threads=threads,
    )  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "idle\n"
        idle = anonymous_bytes(process.pid)
        os.set_blocking(process.stdout.fileno(), False)
        found = {}
        for name in formats:
            print(file=process.stdin, flush=True)
            peak = 0
            while not process.stdout.readline():
                peak = max(peak, anonymous_bytes(process.pid))
                assert process.poll() is None, "the conversion broke down"
                time.sleep(0.002)
            found[name] = peak - idle
        return found
    finally:
        process.kill()
        process.communicate()


def test_many_layers(tmp_path):
    """600 MB, and a quarter of it: the larger file takes no more memory."""
    large, small = tmp_path / "large.safetensors", tmp_path / "small.safetensors"
    write_checkpoint(large, flux_of_size(600_000_000).tensors())
    write_checkpoint(small, flux_of_size(150_000_000).tensors())
    found = peaks(large, FORMATS)
    assert all(0 < peak <= BUDGET for peak in found.values()), found
    less = peaks(small, ["fp8-tensor"])
    assert found["fp8-tensor"] <= less["fp8-tensor"] + 24 * MIB, (found, less)


def test_one_layer_of_600_megabytes(tmp_path):
    path = tmp_path / "one.safetensors"
    write_checkpoint(path, one_tensor(600_000_000))
    found = peaks(path, FORMATS)
    assert all(0 < peak <= BUDGET for peak in found.values()), found


def test_read_into_memory_of_our_own_with_many_threads(tmp_path):
    """A sparse file of 1.2 GB: with pread every tile is anonymous memory; with 8 threads there are 16 of them."""
    path = tmp_path / "sparse.safetensors"
    write_checkpoint(path, flux_of_size(1_200_000_000).tensors(), sparse=True)
    found = peaks(path, ["int8-row"], io="pread", threads=8)
    assert 0 < found["int8-row"] <= BUDGET, found


@pytest.mark.parametrize("name", ["nf4-double", "int8-row-rotated"])
def test_a_quantized_source_is_decoded_within_the_budget(tmp_path, name):
    path = tmp_path / "one.safetensors"
    write_checkpoint(path, one_tensor(400_000_000))
    convert(path, tmp_path / "quantized.safetensors", EVERY_FORMAT[name])
    found = peaks(tmp_path / "quantized.safetensors", ["fp8-tensor", "fp8-block", "fp4"])
    assert all(0 < peak <= BUDGET for peak in found.values()), found
