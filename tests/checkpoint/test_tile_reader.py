"""Reading a checkpoint's data: any bytes of any tensor, and a source that changes under the reader's hands."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import NUMPY, floats, noise, of_values, save, save_shards

from streamquant import errors, open_checkpoint
from streamquant.checkpoint.header import DTYPE_BITS
from streamquant.checkpoint.reader import TileReader, torch_dtype

IO = ["mmap", "pread"]
TENSORS = {
    "w": floats(40, 30, seed=1),
    "f4": noise("F4", 3, 4, seed=2),
    "empty": noise("F32", 0, 7),
    "scalar": noise("F64", seed=3),
    "bytes": noise("U8", 10_001, seed=4),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    first = {name: TENSORS[name] for name in ("w", "empty", "bytes")}
    rest = {name: TENSORS[name] for name in ("f4", "scalar")}
    return open_checkpoint(save_shards(tmp_path_factory.mktemp("shards"), first, rest))


@settings(max_examples=100)
@given(st.sampled_from(list(TENSORS)), st.data(), st.sampled_from(IO))
def test_any_range_of_any_tensor(sharded, name, data, io):
    content = TENSORS[name].data
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, len(content)))
    with TileReader(sharded, io) as reader:
        assert bytes(reader.tile(sharded.tensors[name], begin, end)) == content[begin:end]


@pytest.mark.parametrize("io", IO)
def test_many_threads_read_the_same(sharded, io):
    with TileReader(sharded, io) as reader, ThreadPoolExecutor(8) as pool:
        tensor = sharded.tensors["bytes"]
        tiles = pool.map(lambda begin: bytes(reader.tile(tensor, begin, min(begin + 97, 10_001))), range(0, 10_001, 97))
        assert b"".join(tiles) == TENSORS["bytes"].data


def test_pages_given_back_read_the_same_again(sharded):
    with TileReader(sharded, "mmap") as reader:
        for tensor in sharded.tensors.values():
            for _ in range(2):
                assert bytes(reader.tile(tensor, 0, tensor.info.nbytes)) == TENSORS[tensor.name].data
                reader.release(tensor)


def test_a_short_read_is_continued(sharded, monkeypatch):
    """Network drives and signals make a read return less than was asked for."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    with TileReader(sharded, "pread") as reader:
        assert bytes(reader.tile(sharded.tensors["w"], 0, 2400)) == TENSORS["w"].data


