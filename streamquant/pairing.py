"""Which tensor of an output belongs to which of its source, and what stands alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamquant import errors, presets
from streamquant.checkpoint.reader import SourceTensor
from streamquant.stored import Contents, Layout, StoredLayer
from streamquant.stored.contents import is_legacy_marker


@dataclass(frozen=True)
class Pair:
    """One tensor of the source and what it became.

    kind: "copy" (the bytes must be equal), "cast" (another floating dtype) or "weight" (a quantized layer on either side).
    reference, layout: how to decode the two; None where they are only compared as bytes. decoded_from: the format that a
    plain tensor of the output was decoded from, by its own account.
    """

    key: str
    kind: str
    source: tuple[SourceTensor, ...]
    output: tuple[SourceTensor, ...]
    reference: Layout | None = None
    layout: Layout | None = None
    layer: StoredLayer | None = None
    decoded_from: str | None = None

    @property
    def source_bytes(self) -> int:
        return sum(tensor.info.nbytes for tensor in self.source)

    @property
    def output_bytes(self) -> int:
        return sum(tensor.info.nbytes for tensor in self.output)


@dataclass
class Pairing:
    """Everything of both files. faults: tensor -> what is wrong with it, a clause. removed: left out by a preset."""

    pairs: list[Pair] = field(default_factory=list)
    removed: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def pair_up(source: Contents, output: Contents) -> Pairing:
    """Find what each tensor of the source became, and name what is missing, extra or of the wrong shape."""
    pairing = Pairing()
    claimed: set[str] = set()
    for key, tensor in source.checkpoint.tensors.items():
        layer = source.layers.get(key.removesuffix(".weight"))
        if key not in source.plain and (layer is None or layer.key != key):
            continue  # the scale or marker of a layer: comes with its weight
        found = _pair_layer(layer, output) if layer else _pair_tensor(tensor, source, output)
        if isinstance(found, str):
            pairing.faults[key] = found
        elif found is not None:
            pairing.pairs.append(found)
            claimed |= {part.name for part in found.output}
            if found.layer is not None:
                claimed |= {part.name for part in found.layer.tensors.values()}
        elif is_legacy_marker(key):
            continue  # it says how scales are spelled, and their layers are compared one by one
        elif reason := removed_by(key, source, output):
            pairing.removed[key] = reason
        else:
            pairing.faults[key] = "it is missing from the output"
    for name in output.checkpoint.tensors:
        if name not in claimed and name not in pairing.faults and not _explained(name, pairing):
            pairing.faults[name] = "it is in the output, but nothing of the source explains it"
    return pairing


def _explained(name: str, pairing: Pairing) -> bool:
    """Parts of a layer that was named already need no second complaint; a file-wide marker belongs to no layer."""
    if is_legacy_marker(name):
        return True
    return any(f"{owner}.weight" in pairing.faults for owner in _owners(name))


def _owners(name: str) -> list[str]:
    """The layers that a tensor of this name may belong to."""
    stem, _, _ = name.rpartition(".")
    return [stem, stem.removesuffix(".weight"), name.partition(".weight.")[0]]


def _pair_tensor(tensor: SourceTensor, source: Contents, output: Contents) -> Pair | str | None:
    """A plain tensor of the source: quantized, cast or copied."""
    key = tensor.name
    layer = output.layers.get(key.removesuffix(".weight"))
    if layer is not None and layer.key == key:
        return _pair_weight(key, (tensor,), source, layer)
    there = output.checkpoint.tensors.get(key)
    if there is None:
        return None
    before, after = tensor.info, there.info
    if before.shape != after.shape:
        return _shape_fault(before.shape, after.shape)
    reference, layout = source.weight(key), output.weight(key)
    if key in output.decoded and reference is not None and layout is not None:
        return Pair(key, "weight", (tensor,), (there,), reference, layout, decoded_from=output.decoded[key])
    if before.dtype == after.dtype:
        return Pair(key, "copy", (tensor,), (there,))
    if reference is None or layout is None:
        return f"it was {before.dtype} and is {after.dtype}, which is no cast"
    return Pair(key, "cast", (tensor,), (there,), reference, layout)


def _pair_layer(layer: StoredLayer, output: Contents) -> Pair | str | None:
    """A layer that was quantized already: copied with all its tensors, encoded anew, or decoded."""
    tensors = tuple(layer.tensors.values())
    there = output.layers.get(layer.name)
    if there is not None and {tensor.name for tensor in there.tensors.values()} >= {tensor.name for tensor in tensors}:
        same = all(there.tensors[suffix].info.dtype == part.info.dtype and there.tensors[suffix].info.shape == part.info.shape
                   for suffix, part in layer.tensors.items() if suffix in there.tensors)  # fmt: skip
        if same and layer.format == there.format:
            return Pair(layer.key, "copy", tensors, tuple(there.tensors[suffix] for suffix in layer.tensors), layer=there)
    if layer.layout is None:
        return "it cannot be decoded in the source, and is not copied as it was" if there else None
    if there is not None:
        if there.layout is None:
            return "; ".join(there.faults)
        return _fitting(Pair(layer.key, "weight", tensors, tuple(there.tensors.values()), layer.layout, there.layout, there))
    plain = output.checkpoint.tensors.get(layer.key)
    layout = output.weight(layer.key)
    if plain is None:
        return None
    if layout is None:
        return f"it was {layer.format} and is {plain.info.dtype}, which holds no weights"
    return _fitting(Pair(layer.key, "weight", tensors, (plain,), layer.layout, layout))


def _pair_weight(key: str, tensors: tuple[SourceTensor, ...], source: Contents, layer: StoredLayer) -> Pair | str:
    reference = source.weight(key)
    if layer.layout is None:
        return "; ".join(layer.faults)
    if reference is None:
        return f"it was {tensors[0].info.dtype} and is {layer.format}, which only floating weights can become"
    return _fitting(Pair(key, "weight", tensors, tuple(layer.tensors.values()), reference, layer.layout, layer))


def _fitting(pair: Pair) -> Pair | str:
    if pair.layout.shape != pair.reference.shape:
        return _shape_fault(pair.reference.shape, pair.layout.shape)
    return pair


def _shape_fault(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    words = f"its shape was {list(before)} and is {list(after)}"
    return f"{words}: it is transposed" if after == before[::-1] and len(after) == 2 else words


def removed_by(key: str, source: Contents, output: Contents) -> str | None:
    """The preset of the recorded recipe that leaves this tensor out, or None."""
    bare = presets.strip_prefix(key, source.prefix)
    for entry in output.provenance:
        for name in entry.recipe.get("preset", ()) if entry else ():
            for preset in _presets(name, source):
                if preset.removes(bare):
                    return f"preset {preset.name}"
    return None


def _presets(name: object, source: Contents) -> list[presets.Preset]:
    if name == "none" or not isinstance(name, str):
        return []
    if name == "auto":
        return [source.architecture, presets.everywhere()]
    try:
        return [presets.named(name), presets.everywhere()]
    except errors.UsageError:
        return []  # a preset of a later version: what it removed will be named as missing
