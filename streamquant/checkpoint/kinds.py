"""Files that are no safetensors files, named for what they are, with what to do. None of them is ever loaded.

A file is known by its first bytes; by its name where those say nothing.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from streamquant import errors
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.positioned import close_read, read_whole

START = 512  # bytes that tell: a tar archive has its mark at byte 257

_PICKLE = "which can run code when it is loaded, so it is not opened here: get the model as .safetensors"
_PAGE = "not the model: open its address in a browser (it may ask you to log in or to accept a licence) and download it again"
# (first bytes, what such a file is and what to do)
_MAGICS = (
    (b"GGUF", "a GGUF file, which is quantized already: convert from the original safetensors checkpoint"),
    (b"\x93NUMPY", "a numpy file: save its arrays as safetensors"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, TensorFlow): save its weights as safetensors"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"\xfd7zXZ\0", "an xz archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive: unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive: unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch the file with `git lfs pull`"),
    *((bytes([0x80, version]), f"a Python pickle (.pt, .pth, .ckpt, .bin), {_PICKLE}") for version in range(2, 6)),
    (b"(dp", f"a Python pickle, {_PICKLE}"),
    (b"ccollections\n", f"a Python pickle, {_PICKLE}"),
    (b"\x7fELF", "a program, not a model"),
    (b"MZ", "a program, not a model"),
)
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body", b"<?xml", b"<error", b"<!--")
_MESSAGES = (
    b'{"', b"{ ", b"{\n", b"{\r", b"entry not found", b"invalid username", b"access to model", b"not found", b"unauthorized",
)  # fmt: skip
# Last part of the name -> what such a file is, where its first bytes do not say so.
_ENDINGS = {
    ".onnx": "an ONNX file, which is a graph and not a checkpoint: convert from the model's safetensors",
    ".msgpack": "a Flax checkpoint (msgpack): save it as safetensors",
    ".pb": "a TensorFlow graph: save its weights as safetensors",
    ".tflite": "a TensorFlow Lite model: convert from the model's safetensors",
    ".mlmodel": "a Core ML model: convert from the model's safetensors",
    ".engine": "a TensorRT engine, which is built for one GPU: convert from the model's safetensors",
    ".pt": f"a PyTorch file, {_PICKLE}",
    ".pth": f"a PyTorch file, {_PICKLE}",
    ".ckpt": f"a PyTorch file, {_PICKLE}",
    ".bin": f"a PyTorch file (or raw data), {_PICKLE}",
    ".pkl": f"a Python pickle, {_PICKLE}",
    ".pickle": f"a Python pickle, {_PICKLE}",
    ".zip": "a zip archive: unpack it first",
}
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".download", ".aria2", ".tmp", ".!qb")


def other_kind(path: Path, start: bytes, size: int) -> str | None:
    """What a file is that is no safetensors file, with what to do; None where it may be one.

    start: its first START bytes. size: of the whole file.
    """
    name = path.name.lower()
    if name.startswith(".") and name.endswith(".partial"):  # which has its header and its size from the beginning
        return "the unfinished output of a conversion: go on with it by that command with --resume, or delete it"
    if name.endswith(_UNFINISHED):
        return "an unfinished download, by its name: let the download end, or start it again"
    # The first 8 bytes of a safetensors file are a length, which a magic could equal; byte 8 is then a brace.
    if start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") <= 100_000_000:
        return None
    if start.startswith(b"PK\x03\x04"):
        return _zip(start)
    if start[257:262] == b"ustar":
        return f"a tar archive: unpack it; the oldest PyTorch files (.tar, .pt) are such too, {_PICKLE}"
    lower = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if lower.startswith(_PAGES):
        return f"a web page or an error message of a server, {_PAGE}"
    if lower.startswith(_MESSAGES):
        return f"a text (JSON or an error message of a server), {_PAGE}"
    for magic, what in _MAGICS:
        if start.startswith(magic):
            return what
    if size >= 8 and not any(start):
        return "nothing but zeros at its start, as a download that was never finished: download it again"
    return next((what for ending, what in _ENDINGS.items() if name.endswith(ending)), None)


def refuse_other_kinds(path: Path) -> int:
    """The modification time of a file, in ns. Raises NotSafetensorsError for one of another kind, SourceMissingError where
    there is none, SourceReadError for one that cannot be read.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a named pipe would wait for ever; `read_header` says what it is
            return found.st_mtime_ns
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            start = read_whole(descriptor, START)
        finally:
            close_read(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        raise errors.SourceMissingError(f"There is no file at {printable(str(path), 300)}: check the path.") from None
    except OSError as error:
        raise errors.SourceReadError(f"Cannot read {printable(str(path), 300)}: {error.strerror}.") from None
    if what := other_kind(path, start, found.st_size):
        raise errors.NotSafetensorsError(f"{printable(str(path), 300)} is {what}.")
    return found.st_mtime_ns


def _zip(start: bytes) -> str:
    """A zip archive, by the name of its first member."""
    length = int.from_bytes(start[26:28], "little")
    member = start[30 : 30 + length]
    if member.endswith((b"data.pkl", b"/version", b"byteorder", b".format_version")):
        return f"a PyTorch file (a zip archive of a pickle: .pt, .pth, .ckpt, .bin), {_PICKLE}"
    if member.endswith(b".npy"):
        return "a numpy archive (.npz): save its arrays as safetensors"
    return f"a zip archive: unpack it; if it is a PyTorch file, it holds a pickle, {_PICKLE}"


def pickles_in(folder: Path) -> list[str]:
    """Names in a folder that are PyTorch's by their ending."""
    endings = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    return sorted(entry.name for entry in folder.iterdir() if entry.name.lower().endswith(endings))
