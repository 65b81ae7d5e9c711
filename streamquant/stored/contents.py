"""Which layers of a checkpoint are quantized, how, and who can load them: from the header and the layers' own markers."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from streamquant import errors, presets
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.reader import Checkpoint, SourceTensor, TileReader, open_checkpoint

from . import recognise
from .foreign import foreign_layers
from .layouts import Layout, Plain, Read
from .markers import Provenance, json_tensor, listed_layers, provenance
from .recognise import FLOATS

LEGACY_MARKER = "scaled_fp8"
# What lies beside a weight, after the layer's name: the suffixes of every layout that is known here.
BESIDE = (
    "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_scalar", "weight_code", "scale_weight", "input_scale",
    "scale_input", "comfy_quant", "SCB", "weight_format", "pre_quant_scale",
)  # fmt: skip
UNDER = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
QUANT_STATE = "quant_state.bitsandbytes__"


@dataclass(frozen=True)
class StoredLayer:
    """One quantized weight.

    name: the key without `.weight`. format: its name on disk. detail: scales, rotation and so on, in words. tensors: by
    suffix. layout: how to decode it, or None, and `faults` then says why. origin: safetensors dtype it was made from,
    where the file says so. loaders: who reads it. faults: what is wrong with it as it stands, each a clause.
    """

    name: str
    format: str
    detail: str
    shape: tuple[int, ...]
    tensors: dict[str, SourceTensor]
    layout: Layout | None
    origin: str | None
    loaders: tuple[str, ...]
    faults: tuple[str, ...] = ()
    marker: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name}.weight"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.info.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Contents:
    """A checkpoint and what its tensors are. layers: quantized, by name. plain: every tensor that belongs to none."""

    checkpoint: Checkpoint
    layers: dict[str, StoredLayer]
    plain: dict[str, SourceTensor]
    foreign: dict[str, str]

    @cached_property
    def architecture(self) -> presets.Preset:
        return self._recognised[0]

    @property
    def prefix(self) -> str:
        return self._recognised[1]

    @cached_property
    def _recognised(self) -> tuple[presets.Preset, str]:
        return presets.recognise([*(layer.key for layer in self.layers.values()), *self.plain])

    @cached_property
    def provenance(self) -> tuple[Provenance | None, ...]:
        """Of each file, None where it has none."""
        return tuple(provenance(file.header, str(file.path)) for file in self.checkpoint.files)

    @cached_property
    def decoded(self) -> dict[str, str]:
        """Plain tensors that `dequantize` decoded, by the format that they had, as their files say."""
        found: dict[str, str] = {}
        for entry in filter(None, self.provenance):
            found |= entry.decoded
        return {name: format for name, format in found.items() if name in self.plain}

    def weight(self, key: str) -> Layout | None:
        """The layout of the floating weight under a source key, quantized or plain; None when there is none."""
        layer = self.layers.get(key.removesuffix(".weight"))
        if layer is not None and layer.key == key:
            return layer.layout
        tensor = self.plain.get(key)
        if tensor is None or tensor.info.dtype not in FLOATS:
            return None
        return Plain(tensor.info.shape, tensor)

    def loaders(self) -> str:
        """Who loads the file, in words."""
        return recognise.loaders_in_words([layer.loaders for layer in self.layers.values()], self.foreign)


def read_contents(source: str | Path | Checkpoint) -> Contents:
    """Read headers and markers, never a weight. Raises a CheckpointError for a file that is malformed."""
    checkpoint = open_checkpoint(source)
    # Markers are a few hundred bytes each: read by calls, they cost less than mapping the file page by page.
    with TileReader(checkpoint, "pread") as reader:
        return _contents(checkpoint, reader.tile)


def _contents(checkpoint: Checkpoint, read: Read) -> Contents:
    groups = _group(checkpoint.tensors)
    listed = listed_layers(checkpoint)
    legacy = any(map(is_legacy_marker, checkpoint.tensors)) and not listed
    layers: dict[str, StoredLayer] = {}
    for name, beside in groups.items():
        tensors = {"weight": checkpoint.tensors[f"{name}.weight"]} | beside
        marker, faults = _marker(tensors, listed.get(name), read)
        states = {suffix: json_tensor(read, beside[suffix]) for suffix in beside if QUANT_STATE in suffix}
        broken = [suffix for suffix, state in (states | {"comfy_quant": marker}).items() if state is None and suffix in beside]
        if broken:
            found = recognise.undescribed(tensors, broken[0])
        else:
            found = recognise.recognise(tensors, marker, states, legacy)
        if found is None:
            continue
        permuted = _permuted(beside, read)
        layout = found.layout if not permuted else None
        layers[name] = StoredLayer(
            name, found.format, found.detail, found.shape, tensors, layout, found.origin, found.loaders,
            (*faults, *permuted, *found.faults), marker or {},
        )  # fmt: skip
    claimed = {tensor.name for layer in layers.values() for tensor in layer.tensors.values()}
    plain = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in claimed}
    return Contents(checkpoint, layers, plain, foreign_layers(plain))


def _group(tensors: dict[str, SourceTensor]) -> dict[str, dict[str, SourceTensor]]:
    """Layer name -> what lies beside its weight, by suffix; for layers that may be quantized."""
    groups: dict[str, dict[str, SourceTensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith(".weight") and tensor.info.dtype not in (*FLOATS, "BOOL", "I64", "I32", "I16"):
            groups.setdefault(key.removesuffix(".weight"), {})
    for key, tensor in tensors.items():
        layer, suffix = _split(key)
        if suffix and f"{layer}.weight" in tensors:
            groups.setdefault(layer, {})[suffix] = tensor
    return groups


def _split(key: str) -> tuple[str, str]:
    """(layer, suffix) of a tensor that lies beside a weight; ("", "") for any other."""
    layer, _, suffix = key.rpartition(".")
    if suffix in BESIDE:
        return layer, suffix
    position = key.find(f".weight.{QUANT_STATE}")
    if position >= 0:
        return key[:position], key[position + 1 :]
    if suffix in UNDER and layer.endswith(".weight"):
        return layer.removesuffix(".weight"), f"weight.{suffix}"
    return "", ""


def _marker(
    tensors: dict[str, SourceTensor], listed: dict[str, Any] | None, read: Read
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """What ComfyUI takes the layer for: the header's entry, where there is one, goes before the tensor."""
    own = json_tensor(read, tensors["comfy_quant"]) if "comfy_quant" in tensors else None
    if listed is not None and own is None and "comfy_quant" in tensors:
        return listed, ("its comfy_quant is not the JSON object that it should be (the header's entry is taken)",)
    if listed is None or own is None or not _disagree(own, listed):
        return listed if listed is not None else own, ()
    return listed, ("its comfy_quant and the header's entry for it disagree, and ComfyUI believes the header",)


