"""Sessions with stand-ins for the converters: they alternate, and nobody is left out in silence."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import cache, convert, memory, ours, race
from benchmarks.cases import CASES, choose
from benchmarks.peers import CONVERT_TO_QUANT, Peer, PeerError
from benchmarks.race import Contender
from benchmarks.results import Result


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=400)


@pytest.fixture
def rows() -> list[Result]:
    return []


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "baseline", lambda folder, console: 1000)


def copier(name: str, log: list[str]) -> Contender:
    def command(source: Path, destination: Path) -> list[str]:
        log.append(name)
        return ["cp", str(source), str(destination)]

    return Contender(name, command)


def liar(name: str) -> Contender:
    return Contender(name, lambda source, destination: [sys.executable, "-c", "print('FATAL: nothing done')"])


def test_contenders_alternate(tmp_path: Path, console: Console) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 1000)
    log: list[str] = []
    outcomes = race.race([copier("a", log), copier("b", log)], source, tmp_path, 3, cache.keep, console)
    assert log == ["a", "b"] * 3
    assert [(len(one.seconds), one.output_bytes, one.cache) for one in outcomes] == [(3, 1000, "warm")] * 2
    assert not (tmp_path / "a.safetensors").exists()


def test_success_without_a_file_is_a_failure(tmp_path: Path, console: Console) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    (outcome,) = race.race([liar("the liar")], source, tmp_path, 3, cache.keep, console)
    assert outcome.seconds == [] and "no output file: FATAL: nothing done" in outcome.failure
    assert "FATAL: nothing done" in (tmp_path / "the-liar.log").read_text()
    assert "the liar FAILED" in console.file.getvalue()


def test_a_full_disk_is_noticed_before_the_run(tmp_path: Path, console: Console) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(2**43)
    log: list[str] = []
    (outcome,) = race.race([copier("a", log)], source, tmp_path, 1, cache.keep, console)
    assert "bytes of disk" in outcome.failure and log == []


def test_convert_records_every_contender(
    tmp_path: Path, console: Console, rows: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(peer: Peer, workdir: Path) -> Path:
        raise PeerError("cannot be installed: no network")

    monkeypatch.setattr(Peer, "install", no_network)
    settings = convert.Settings(tmp_path, ("10MB",), runs=2)
    stand_in = copier("streamquant", [])
    convert.run(choose("nf4,fp8-row"), settings, cache.keep, console, lambda *_: stand_in, rows.extend)
    assert [row.contender for row in rows] == ["cp", "streamquant", CONVERT_TO_QUANT.name] * 2
    copied, converted, peer = rows[:3]
    assert converted.ratio_to == "cp" and converted.ratio == pytest.approx(converted.p50 / copied.p50)
    assert (converted.baseline_anonymous_bytes, converted.budget_bytes, converted.runs) == (1000, 2**30, 2)
    assert peer.note == "has no format for nf4" and peer.p50 is None
    assert rows[5].note == "cannot be installed: no network"
    assert "DOES NOT TAKE PART" in console.file.getvalue()


def test_memory_runs_every_budget(tmp_path: Path, console: Console, rows: list[Result]) -> None:
    stand_in = copier("streamquant", [])
    files, budgets = ("10MB", "one-tensor-10MB"), ("256MiB", "1GiB")
    memory.run(choose("nf4"), files, budgets, tmp_path, console, lambda *_: stand_in, rows.extend)
    assert [(row.case, row.source) for row in rows] == [("nf4", "10MB")] * 2 + [("nf4", "one-tensor-10MB")] * 2
    assert [row.budget_bytes for row in rows] == [2**28, 2**30] * 2


def test_the_peer_s_memory_is_measured_where_it_fits(tmp_path: Path, console: Console, rows: list[Result]) -> None:
    ours_log, peer_log = [], []
    memory.run(
        choose("nf4,fp8-row,int8-row"), ("10MB", "11MB-sparse"), ("1GiB",), tmp_path, console,
        lambda *_: copier("streamquant", ours_log), rows.extend, ["10MB"], lambda *_: copier("the peer", peer_log),
    )  # fmt: skip
    assert len(ours_log) == 6 and peer_log == ["the peer"]
    (peer,) = [row for row in rows if row.contender == "the peer"]
    assert (peer.case, peer.source, peer.budget_bytes) == ("fp8-row", "10MB", None), "its first format, once"


def test_a_sparse_source_is_not_copied_and_the_peer_gets_none_too_large(
    tmp_path: Path, console: Console, rows: list[Result]
) -> None:
    settings = convert.Settings(tmp_path, ("20MB-sparse",), runs=1, peer_largest="10MB")
    convert.run(choose("fp8-row"), settings, cache.keep, console, lambda *_: copier("streamquant", []), rows.extend)
    copied, converted = rows
    assert (copied.contender, copied.p50, copied.note) == ("cp", None, "not run: the source is sparse")
    assert converted.p50 > 0 and converted.ratio is None and converted.source == "20MB-sparse"


def test_our_command_line() -> None:
    contender = ours.contender(CASES["fp8-block"], "1GiB", threads=2)
    _, *arguments = contender.command(Path("in"), Path("out"))
    expected = "-m streamquant convert in -o out --fp8 --scaling-mode block --rtn --flux2 --force --quiet"
    assert " ".join(arguments) == f"{expected} --memory-budget 1GiB --threads 2"


def test_an_unknown_case_is_refused() -> None:
    with pytest.raises(ValueError, match="no such case: fp9"):
        choose("nf4,fp9")
