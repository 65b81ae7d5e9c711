"""What can be opened as a checkpoint, and the name of each way in which something cannot."""

from __future__ import annotations

import json
import os
import threading
import zipfile

import pytest
from small_checkpoints import Tensor, floats, noise, save, save_shards

from streamquant import errors, open_checkpoint

A = {"a.weight": floats(4, 8, seed=1), "a.bias": floats(4, seed=2)}
B = {"b.weight": floats(2, 8, seed=3)}


def refusal(path, kind: type[errors.CheckpointError]) -> str:
    """The message with which `path` is refused; only this very class will do."""
    with pytest.raises(errors.CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.type is kind, str(caught.value)
    return str(caught.value)


def test_single_file(tmp_path):
    path = save(tmp_path / "m.safetensors", A | B, {"format": "pt", "modelspec.title": "x"})
    checkpoint = open_checkpoint(path)
    assert {name: tensor.info.shape for name, tensor in checkpoint.tensors.items()} == {
        name: tensor.shape for name, tensor in (A | B).items()
    }
    assert checkpoint.metadata == {"format": "pt", "modelspec.title": "x"}
    assert checkpoint.size == path.stat().st_size
    assert checkpoint.data_bytes == sum(len(tensor.data) for tensor in (A | B).values())
    assert open_checkpoint(str(path)).tensors == checkpoint.tensors


def test_tensors_come_in_order_of_file_and_offset(tmp_path):
    index = save_shards(tmp_path, B, {"z.weight": floats(2, 2), "a.weight": floats(2, 2), "long": noise("I64", 2)})
    checkpoint = open_checkpoint(index)
    assert [(tensor.file, tensor.name) for tensor in checkpoint.tensors.values()] == [
        (0, "b.weight"), (1, "long"), (1, "a.weight"), (1, "z.weight"),
    ]  # fmt: skip


@pytest.mark.parametrize("given", ["index", "folder"])
def test_shards(tmp_path, given):
    index = save_shards(tmp_path / "model", A, B)
    checkpoint = open_checkpoint(index if given == "index" else tmp_path / "model")
    assert checkpoint.path == index
    assert [file.path.name for file in checkpoint.files] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert set(checkpoint.tensors) == set(A | B)
    assert checkpoint.metadata == {"format": "pt", "from shard 1": "yes", "from shard 2": "yes"}
    assert checkpoint.size == sum(file.path.stat().st_size for file in checkpoint.files)


def test_shards_in_subfolders_and_behind_symlinks(tmp_path):
    """As the Hugging Face cache keeps them: the snapshot's names are links into a folder of blobs."""
    blob = save(tmp_path / "blobs" / "0123abcd", A)
    snapshot = tmp_path / "snapshots" / "main" / "transformer"
    snapshot.mkdir(parents=True)
    (snapshot / "part.safetensors").symlink_to(blob)
    save(snapshot / "more" / "rest.safetensors", B)
    weight_map = dict.fromkeys(A, "part.safetensors") | dict.fromkeys(B, "more/rest.safetensors")
    (snapshot / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(snapshot).tensors) == set(A | B)


def test_diffusers_transformer_folder(tmp_path):
    folder = tmp_path / "transformer"
    save_shards(folder, A, B, stem="diffusion_pytorch_model")
    (folder / "config.json").write_text('{"_class_name": "Flux2Transformer2DModel"}')
    assert open_checkpoint(folder).path.name == "diffusion_pytorch_model.safetensors.index.json"


def test_diffusers_pipeline_folder_names_the_folder_to_give(tmp_path):
    save(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", A)
    (tmp_path / "model_index.json").write_text("{}")
    assert "/transformer" in refusal(tmp_path, errors.SourceMissingError)


def test_folder_with_one_file_ignores_our_own_partial_files(tmp_path):
    save(tmp_path / "only.safetensors", A)
    save(tmp_path / ".only-fp8.safetensors.0123abcd.partial", B)
    save(tmp_path / ".hidden.safetensors", B)
    assert set(open_checkpoint(tmp_path).tensors) == set(A)


def test_folder_without_a_checkpoint(tmp_path):
    assert "no .safetensors file" in refusal(tmp_path, errors.SourceMissingError)


def test_folder_with_several_checkpoints_names_them(tmp_path):
    save(tmp_path / "one.safetensors", A)
    save(tmp_path / "two.safetensors", B)
    message = refusal(tmp_path, errors.SourceMissingError)
    assert "one.safetensors" in message and "two.safetensors" in message


@pytest.mark.parametrize(
    "name", ["absent.safetensors", "absent.safetensors.index.json", "x" * 300, "nul\0.safetensors"]
)
def test_nothing_there(tmp_path, name):
    message = refusal(tmp_path / name, errors.SourceMissingError)
    assert message.isprintable()


def test_named_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    caught = []

    def attempt() -> None:
        try:
            open_checkpoint(tmp_path / "pipe.safetensors")
        except errors.StreamquantError as error:
            caught.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "opening a named pipe waits for ever"
    assert "not a regular file" in str(caught[0])


# -- the index


def write_index(folder, text: str | bytes):
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors.index.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '"x"', "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}',
        '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}', '{"metadata": {}}', b"\xff\xfe", "[" * 100_000,
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', '{"weight_map": {"a": ["x.safetensors"]}}',
    ],
)  # fmt: skip
def test_malformed_index(tmp_path, text):
    message = refusal(write_index(tmp_path, text), errors.IndexFileError)
    assert "model.safetensors.index.json" in message and message.isprintable() and len(message) < 500


