"""What is fuzzed. A target takes bytes; it may raise a StreamquantError, which is a refusal, and nothing else.

Where the format's own reader, `safetensors`, can be asked, it is: what we accept, it accepts and understands the same way;
what we write, it accepts.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import xxhash
from rich.console import Console
from safe import is_safe

from streamquant import FormatChoice, Recipe, calibration, errors, patterns, plan
from streamquant.checkpoint import header as h
from streamquant.checkpoint.journal import differences, read_records
from streamquant.checkpoint.reader import TileReader, open_checkpoint
from streamquant.console import Screen
from streamquant.inspect import inspect
from streamquant.layer_config import read_layer_config
from streamquant.stored import read_contents, tiles
from streamquant.stored.gguf import LONGEST_TEXT, GgufSummary, read_gguf
from streamquant.views.calibration import calibration_table
from streamquant.views.inspect import gguf_view, inspection_view, layers_view, tree_view

FOLDER = Path(tempfile.mkdtemp())  # in one that `campaign.py` removes: a fuzzer does not get to clean up
MOST_COMPARED = 1 << 12  # bytes of a GGUF file that its own reader reads too: it takes a microsecond and an object for each entry of a list
MOST_SHOWN = 40  # tensors of a file that is drawn on a screen, if its size is a multiple of 4: rich is slow


class Finding(AssertionError):
    """A promise that does not hold."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Finding(what)


def _file(data: bytes, name: str = "fuzzed.safetensors") -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


# Where we are stricter than safetensors, on purpose: see `streamquant.checkpoint.header`.
STRICTER = (errors.DuplicateKeyError, errors.HeaderStartError, errors.HeaderNotJsonError, errors.TensorEntryError, errors.MetadataError)


