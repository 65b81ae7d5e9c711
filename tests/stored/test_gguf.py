"""GGUF files, written by the package that defines them."""

from __future__ import annotations

import importlib.util
import struct
import tracemalloc
from pathlib import Path

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
    assert (found.tensors, found.architecture, found.types, found.complete) == (4, "flux", (), False)
    assert found.metadata["a.list"] == "3 entries"
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


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def written(folder: Path, *parts: bytes, tensors: int = 0, entries: int = 0, version: int = 3) -> Path:
    """A file of these parts, which need not be right, behind the counts."""
    path = folder / "made.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts))
    return path


def tensor(name: str | bytes, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    """What a header lists of a tensor; kind 0: F32, 2: Q4_0."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize("kind", [0, 7, 8, 9, 12])
def test_the_length_of_a_list_takes_no_time_and_no_memory(tmp_path, kind):
    """The gguf package looped for it, and kept an object for each entry that was not there: 4 GB in half a minute."""
    path = written(tmp_path, text("a"), struct.pack("<IIQ", 9, kind, 1 << 60), entries=1)
    tracemalloc.start()
    try:
        with pytest.raises(errors.HeaderError, match="the file ends before it does"):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_of_123_tensors_is_one_too(tmp_path):
    """Byte 8 is then a brace, and it was taken for a safetensors file."""
    listed = [tensor(f"t.{number}", 8, offset=32 * number) for number in range(123)]
    assert read_gguf(written(tmp_path, *listed, bytes(31 + 123 * 32), tensors=123)).weights == 123 * 8


def test_a_file_in_the_other_byte_order(tmp_path):
    """It was read as version 50331648, of no tensors."""
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "flux", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "big.gguf")
    assert (found.version, found.architecture, found.tensors, found.weights) == (3, "flux", 1, 32)


def test_a_mix_that_has_no_name_yet_is_shown_as_its_number(tmp_path):
    """It was dropped."""
    found = read_gguf(written(tmp_path, text("general.file_type"), struct.pack("<II", 4, 999), entries=1))
    assert found.file_type is None and found.metadata == {"general.file_type": 999}


def test_a_long_text_is_cut_between_characters(tmp_path):
    for character in "aé€😀":
        found = read_gguf(written(tmp_path, text("a"), struct.pack("<I", 8), text(character * 5000), entries=1))
        assert found.metadata == {"a": character * 300 + "…"}


@pytest.mark.parametrize(
    ("parts", "counts", "said"),
    [
        ([text("a"), struct.pack("<IQ", 8, 1 << 60), b"ab"], {"entries": 1}, "the file ends before it does"),
        ([text("a"), struct.pack("<IQ", 8, 3), b"ab"], {"entries": 1}, "the file ends before it does"),
        ([text("a"), struct.pack("<I", 13), bytes(8)], {"entries": 1}, "of kind 13, which there is not"),
        ([text("a"), struct.pack("<IIQ", 9, 13, 1), bytes(8)], {"entries": 1}, "list in it is of kind 13"),
        ([text("a"), struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 20], {"entries": 1}, "more than 8 deep"),
        ([text("a"), struct.pack("<IB", 0, 1), text("a"), struct.pack("<IB", 0, 1)], {"entries": 2}, "a is there twice"),
        ([text("\x1b[2J"), struct.pack("<IB", 0, 1)] * 2, {"entries": 2}, "entry \\\\x1b\\[2J is there twice"),
        ([text("a" * 70_000), struct.pack("<IB", 0, 1)], {"entries": 1}, "has 70,000 bytes"),
        ([text(b"\xff"), struct.pack("<IB", 0, 1)], {"entries": 1}, "not UTF-8"),
        ([text("a"), struct.pack("<I", 8), text(b"\xff" * 5001)], {"entries": 1}, "not UTF-8"),
        ([bytes(13 * 100_001)], {"entries": 100_001}, "more than any model"),
        ([text("general.alignment"), struct.pack("<II", 4, 24)], {"entries": 1}, "not a power of two"),
        ([text("general.alignment"), struct.pack("<II", 4, 0)], {"entries": 1}, "not a power of two"),
        ([text("general.alignment"), struct.pack("<If", 6, 32.0)], {"entries": 1}, "not a power of two"),
        ([tensor("a", 8), tensor("a", 8), bytes(99)], {"tensors": 2}, "a is there twice"),
        ([tensor("a", 8), tensor("b", 8), bytes(31 + 32)], {"tensors": 2}, "lie over each other"),
        ([tensor("a", 8, offset=32), bytes(31 + 32)], {"tensors": 1}, "a lies outside the file"),
        ([tensor("a", (1 << 60) - 1), bytes(99)], {"tensors": 1}, "a lies outside the file"),
        ([tensor("a", 1 << 63, 1 << 63), bytes(99)], {"tensors": 1}, "a is larger than any file"),
        ([tensor("a", 0, 1 << 63), bytes(99)], {"tensors": 1}, "a is larger than any file"),
        ([tensor("a", *[1] * 33), bytes(99)], {"tensors": 1}, "a has 33 dimensions"),
        ([text("a"), struct.pack("<I", (1 << 32) - 1), bytes(99)], {"tensors": 1}, "a has 4,294,967,295 dimensions"),
        ([tensor("a", 33, 32, kind=2), bytes(999)], {"tensors": 1}, "rows of 33 weights, and Q4_0 has blocks of 32"),
        ([tensor("a", 8, kind=1000), bytes(99)], {"tensors": 1}, "of type 1000, which the gguf package does not know"),
        ([bytes(40)], {"version": 1}, "version 1, and only 2 and 3"),
        ([bytes(40)], {"version": 0}, "version 0, and only 2 and 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, parts, counts, said):
    with pytest.raises(errors.HeaderError, match=said) as raised:
        read_gguf(written(tmp_path, *parts, **counts))
    assert str(raised.value).isprintable() and str(raised.value).endswith(".")
