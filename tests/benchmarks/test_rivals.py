"""Other libraries in processes of their own: what comes back is their weight, and failures are answers."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import decode, kernels, rivals
from benchmarks.peers import Peer, PeerError
from benchmarks.results import Result
from benchmarks.rivals import BESIDE, LIBRARIES, Crew, working

WEIGHT = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every library is taken from this environment, where some of them are."""
    monkeypatch.setattr(Peer, "install", lambda peer, workdir: Path(sys.executable))
    (tmp_path / "peers").mkdir()
    return tmp_path


@pytest.fixture
def bitsandbytes(here: Path) -> Iterator[rivals.Worker]:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes to be measured")
    with working(LIBRARIES["bitsandbytes"], {"a": WEIGHT, "b": WEIGHT[:64].float()}, here, threads=1) as worker:
        yield worker


def test_weights_come_back_with_the_error_and_the_bytes_of_their_format(bitsandbytes: rivals.Worker) -> None:
    weights = 128 * 256 + 64 * 256
    for format, bits, error in (("nf4", 4.5, 0.1), ("nf4-double", 4.15, 0.1), ("fp4", 4.5, 0.13), ("int8-row", 8.1, 0.01)):
        seconds, size = bitsandbytes.quantize(format)
        decoded = bitsandbytes.decoded(format)
        assert seconds > 0 and 8 * size / weights == pytest.approx(bits, rel=0.1)
        for name, weight in (("a", WEIGHT.float()), ("b", WEIGHT[:64].float())):
            assert decoded[name].dtype == torch.float32
            assert error / 2 < (decoded[name] - weight).norm() / weight.norm() < error
    assert bitsandbytes.decode("nf4") > 0, "what was made before is still there"


def test_an_error_is_an_answer_and_the_worker_goes_on(bitsandbytes: rivals.Worker) -> None:
    with pytest.raises(PeerError, match="Error"):
        bitsandbytes.quantize("no-such-format")
    with pytest.raises(PeerError, match="KeyError: 'nf4'"):
        bitsandbytes.decode("nf4")
    assert bitsandbytes.quantize("nf4")[0] > 0


def test_a_worker_that_dies_is_an_error(bitsandbytes: rivals.Worker) -> None:
    bitsandbytes._process.kill()
    with pytest.raises(PeerError, match="ended with exit code -9"):
        bitsandbytes.quantize("nf4")


def test_a_library_that_is_not_there_says_so(here: Path) -> None:
    if importlib.util.find_spec("sdnq") is not None:
        pytest.skip("sdnq is installed here")
    with (
        working(LIBRARIES["sdnq"], {"a": WEIGHT}, here, threads=1) as worker,
        pytest.raises(PeerError, match="No module named 'sdnq'"),
    ):
        worker.quantize("int8")


def test_every_format_beside_ours_is_one_of_its_library_s() -> None:
    for operation, others in BESIDE.items():
        assert operation in kernels.FORMATS
        for package, format in others:
            assert format in LIBRARIES[package].formats


def test_kernels_and_decoding_run_with_other_libraries_in_turn(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes to be measured")
    monkeypatch.setattr(rivals, "BESIDE", {"fp4": (("bitsandbytes", "fp4"), ("sdnq", "uint4"))})
    monkeypatch.setattr(decode, "devices", lambda: ["cpu"])
    console = Console(file=io.StringIO(), width=200)
    rows: list[Result] = []
    kernels.run((128, 256), 2, 1, console, ["fp4"], lambda *_: [("ours", lambda: abs)], rows.extend, here)
    decode.run(console, (128, 256), 2, 1, ["fp4"], lambda _, weight: [("ours", lambda: lambda: weight)], rows.extend, here)
    found = [(row.benchmark, row.contender, row.runs) for row in rows]
    expected = [("ours", 2), ("bitsandbytes 0.50.2", 2), ("sdnq 0.2.8 uint4", 0)]
    assert found == [(benchmark, *rest) for benchmark in ("kernels", "decode") for rest in expected]
    assert rows[1].ratio_to == "ours" and "sdnq" in rows[2].note


def test_a_library_is_started_once_and_one_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[str] = []

    def install(peer: Peer, workdir: Path) -> Path:
        tried.append(peer.name)
        raise PeerError("cannot be installed: no network")

    monkeypatch.setattr(Peer, "install", install)
    with Crew(WEIGHT, tmp_path, 1) as crew:
        for _ in range(2):
            for name, load in crew.entries("fp4", decodes=False):
                assert name == "bitsandbytes 0.50.2"
                with pytest.raises(PeerError, match="no network"):
                    load()
    assert tried == ["bitsandbytes 0.50.2"]
