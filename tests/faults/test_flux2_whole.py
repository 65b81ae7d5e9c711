"""The full shape of Flux.2-dev, 64 GB, converted whole: killed with `kill -9` and resumed five times, and not at all.

The source is sparse (all zeros, no disk taken), but for the weights of a few layers that are written into it, so that
there is something to be right or wrong. One output is on the disk at a time.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from faults.record import record

from benchmarks.checkpoints import write_checkpoint
from benchmarks.shapes import FluxShape
from streamquant.checkpoint.header import read_header

KILLS = 5
WRITTEN = 12  # tensors that hold weights, spread over the file
FORMATS = {"NF4": ["--bnb-4bit", "--rtn"], "FP8": ["--rtn"]}
NEEDED = 36_000_000_000  # bytes of disk, for the larger of the two outputs


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux2")
    if shutil.disk_usage(folder).free < NEEDED:
        pytest.skip(f"the disk of {folder} has not the {NEEDED / 1e9:.0f} GB free that one output takes")
    path = folder / "flux2-dev.safetensors"
    write_checkpoint(path, FluxShape().tensors(), sparse=True)
    header = read_header(path)
    tensors = [tensor for tensor in header.tensors.values() if tensor.nbytes > 1 << 20]
    dice = np.random.default_rng(0)
    with path.open("r+b") as file:
        for tensor in tensors[:: max(len(tensors) // WRITTEN, 1)]:
            values = (dice.standard_normal(1 << 22) * 0.02).astype(np.float32)
            file.seek(header.data_start + tensor.start + tensor.nbytes // 3 // 2 * 2)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes()[: tensor.nbytes // 2])
    yield path
    path.unlink()


def command(source: Path, destination: Path, flags: list[str]) -> list[str]:
    program = [sys.executable, "-m", "streamquant", "convert", str(source), "-o", str(destination), "--flux2", "--quiet"]
    return [*program, "--memory-budget", "512MiB", *flags]


def run(arguments: list[str], kill_after: float | None = None) -> bool:
    """Whether the command came to its end; killed after so many seconds it did not."""
    process = subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.PIPE)
    try:
        _, message = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False
    assert process.returncode == 0, message.decode()
    return True


def digest(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            hasher.update(chunk)
    return hasher.hexdigest()


@pytest.mark.long
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("name", FORMATS)
def test_killed_and_resumed_five_times(source, tmp_path, name):
    destination = tmp_path / "out.safetensors"
    began = time.monotonic()
    assert run(command(source, destination, FORMATS[name]))
    uninterrupted = time.monotonic() - began
    size, expected = destination.stat().st_size, digest(destination)
    destination.unlink()

    dice, kills, resume = random.Random(name), 0, []
    for _ in range(KILLS):
        # Each run gets about a seventh of the way; one that is done early would not have been killed.
        if run(command(source, destination, [*FORMATS[name], *resume]), uninterrupted * dice.uniform(0.08, 0.16) + 1):
            break
        assert not destination.exists()
        kills, resume = kills + 1, ["--resume"]
    assert kills == KILLS, "it was done before it could be killed"
    assert run(command(source, destination, [*FORMATS[name], *resume]))
    assert (destination.stat().st_size, digest(destination)) == (size, expected)
    assert [path.name for path in tmp_path.iterdir()] == [destination.name]
    destination.unlink()
    read = source.stat().st_size
    detail = f"{name}: {read / 1e9:.1f} GB to {size / 1e9:.1f} GB, {uninterrupted:.0f} s at one go, xxh3_128 {expected}"
    record("Flux.2-dev whole, kill -9 and resume", kills, detail)
