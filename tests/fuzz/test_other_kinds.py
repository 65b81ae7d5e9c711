"""Files of other kinds given to every command: named for what they are, with what to do, and never loaded; no code from a file."""

from __future__ import annotations

import ast
import gzip
import io
import pickle
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_checkpoints import floats, save

from streamquant import cli

ROOT = Path(__file__).resolve().parents[2]
RAN = []


class Trap:
    """Whoever unpickles it runs code."""

    def __reduce__(self):
        return (RAN.append, ("the pickle was loaded",))


def _torch(new: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"a.weight": torch.zeros(2, 2), "trap": Trap()}, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    return file.getvalue()


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/readme.txt", "x")
    return file.getvalue()


def _whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return save(Path(folder) / "whole.safetensors", {"a.weight": floats(64, 64)}).read_bytes()


WHOLE = _whole()
ONNX = b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:" + bytes(64)
# Name -> (bytes, what must be said of it: what it is, and what to do)
KINDS = {
    "model.pt": (_torch(True), ["PyTorch file (a zip archive of a pickle", "run code", "get the model as .safetensors"]),
    "disguised.safetensors": (_torch(True), ["PyTorch file (a zip archive of a pickle", "get the model as .safetensors"]),
    "legacy.pth": (_torch(False), ["pickle", "run code", "get the model as .safetensors"]),
    "protocol0.ckpt": (pickle.dumps({"a": Trap()}, protocol=0), ["pickle", "get the model as .safetensors"]),
    "pytorch_model.bin": (pickle.dumps({"a": Trap()}, protocol=4), ["pickle", "get the model as .safetensors"]),
    "raw.bin": (b"\xff" * 100, ["PyTorch file (or raw data)", "get the model as .safetensors"]),
    "old.tar": (_tar(), ["tar archive", "unpack it"]),
    "arrays.npz": (_npz(), ["numpy archive (.npz)", "save its arrays as safetensors"]),
    "some.zip": (_zip(), ["zip archive", "unpack it"]),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), ["HDF5", "save its weights as safetensors"]),
    "model.onnx": (ONNX, ["ONNX", "convert from the model's safetensors"]),
    "flax_model.msgpack": (b"\x82\xa6params\x80" + bytes(32), ["Flax", "save it as safetensors"]),
    "model.safetensors.gz": (gzip.compress(b"x" * 100), ["gzip", "unpack it first"]),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", ["Git LFS pointer", "git lfs pull"]),
    "page.safetensors": (b"<!DOCTYPE html>\n<html><title>\x1b[31mLog in</title></html>", ["web page", "download it again"]),
    "denied.safetensors": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ["web page", "download it again"]),
    "error.safetensors": (b'{"error":"Invalid credentials in Authorization header"}', ["error message of a server", "download it again"]),
    "entry.safetensors": (b"Entry not found", ["error message of a server", "download it again"]),
    "half.safetensors.incomplete": (WHOLE[:500], ["unfinished download", "let the download end"]),
    "half.safetensors.part": (WHOLE[:500], ["unfinished download", "let the download end"]),
    "Unconfirmed 1.crdownload": (WHOLE[:500], ["unfinished download", "let the download end"]),
    "zeros.safetensors": (bytes(4096), ["nothing but zeros", "download it again"]),
    "cut.safetensors": (WHOLE[:-1], ["bytes", "download it again"]),
    ".model-fp8.safetensors.0a1b2c3d.partial": (WHOLE, ["unfinished output of a conversion", "--resume"]),
}  # fmt: skip


def commands(path: Path, good: Path) -> list[list[str]]:
    file, folder = str(path), str(path.parent)
    return [
        ["convert", file, "-o", f"{folder}/out.safetensors"], ["convert", file, "--dry-run"], ["inspect", file], ["verify", file, str(good)],
        ["verify", str(good), file], ["compare", file, str(good)], ["compare", str(good), file], ["dequantize", file],
        ["calibration", "inspect", file], ["calibration", "merge", file, "-o", f"{folder}/merged.safetensors"],
        ["convert", str(good), "--calibration", file, "-o", f"{folder}/out.safetensors"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_command_says_what_it_is(name, tmp_path):
    content, told = KINDS[name]
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / name).write_bytes(content)
    good = save(tmp_path / "good.safetensors", {"a.weight": floats(64, 64)})
    for arguments in commands(folder / name, good):
        done = CliRunner().invoke(cli.main, arguments)
        assert done.exit_code in (5, 10), (arguments, done.output)
        assert all(words in done.stderr for words in told), (arguments, done.stderr)
        assert done.stderr.count("\n") == 1 and "\x1b" not in done.output and "Traceback" not in done.output
    assert not RAN and [path.name for path in folder.iterdir()] == [name]


def test_gguf(tmp_path):
    """Inspected, as far as its header tells; refused by everything else."""
    path = tmp_path / "x" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(48))
    good = save(tmp_path / "good.safetensors", {"a.weight": floats(64, 64)})
    for arguments in commands(path, good):
        done = CliRunner().invoke(cli.main, arguments)
        if arguments[0] == "inspect":
            assert done.exit_code == 0 and "GGUF version 3" in done.stdout
        else:
            assert done.exit_code in (5, 10) and "a GGUF file" in done.stderr and "original safetensors" in done.stderr


def test_a_folder_of_pickles_only(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(_torch(True))
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}')
    (tmp_path / "config.json").write_text("{}")
    for source in (tmp_path, tmp_path / "pytorch_model.bin.index.json"):
        done = CliRunner().invoke(cli.main, ["convert", str(source)])
        assert done.exit_code == 5 and "PyTorch file" in done.stderr and "get the model as .safetensors" in done.stderr
    assert not RAN


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "jsonpickle", "code", "codeop"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"), ("np", "load"), ("numpy", "load"), ("os", "system"), ("os", "popen"), ("yaml", "load"), ("pickle", "loads"),
    ("torch", "hub"), ("np", "loadtxt"), ("numpy", "fromregex"),
}  # fmt: skip


def _product_files() -> list[Path]:
    return [path for folder in ("streamquant", "kernels", "comfyui_quantops") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_there_are_sources_to_look_at():
    assert len(_product_files()) > 100


@pytest.mark.parametrize("path", _product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_can_run_code_from_data(path):
    """No pickle, no eval, no torch.load: not even an import of what could."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = None
        if isinstance(node, ast.Import):
            found = next((alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES), None)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = node.module if (node.module or "").split(".")[0] in FORBIDDEN_MODULES else None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found = node.func.id if node.func.id in FORBIDDEN_CALLS else None
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = f"{node.value.id}.{node.attr}" if (node.value.id, node.attr) in FORBIDDEN_ATTRIBUTES else None
        elif isinstance(node, ast.keyword):
            unsafe = node.arg in ("allow_pickle", "shell", "trust_remote_code") and not (
                isinstance(node.value, ast.Constant) and node.value.value is False
            )
            found = node.arg if unsafe else None
        assert found is None, f"{path}, line {getattr(node, 'lineno', '?')}: {found}"
