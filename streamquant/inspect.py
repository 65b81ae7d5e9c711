"""What is in a checkpoint, from its header, the layers' markers and a bounded part of their scales; never a weight."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamquant.checkpoint.reader import TileReader
from streamquant.output_file import PROVENANCE_KEY, QUANTIZATION_KEY
from streamquant.stored import Contents, StoredLayer, read_contents
from streamquant.stored.adapter import Adapter, find_adapter
from streamquant.stored.config import quantization_config
from streamquant.stored.gguf import GgufSummary, read_gguf
from streamquant.stored.layouts import Plain
from streamquant.stored.recognise import FLOATS
from streamquant.verdict import finite

SCALES_PER_LAYER = 4096  # looked at; a 4-bit layer has millions
SCALES_PER_FILE = 1 << 20
ALPHAS = 256  # of an adapter that are read


@dataclass(frozen=True)
class Group:
    """Quantized layers of one format and scaling. scale_range: smallest and largest scale seen that is not 0; sampled: not
    all were looked at.
    """

    format: str
    detail: str
    layers: int
    weights: int
    nbytes: int
    scale_range: tuple[float, float] | None
    sampled: bool
    loaders: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Kept:
    """Tensors of one dtype that belong to no quantized layer."""

    dtype: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """One checkpoint. faults: (layer, what is wrong with it as it stands). foreign: tool -> tensors in its layout.
    config: what a config.json beside it says of its quantization. adapter: what it is instead of a checkpoint, with its
    distinct alphas.
    """

    path: Path
    files: int
    nbytes: int
    tensors: int
    weights: int
    architecture: str
    preset: str
    prefix: str
    groups: tuple[Group, ...]
    kept: tuple[Kept, ...]
    foreign: dict[str, int]
    loaders: str
    metadata: dict[str, str]
    provenance: tuple[dict[str, Any], ...]
    hashed: int
    faults: tuple[tuple[str, str], ...]
    contents: Contents
    config: str = ""
    adapter: Adapter | None = None
    alphas: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values, layer by layer."""
        document = {name: value for name, value in vars(self).items() if name != "contents"}
        document |= {"path": str(self.path), "groups": [asdict(group) for group in self.groups]}
        document["adapter"] = asdict(self.adapter) if self.adapter else None
        document["kept"] = [asdict(kept) for kept in self.kept]
        document["layers"] = [layer_as_json(layer) for layer in self.contents.layers.values()]
        document["plain"] = [
            {"name": name, "dtype": tensor.info.dtype, "shape": list(tensor.info.shape), "nbytes": tensor.info.nbytes}
            for name, tensor in self.contents.plain.items()
        ]
        return finite(document)


def layer_as_json(layer: StoredLayer) -> dict[str, Any]:
    """One quantized layer as JSON values."""
    return {
        "name": layer.name,
        "format": layer.format,
        "detail": layer.detail,
        "shape": list(layer.shape),
        "nbytes": layer.nbytes,
        "bits_per_weight": layer.bits_per_weight,
        "tensors": {suffix: tensor.info.dtype for suffix, tensor in layer.tensors.items()},
        "loaders": list(layer.loaders),
        "faults": list(layer.faults),
        "marker": layer.marker,
    }


