"""Every fuzzer for a few seconds, from its seeds: about a minute in all. `make fuzz` goes on for longer."""

from __future__ import annotations

import importlib.util
import os

import pytest
from fuzz.campaign import SHARES, fuzz, write_corpus

SECONDS = int(os.environ.get("FUZZ_TEST_SECONDS", "65"))  # of all together

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is missing, which has wheels for Linux on x86-64 alone"
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.mark.parametrize("target", SHARES)
def test_nothing_but_refusals(target, corpus, tmp_path):
    if target == "gguf":
        pytest.importorskip("gguf", reason="needs the gguf package, whose reader is asked too")
    done = fuzz(target, corpus, tmp_path, SECONDS * SHARES[target] // sum(SHARES.values()), "-seed=1", "-timeout=30")
    assert done.code == 0, f"{done.line()}\n{done.output[-4000:]}"
    assert done.runs > 50 and done.coverage > 20, done.line()
