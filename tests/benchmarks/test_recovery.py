"""Kills and what they cost, with stand-ins whose behaviour is known to the byte."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import cache, faults
from benchmarks.cases import choose
from benchmarks.peers import CONVERT_TO_QUANT, PeerError
from benchmarks.race import Contender
from benchmarks.results import Result

CHUNK, CHUNKS = 1 << 18, 24
# Writes a file in chunks under a temporary name; when it goes on it writes the last chunk again that is there.
PROGRAM = f"""
import os, sys, time
destination, odd = sys.argv[1], sys.argv[2] == "odd"
partial = destination + ".partial"
done = 0
if "--resume" in sys.argv:
    done = max(os.path.getsize(partial) // {CHUNK} - 1, 0)
with open(partial, "r+b" if done else "wb", buffering=0) as file:
    file.seek(done * {CHUNK})
    for index in range(done, {CHUNKS}):
        file.write(bytes([index + (odd and "--resume" in sys.argv)]) * {CHUNK})
        time.sleep(float(sys.argv[3]))
os.rename(partial, destination)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc/PID/io, which counts writes")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=300)


def writer(name: str = "streamquant", odd: bool = False, pause: float = 0.03) -> Contender:
    """pause: seconds after each chunk, so long that on a busy machine too it is met before its end."""

    def command(source: Path, destination: Path) -> list[str]:
        return [sys.executable, "-c", PROGRAM, str(destination), "odd" if odd else "even", str(pause)]

    return Contender(name, command)


def no_peer(case: object, workdir: Path) -> Contender:
    raise PeerError("cannot be installed: no network")


def test_bytes_written_again_are_counted(tmp_path: Path, console: Console) -> None:
    recorded: list[Result] = []
    rows = faults.run(
        choose("fp8-tensor"), "10MB", (0.25, 0.75), 1, tmp_path, cache.keep, console, True,
        lambda *_: writer(), no_peer, recorded.extend,
    )  # fmt: skip
    assert rows == recorded
    found = {(row.detail, row.metric): row for row in rows if row.contender == "streamquant"}
    assert {metric for moment, metric in found if moment == "killed at 25%"} == set(faults.METRICS)
    assert [metric for moment, metric in found if moment == "uninterrupted"] == ["seconds"]
    for moment in ("killed at 25%", "killed at 75%"):
        # The chunk it writes again, and the one whose end the kill may have cut.
        assert CHUNK <= found[moment, "bytes written again"].p50 <= 2 * CHUNK
        assert found[moment, "seconds"].output_bytes == CHUNK * CHUNKS
    (peer,) = [row for row in rows if row.contender == CONVERT_TO_QUANT.name]
    assert peer.note == "cannot be installed: no network" and peer.p50 is None
    assert not list((tmp_path / "faults" / "fp8-tensor").iterdir()), "nothing is left behind"


def test_a_tool_that_starts_again_loses_what_it_had(tmp_path: Path, console: Console) -> None:
    rows = faults.run(
        choose("fp8-tensor"), "10MB", (0.5,), 1, tmp_path, cache.keep, console, True,
        lambda *_: writer(), lambda *_: writer(CONVERT_TO_QUANT.name), lambda rows: None,
    )  # fmt: skip
    again = {row.metric: row.p50 for row in rows if row.contender == CONVERT_TO_QUANT.name and row.detail == "killed at 50%"}
    assert again["bytes written again"] >= CHUNK, "whatever it had written"
    assert {"share lost", "seconds lost"} <= set(again)


@pytest.mark.parametrize(
    "contender, why",
    [
        (writer(odd=True), "differs from the uninterrupted one's"),
        (Contender("streamquant", lambda source, destination: [sys.executable, "-c", "raise SystemExit(3)"]), "exit code 3"),
        (Contender("streamquant", lambda source, destination: [sys.executable, "-c", ""]), "no output file"),
    ],
)
def test_what_went_wrong_is_in_the_row(contender: Contender, why: str, tmp_path: Path, console: Console) -> None:
    (row,) = faults.run(
        choose("nf4"), "10MB", (0.5,), 1, tmp_path, cache.keep, console, False, lambda *_: contender, record=lambda rows: None
    )
    assert row.p50 is None and why in row.note
    assert "streamquant FAILED in nf4" in console.file.getvalue()


def test_a_run_that_is_done_before_the_kill_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(faults.FaultError, match="take a larger file"):
        faults.watch([sys.executable, "-c", ""], tmp_path / "log", lambda written, seconds: False)