def inspect(path: str | Path) -> Inspection | GgufSummary:
    """Look into a `.safetensors` file, a shard index, a folder or a GGUF file.

    Raises a CheckpointError for a file that is malformed or of another kind.
    """
    path = Path(path)
    if os.path.isfile(path) and (summary := read_gguf(path)) is not None:
        return summary
    contents = read_contents(path)
    checkpoint = contents.checkpoint
    kept = _kept(contents)
    groups, bad_scales = _groups(contents)
    config = quantization_config(checkpoint, contents.layers.values())
    adapter = find_adapter(checkpoint.tensors)
    provenance = [entry for entry in contents.provenance if entry]
    return Inspection(
        checkpoint.path,
        len(checkpoint.files),
        checkpoint.size,
        len(checkpoint.tensors),
        sum(group.weights for group in groups) + sum(part.elements for part in kept),
        contents.architecture.title or "not recognised",
        contents.architecture.name,
        contents.prefix,
        groups,
        kept,
        dict(Counter(contents.foreign.values())),
        "a model that it was made for, as a change to it" if adapter else contents.loaders(),
        {key: text for key, text in checkpoint.metadata.items() if key not in (PROVENANCE_KEY, QUANTIZATION_KEY)},
        tuple(entry.entry for entry in provenance),
        sum(len(entry.hashes) for entry in provenance),
        (
            *(("", entry.fault) for entry in provenance if entry.fault),
            *(("", fault) for fault in (config.faults if config else ())),
            *((layer.name, fault) for layer in contents.layers.values() for fault in layer.faults),
            *bad_scales,
        ),
        contents,
        config.said if config else "",
        adapter,
        _alphas(contents, adapter) if adapter else (),
    )


def _alphas(contents: Contents, adapter: Adapter) -> tuple[float, ...]:
    """The distinct alphas of an adapter, ascending, of the first so many."""
    found = set()
    with TileReader(contents.checkpoint, "pread") as reader:
        for name in adapter.alphas[:ALPHAS]:
            tensor = contents.plain.get(name)
            if tensor is not None and tensor.info.elements == 1 and tensor.info.dtype in FLOATS:
                found.add(float(Plain(tensor.info.shape or (1,), tensor).decode(reader.tile, 0, 1).values.flat[0]))
    return tuple(sorted(found))


def _kept(contents: Contents) -> tuple[Kept, ...]:
    tensors, elements, nbytes = Counter(), Counter(), Counter()
    for tensor in contents.plain.values():
        tensors[tensor.info.dtype] += 1
        elements[tensor.info.dtype] += tensor.info.elements
        nbytes[tensor.info.dtype] += tensor.info.nbytes
    return tuple(Kept(dtype, tensors[dtype], elements[dtype], size) for dtype, size in nbytes.most_common())


def _groups(contents: Contents) -> tuple[tuple[Group, ...], list[tuple[str, str]]]:
    """Layers by format and scaling, the largest group first; and the layers whose scales are no numbers."""
    grouped: dict[tuple[str, str], list[StoredLayer]] = {}
    for layer in contents.layers.values():
        grouped.setdefault((layer.format, layer.detail), []).append(layer)
    limit = max(min(SCALES_PER_LAYER, SCALES_PER_FILE // max(len(contents.layers), 1)), 1)
    groups: list[Group] = []
    bad: list[tuple[str, str]] = []
    with TileReader(contents.checkpoint, "pread") as reader:
        for (name, detail), layers in grouped.items():
            scale_range, sampled = _scale_range(layers, reader, limit, bad)
            groups.append(
                Group(
                    name, detail, len(layers), sum(layer.elements for layer in layers),
                    sum(layer.nbytes for layer in layers), scale_range, sampled, layers[0].loaders,
                )
            )  # fmt: skip
    return tuple(sorted(groups, key=lambda group: -group.nbytes)), bad


def _scale_range(
    layers: list[StoredLayer], reader: TileReader, limit: int, bad: list[tuple[str, str]]
) -> tuple[tuple[float, float] | None, bool]:
    """The smallest and the largest scale seen, and whether they are a part; layers with other than numbers go to `bad`."""
    lowest, highest, sampled = math.inf, -math.inf, False
    for layer in layers:
        if layer.layout is None:
            continue
        scales, complete = layer.layout.scales(reader.tile, limit)
        sampled |= not complete
        if not np.isfinite(scales).all():
            bad.append((layer.name, "its scales hold NaN or infinity"))
        scales = scales[np.isfinite(scales) & (scales != 0)]
        if scales.size:
            lowest, highest = min(lowest, float(scales.min())), max(highest, float(scales.max()))
    return (None if lowest == math.inf else (lowest, highest)), sampled