def test_without_positioned_reads_threads_do_not_mix_up_offsets(sharded, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    test_many_threads_read_the_same(sharded, "pread")


# -- a source that changes between opening and reading


def truncate(path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def overwrite(path) -> None:
    """Other weights of the same size: only the time tells."""
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def replace(path) -> None:
    other = path.with_name("other")
    shutil.copy(path, other)
    os.utime(other, ns=(1, 1))
    other.rename(path)


def remove(path) -> None:
    path.unlink()


CHANGES = [truncate, append, overwrite, replace, remove]


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("change", CHANGES)
def test_source_changed_before_it_is_read(tmp_path, io, change):
    path = save(tmp_path / "m.safetensors", TENSORS)
    checkpoint = open_checkpoint(path)
    change(path)
    descriptors = set(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.SourceReadError, match=r"m\.safetensors"), TileReader(checkpoint, io):
        pytest.fail("opened")
    assert len(os.listdir("/proc/self/fd")) == len(descriptors), "a file was left open"


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("change", [truncate, append, overwrite])
def test_source_changed_while_it_is_read(tmp_path, io, change):
    path = save(tmp_path / "m.safetensors", TENSORS)
    checkpoint = open_checkpoint(path)
    with TileReader(checkpoint, io) as reader:
        reader.tile(checkpoint.tensors["w"], 0, 100)
        change(path)
        with pytest.raises(errors.SourceReadError, match="changed while it was being read"):
            reader.tile(checkpoint.tensors["w"], 100, 200)


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("change", [replace, remove])
def test_a_file_that_is_open_outlives_its_name(tmp_path, io, change):
    path = save(tmp_path / "m.safetensors", TENSORS)
    checkpoint = open_checkpoint(path)
    with TileReader(checkpoint, io) as reader:
        change(path)
        assert bytes(reader.tile(checkpoint.tensors["w"], 0, 2400)) == TENSORS["w"].data


def test_a_change_while_the_header_is_read_is_noticed(tmp_path, monkeypatch):
    from streamquant.checkpoint import reader as module

    path = save(tmp_path / "m.safetensors", TENSORS)
    read_header = module.read_header

    def slowly(shard):
        header = read_header(shard)
        overwrite(path)
        return header

    monkeypatch.setattr(module, "read_header", slowly)
    checkpoint = open_checkpoint(path)
    with pytest.raises(errors.SourceReadError), TileReader(checkpoint):
        pytest.fail("the header may be of one file and the weights of another")


@pytest.mark.parametrize("io", IO)
def test_a_device_that_fails(tmp_path, io, monkeypatch):
    path = save(tmp_path / "m.safetensors", TENSORS)
    checkpoint = open_checkpoint(path)

    def fail(*_):
        raise OSError(5, "Input/output error")

    with TileReader(checkpoint, io) as reader, monkeypatch.context() as broken:
        broken.setattr(os, "preadv" if io == "pread" else "fstat", fail)
        with pytest.raises(errors.SourceReadError, match="Input/output error"):
            reader.tile(checkpoint.tensors["w"], 0, 100)


# -- Checkpoint.read


@pytest.fixture(scope="module")
def readable(tmp_path_factory):
    tensors = {tag: noise(tag, 5, 3, seed=6) for tag in DTYPE_BITS if tag not in ("F4", "F6_E2M3", "F6_E3M2", "BOOL")}
    tensors |= {"scalar": of_values(np.float32(1.5), "F32"), "empty": noise("F16", 0, 4), "vector": floats(6, seed=7)}
    tensors |= {"F4": noise("F4", 4, 4), "flat": noise("F32", 4, 0)}
    return tensors, open_checkpoint(save(tmp_path_factory.mktemp("read") / "m.safetensors", tensors))


@pytest.mark.parametrize("tag", [*NUMPY, "I8", "U16", "I64", "BF16", "F8_E4M3", "F8_E8M0", "C64"])
@pytest.mark.parametrize(
    "rows", [(0, None), (1, 3), (4, 5), (0, 0), (3, 99), (5, 5), (7, 9), (-2, None), (2, -1), (3, 1)]
)
def test_rows_are_those_of_a_slice(readable, tag, rows):
    tensors, checkpoint = readable
    whole = torch.frombuffer(bytearray(tensors[tag].data), dtype=torch_dtype(tag)).view(5, 3)
    found = checkpoint.read(tag, *rows)
    assert (found.dtype, found.shape) == (whole.dtype, whole[rows[0] : rows[1]].shape)
    assert found.view(torch.uint8).equal(whole[rows[0] : rows[1]].contiguous().view(torch.uint8))


def test_scalars_vectors_and_empty_tensors(readable):
    tensors, checkpoint = readable
    assert checkpoint.read("scalar").shape == () and checkpoint.read("scalar").item() == 1.5
    assert checkpoint.read("vector", 2, 4).shape == (2,)
    assert checkpoint.read("empty").shape == (0, 4)
    assert checkpoint.read("flat", 1, 3).shape == (2, 0)


def test_a_dtype_torch_lacks_cannot_be_read(readable):
    with pytest.raises(errors.UnknownDtypeError, match="F4"):
        readable[1].read("F4")


def test_every_tag_is_a_torch_dtype_of_that_size_or_an_error():
    for tag, bits in DTYPE_BITS.items():
        try:
            assert torch_dtype(tag).itemsize * 8 == bits
        except errors.UnknownDtypeError:
            assert bits < 8


def test_reading_leaves_no_thread_and_no_descriptor(readable):
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    readable[1].read("F32")
    assert threading.active_count() <= before[0] and len(os.listdir("/proc/self/fd")) <= before[1]