def _permuted(beside: dict[str, SourceTensor], read: Read) -> tuple[str, ...]:
    """bitsandbytes once stored INT8 in the order of a GPU's tiles; 0 in `weight_format` stands for plain rows."""
    tensor = beside.get("weight_format")
    if tensor is None or not tensor.info.nbytes or not any(bytes(read(tensor, 0, 1))):
        return ()
    return ("its codes are in the order of an older bitsandbytes for one kind of GPU, which is not undone here",)


def _disagree(own: dict[str, Any], listed: dict[str, Any]) -> bool:
    """Whether two markers mean different things; `per_row` and the sizes are not read by ComfyUI."""
    return any(own.get(key) != listed.get(key) for key in ("format", "convrot", "convrot_groupsize"))


def is_legacy_marker(name: str) -> bool:
    """Whether a tensor says of its whole file that it is of the older `scaled_fp8` kind."""
    return name.rsplit(".", 1)[-1] == LEGACY_MARKER


def decodable(layers: Iterable[StoredLayer]) -> None:
    """Raise CheckpointError, naming the first of `layers` that cannot be decoded and why."""
    for layer in layers:
        if layer.layout is None:
            raise errors.CheckpointError(recognise.undecodable_sentence(layer.name, layer.format, layer.faults))


def refuse_foreign(contents: Contents, known: Container[str] = ()) -> None:
    """Raise CheckpointError when a checkpoint holds layers of another tool, but for those in `known`."""
    for name, tool in contents.foreign.items():
        if name not in known:
            raise errors.CheckpointError(
                f"{printable(str(contents.checkpoint.path), 300)} holds layers of {tool}, such as {printable(name)}, which "
                f"cannot be decoded here: use that tool."
            )
