"""GGUF files, written by the package that defines them."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from streamquant import errors
from streamquant.stored.gguf import read_gguf

gguf = pytest.importorskip("gguf", reason="needs the gguf package to make such files")


@pytest.fixture
def path(tmp_path):
    """Three types, a name, a long text and a list."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "flux")
    writer.add_name("a model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_description("long " * 200)
    writer.add_array("a.list", [1, 2, 3])
    writer.add_tensor("plain", np.zeros((64, 256), np.float32))
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    kinds = gguf.GGMLQuantizationType
    for block in range(2):
        writer.add_tensor(f"blocks.{block}", gguf.quants.quantize(values, kinds.Q8_0), raw_dtype=kinds.Q8_0)
    writer.add_tensor("packed", np.zeros((64, 144), np.uint8), raw_dtype=kinds.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def test_types_and_metadata(path):
    found = read_gguf(path)
    assert (found.architecture, found.file_type, found.tensors, found.version, found.complete) == ("flux", "Q4_K_M", 4, 3, True)
    rows = [(kind.name, kind.tensors, kind.weights, kind.nbytes, kind.bits_per_weight) for kind in found.types]
    assert rows == [("F32", 1, 16384, 65536, 32.0), ("Q8_0", 2, 32768, 34816, 8.5), ("Q4_K", 1, 16384, 9216, 4.5)]
    assert found.metadata["general.name"] == "a model" and found.metadata["a.list"] == "3 entries"
    assert len(found.metadata["general.description"]) < 400


def test_without_the_package_it_is_named_and_what_to_do(path, monkeypatch):
    from click.testing import CliRunner

    from streamquant.cli import main

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name, *rest))
    found = read_gguf(path)
    assert found.tensors == 4 and not found.complete
    shown = CliRunner().invoke(main, ["inspect", str(path)])
    assert shown.exit_code == 0 and "pip install gguf" in shown.stdout


@pytest.mark.parametrize("end", [4, 20, 24, 100, 700, 3000, 40_000])
def test_a_file_cut_short_is_an_error(path, end):
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(errors.HeaderError, match="GGUF file whose header is damaged"):
        read_gguf(path)


def test_counts_that_no_file_holds_take_no_memory(path):
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little") * 2 + bytes(100))
    with pytest.raises(errors.HeaderError, match="too small"):
        read_gguf(path)