def header(data: bytes) -> None:
    """`parse_length` and `parse_header` against safetensors, both ways."""
    try:
        theirs = {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        theirs = None
    try:
        length = h.parse_length(data[:8], len(data), "fuzzed")
        ours = h.parse_header(data[8 : 8 + length], len(data), "fuzzed")
    except errors.HeaderError as error:
        _one_safe_sentence(error)
        _require(theirs is None or isinstance(error, STRICTER), f"refused with {error!r}, which safetensors reads")
        return
    _require(theirs is not None, "accepted, and safetensors refuses it")
    body = data[ours.data_start :]
    mine = {name: (info.dtype, info.shape, body[info.start : info.end]) for name, info in ours.tensors.items()}
    _require(mine == theirs, f"safetensors reads it differently: {mine} and {theirs}")


def _one_safe_sentence(error: Exception) -> None:
    text = str(error)
    _require(text.endswith(".") and is_safe(text), f"no sentence, or one that is not safe to show: {text!r}")


def index(data: bytes) -> None:
    """A shard index beside two shards, a link that leads out of the folder, and a pipe."""
    folder = FOLDER / "shards"
    if not folder.exists():
        folder.mkdir()
        outside = FOLDER / "outside.safetensors"
        for path, name in ((folder / "1.safetensors", "a"), (folder / "2.safetensors", "b"), (outside, "b")):
            info = h.layout([(f"{name}.weight", "F32", (1,))])
            path.write_bytes(h.build_header(info, {}) + bytes(4))
        (folder / "link.safetensors").symlink_to(outside)
        os.mkfifo(folder / "pipe")
    (folder / "model.safetensors.index.json").write_bytes(data)
    try:
        checkpoint = open_checkpoint(folder)
    except errors.StreamquantError as error:
        _one_safe_sentence(error)
        return
    _require(set(checkpoint.tensors) <= {"a.weight", "b.weight"}, "tensors from nowhere")
    _require(all(file.path.resolve().parent == folder.resolve() for file in checkpoint.files), "a shard outside the folder")


patterns.SEARCH_SECONDS, patterns.TOTAL_SECONDS = 0.2, 1.0
NAMES = ("double_blocks.0.img_attn.qkv", "a" * 40, "final_layer.linear", "", "é.0", "x.1.2.3")


def layer_config(data: bytes) -> None:
    """A layer config, TOML or JSON by the first byte, and the patterns in it."""
    path = _file(data[1:], "config.json" if data[:1] > b"\0" else "config.toml")
    try:
        for text, _ in read_layer_config(path):
            _search(text)
    except errors.StreamquantError as error:
        _require(is_safe(str(error)), f"not safe to show: {str(error)!r}")


def pattern(data: bytes) -> None:
    """A regular expression of the user; the time limits are shorter here than the fuzzer's own."""
    try:
        _search(data.decode("utf-8", "replace"))
    except errors.StreamquantError as error:
        _require(is_safe(str(error)), f"not safe to show: {str(error)!r}")


def _search(text: str) -> None:
    found = patterns.Pattern(text, "--custom-layers")
    for name in NAMES:
        found.finds(name, f"{name}.weight")


def stored(data: bytes) -> None:
    """Markers, quant states and metadata; then every layer decoded by tiles; then the screens of `inspect`."""
    path = _file(data)
    try:
        checkpoint = open_checkpoint(path)
        contents = read_contents(checkpoint)
        with TileReader(checkpoint, "pread") as reader:
            for layer in contents.layers.values():
                if layer.layout is not None:
                    _decode(layer.layout, reader.tile)
        found = inspect(path)
    except errors.StreamquantError as error:
        _one_safe_sentence(error)
        return
    json.loads(json.dumps(found.as_json(), allow_nan=False))
    if found.tensors <= MOST_SHOWN and len(data) % 4 == 0:
        text = io.StringIO()
        screen = Screen(out=Console(file=text, width=100))
        for parts in (inspection_view(found), [layers_view(found)], [tree_view(found)]):
            screen.show(parts)
        _require(is_safe(text.getvalue()), f"not safe to show: {text.getvalue()!r}")


def _decode(layout, read) -> None:
    decoded = 0
    for begin, end in tiles(layout.shape):
        with np.errstate(all="ignore"):
            tile = layout.decode(read, begin, end)
        _require(tile.values.dtype == np.float32 and tile.values.shape == (end - begin,), f"a tile of {tile.values.shape}")
        decoded += end - begin
    _require(decoded == int(np.prod(layout.shape, dtype=object)), "not all of a layer decoded")
    with np.errstate(all="ignore"):
        layout.scales(read, 100)


RECIPES = (Recipe(preset=("none",)), Recipe(FormatChoice("nf4", double_quant=True), comfy_quant=True), Recipe(FormatChoice("int8")),
           Recipe(FormatChoice("fp8", "block", 16), cast="BF16"))  # fmt: skip


def make_plan(data: bytes) -> None:
    """A conversion planned; the header that it would write, given to safetensors with as much data as it wants."""
    path = _file(data)
    for recipe in RECIPES:
        try:
            made = plan(path, recipe)
        except errors.StreamquantError as error:
            _one_safe_sentence(error)
            continue
        (file,) = made.files
        _require(file.size <= 64 * len(data) + (1 << 20), f"{len(data)} bytes become {file.size}")
        written = {name for name, _ in safetensors.deserialize(file.header + bytes(file.size - len(file.header)))}
        _require(written == {tensor.name for tensor in file.tensors}, "safetensors reads other tensors than were planned")
        _require(is_safe("".join(made.notes)), f"not safe to show: {made.notes}")


def calibration_file(data: bytes) -> None:
    """A calibration file, its summary and its table."""
    try:
        loaded = calibration.load(_file(data))
        with np.errstate(all="ignore"):
            rows = loaded.summary()
    except errors.StreamquantError as error:
        _one_safe_sentence(error)
        return
    text = io.StringIO()
    Console(file=text, width=100).print(calibration_table(rows))
    _require(is_safe(text.getvalue()), f"not safe to show: {text.getvalue()!r}")


def journal(data: bytes) -> None:
    """A journal whose lines carry right checksums, so that what stands in them is believed."""
    lines = [xxhash.xxh3_64_hexdigest(line).encode() + b" " + line + b"\n" for line in data.split(b"\n")]
    path = _file(b"".join(lines), "fuzzed.journal")
    try:
        records = read_records(path)
        for text in differences(records.fingerprint, {"source": [], "recipe": {}}):
            _require(is_safe(text), f"not safe to show: {text!r}")
    except errors.ResumeError as error:
        _one_safe_sentence(error)


def write(data: bytes) -> None:
    """`layout` and `build_header` from any names, types, shapes and metadata: what they write is read, by both."""
    tensors, metadata = _made_of(data)
    try:
        placed = h.layout(tensors)
        built = h.build_header(placed, metadata)
    except errors.HeaderError as error:
        _one_safe_sentence(error)
        return
    end = placed[-1].end if placed else 0
    if end > 1 << 20:
        return
    file = built + bytes(end)
    theirs = {name: tuple(entry["shape"]) for name, entry in safetensors.deserialize(file)}
    ours = h.parse_header(built[8:], len(file), "written")
    _require(theirs == {name: info.shape for name, info in ours.tensors.items()} == {name: shape for name, _, shape in tensors}, "read differently")
    _require(ours.metadata == metadata and list(ours.tensors.values()) == placed, "not what was written")


def gguf(data: bytes) -> None:
    """The header of a GGUF file and its screen, against the reader of the gguf package: what we accept, it reads the same way."""
    path = _file(data, "fuzzed.gguf")
    try:
        found = read_gguf(path)
    except errors.HeaderError as error:
        _one_safe_sentence(error)
        return
    if found is None:
        _require(data[:4] != b"GGUF", "not recognised")
        return
    text = io.StringIO()
    if len(data) % 4 == 0:
        Screen(out=Console(file=text, width=100)).show(gguf_view(found))
    _require(is_safe(text.getvalue()), f"not safe to show: {text.getvalue()!r}")
    _require(all(kind.nbytes <= len(data) for kind in found.types), "more weights than there are bytes")
    if len(data) <= MOST_COMPARED and not any(name.startswith("GGUF.") for name in found.metadata):  # names that its reader needs itself
        _same_gguf(found, path)


def _same_gguf(ours: GgufSummary, path: Path) -> None:
    from gguf import GGUFReader

    with np.errstate(all="ignore"):
        theirs = GGUFReader(path)
    types: dict[str, tuple[int, int, int]] = {}
    for tensor in theirs.tensors:
        before = types.get(tensor.tensor_type.name, (0, 0, 0))
        types[tensor.tensor_type.name] = (before[0] + 1, before[1] + tensor.n_elements, before[2] + tensor.n_bytes)
    _require({kind.name: (kind.tensors, kind.weights, kind.nbytes) for kind in ours.types} == types, f"their types: {types}")
    fields = {name: part for name, part in theirs.fields.items() if not name.startswith("GGUF.")}
    for name, value in ours.metadata.items():
        part = fields.pop(name)
        last = part.parts[-1]
        if part.types[0].name == "ARRAY":
            expected = f"{int(part.parts[4][0]):,} entries"
        elif part.types[0].name == "STRING":
            whole = bytes(last).decode("utf-8", "replace")
            expected = whole if len(whole) <= LONGEST_TEXT else whole[:LONGEST_TEXT] + "…"
        else:
            expected = last.tolist()[0]
        _require(repr(value) == repr(expected), f"{name} is {value!r}, and {expected!r} to them")
    _require(set(fields) <= {"general.architecture", "general.file_type"}, f"metadata was left out: {list(fields)}")


def _made_of(data: bytes) -> tuple[list[tuple[str, str, tuple[int, ...]]], dict[str, str]]:
    dtypes = list(h.DTYPE_BITS)
    tensors, metadata = {}, {}
    for number, piece in enumerate(data[:4096].split(b"\xfe")):
        if len(piece) < 3:
            continue
        name = piece[3:].decode("utf-8", "surrogatepass" if piece[2] & 1 else "replace") if _decodes(piece[3:]) else str(number)
        if piece[2] & 0x80:
            metadata[name] = name[::-1]
        elif name not in tensors:
            shape = tuple(int(byte) % 9 for byte in piece[1 : 1 + piece[2] % 4]) + ((8,) if piece[2] & 64 else ())
            tensors[name] = (name, dtypes[piece[0] % len(dtypes)], shape)
    return list(tensors.values()), metadata


def _decodes(piece: bytes) -> bool:
    try:
        piece.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


class Target(NamedTuple):
    """run: what is fuzzed. is_file: whether its input is a safetensors file, which is mutated by its structure."""

    run: Callable[[bytes], None]
    is_file: bool = False


TARGETS = {
    "header": Target(header, True), "index": Target(index), "layer_config": Target(layer_config), "pattern": Target(pattern),
    "stored": Target(stored, True), "plan": Target(make_plan, True), "calibration": Target(calibration_file, True),
    "journal": Target(journal), "write": Target(write), "gguf": Target(gguf),
}  # fmt: skip