def test_another_json_file_is_told_what_an_index_holds(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    assert "weight_map" in refusal(tmp_path / "config.json", errors.IndexFileError)


@pytest.mark.parametrize(
    "shard", ["../m.safetensors", "/etc/passwd", "x/../../m.safetensors", "..\\m.safetensors", "C:m.safetensors",
              "\\\\host\\share\\m", "", "..", "a\0b"],
)  # fmt: skip
def test_shard_outside_the_folder(tmp_path, shard):
    save(tmp_path / "m.safetensors", A)
    index = write_index(tmp_path / "inner", json.dumps({"weight_map": dict.fromkeys(A, shard)}))
    assert refusal(index, errors.ShardOutsideFolderError).isprintable()


def test_shard_missing(tmp_path):
    index = save_shards(tmp_path, A, B)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(index, errors.ShardMissingError)


def test_shard_that_is_a_folder_is_missing(tmp_path):
    (tmp_path / "m.safetensors").mkdir()
    refusal(write_index(tmp_path, '{"weight_map": {"a": "m.safetensors"}}'), errors.ShardMissingError)


def test_shard_lacking_a_listed_tensor(tmp_path):
    index = save_shards(tmp_path, A, B, **{"c.weight": "model-00001-of-00002.safetensors"})
    message = refusal(index, errors.ShardContentError)
    assert "lacks 'c.weight'" in message and "model-00001-of-00002.safetensors" in message


def test_shard_with_an_unlisted_tensor(tmp_path):
    index = save_shards(tmp_path, A, B)
    save(tmp_path / "model-00002-of-00002.safetensors", B | {"extra": floats(1)})
    assert "'extra', which is not listed" in refusal(index, errors.ShardContentError)


def test_two_shards_with_one_tensor(tmp_path):
    index = save_shards(tmp_path, A, B | {"a.bias": floats(4)})
    assert "'a.bias', which is not listed" in refusal(index, errors.ShardContentError)


def test_malformed_shard_is_named(tmp_path):
    index = save_shards(tmp_path, A, B)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model-00002-of-00002.safetensors" in refusal(index, errors.TruncatedFileError)


# -- files of other kinds


def a_zip(path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 123456789\n"
KINDS = {
    "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(40),
    "a PyTorch file (a zip archive of a pickle": a_zip,
    "a Python pickle": b"\x80\x02}q\x00." + bytes(40),
    "a Python pickle (": b"\x80\x05\x95\x0b\x00\x00\x00\x00\x00\x00\x00}." + bytes(40),
    "numpy": b"\x93NUMPY\x01\x00" + bytes(40),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(40),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(40),
    "git lfs pull": LFS_POINTER,
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_file_are_named(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    content = KINDS[kind]
    content(path) if callable(content) else path.write_bytes(content)
    assert kind in refusal(path, errors.NotSafetensorsError)


def test_a_shard_of_another_kind_is_named_too(tmp_path):
    """A repository cloned without LFS: the index is there, every shard is a pointer."""
    index = save_shards(tmp_path, A, B)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(LFS_POINTER)
    assert "git lfs pull" in refusal(index, errors.NotSafetensorsError)


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_length_that_looks_like_another_format_is_no_such_format(tmp_path, length):
    """The first bytes of a safetensors file are a number, which any magic could equal; here are two that can be."""
    empty = save(tmp_path / "x.safetensors", {"n": Tensor("U8", (1,), b"\0")})
    padding = length - (len(empty.read_bytes()) - 8 - 1)
    raw = empty.read_bytes()
    empty.write_bytes(length.to_bytes(8, "little") + raw[8:-1] + b" " * padding + raw[-1:])
    assert set(open_checkpoint(empty).tensors) == {"n"}
