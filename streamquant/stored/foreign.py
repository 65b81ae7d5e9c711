"""Layers in the layouts of other tools, which are named but not decoded, and GGUF files."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from streamquant import errors
from streamquant.checkpoint.header import printable

# Last part of a key -> whose it is. Only names that no plain model uses.
ENDINGS = {
    "qweight": "GPTQ or AWQ",
    "wscales": "nunchaku SVDQuant",
    "weight_packed": "compressed-tensors",
    "_data": "optimum-quanto",
    "_weight_qdata": "torchao",
    "weight_s_rel": "ComfyUI's asym_w4a8_int8",
    "weight_zeros": "ComfyUI's awq_w4a16",
}


def foreign_layers(names: Iterable[str], metadata: dict[str, str]) -> dict[str, str]:
    """Tensor name -> the tool in whose layout it is."""
    found = {}
    for name in names:
        ending = name.rsplit(".", 1)[-1].rsplit(":", 1)[-1]
        if ending in ENDINGS:
            found[name] = ENDINGS[ending]
    return found


@dataclass(frozen=True)
class GgufSummary:
    """What a GGUF file's header says. types: tensor type -> (tensors, bytes); empty without the `gguf` package."""

    path: Path
    version: int
    tensors: int
    architecture: str | None
    types: dict[str, tuple[int, int]]

    @property
    def complete(self) -> bool:
        return bool(self.types) or not self.tensors


def read_gguf(path: Path) -> GgufSummary | None:
    """Summarise a GGUF file; None when it is not one. Raises HeaderError when its header is damaged."""
    try:
        with open(path, "rb") as file:
            start = file.read(24)
    except OSError as error:
        raise errors.SourceReadError(f"Cannot read {printable(str(path), 300)}: {error.strerror}.") from None
    if len(start) < 24 or start[:4] != b"GGUF":
        return None
    version = int.from_bytes(start[4:8], "little")
    count = int.from_bytes(start[8:16], "little")
    if importlib.util.find_spec("gguf") is None:
        return GgufSummary(path, version, count, None, {})
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        field = reader.fields.get("general.architecture")
        architecture = None if field is None else str(bytes(field.parts[field.data[0]]), "utf-8", "replace")
        tensors, sizes = Counter(), Counter()
        for tensor in reader.tensors:
            tensors[tensor.tensor_type.name] += 1
            sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    except Exception as error:  # whatever that package raises on a file, the file is not what it says
        raise errors.HeaderError(
            f"{printable(str(path), 300)}: its GGUF header is damaged ({printable(str(error))})."
        ) from None
    return GgufSummary(path, version, count, architecture, {name: (tensors[name], sizes[name]) for name in tensors})
