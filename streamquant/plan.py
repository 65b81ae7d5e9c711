"""Recipe × checkpoint → plan: every output tensor's name, dtype, shape and byte offset, before a weight is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from streamquant import __version__, errors
from streamquant.checkpoint.header import layout, printable
from streamquant.checkpoint.reader import Checkpoint, open_checkpoint
from streamquant.formats import Output
from streamquant.formats.plain import Copy
from streamquant.output_file import PlannedFile, PlannedOutput, planned_file
from streamquant.presets import Preset
from streamquant.recipe import Recipe, Rules
from streamquant.stored import Contents, StoredLayer, read_contents
from streamquant.stored.adapter import refuse_adapter
from streamquant.stored.contents import is_legacy_marker
from streamquant.stored.foreign import foreign_layers, layer_of
from streamquant.stored.markers import listed_layers
from streamquant.unit import QUANTIZED, Unit, foreign_unit, make_unit, marked_anew, scale_unit


@dataclass(frozen=True, kw_only=True)
class Plan(PlannedOutput):
    """What a conversion will do, complete.

    units: in the order in which they are processed. placement: output tensor name -> (file number, byte offset in the
    file, bytes). removed: source tensors left out, with the reason. notes: what a person should know before it starts.
    presets, prefix: those in force and the one recognised, and what the checkpoint's names carry before their own.
    stored: the quantized layers of the source, by name.
    """

    recipe: Recipe
    architecture: str
    units: tuple[Unit, ...]
    removed: dict[str, str]
    placement: dict[str, tuple[int, int, int]]
    notes: tuple[str, ...] = ()
    presets: tuple[Preset, ...] = ()
    prefix: str = ""
    stored: dict[str, StoredLayer] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The output's file name; of shards, the one they are numbered after."""
        return self.index_name.removesuffix(".index.json") if self.index_name else self.files[0].name

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read (once)."""
        return sum(unit.source_bytes for unit in self.units)

    def file_of(self, unit: Unit) -> int:
        """The number of the output file that holds all of a unit's tensors."""
        return self.placement[unit.output_names[0]][0]

    def output_bytes(self, unit: Unit) -> int:
        """Bytes of all tensors that a unit becomes."""
        return sum(self.placement[name][2] for name in unit.output_names)

    def index_json(self) -> bytes:
        """The Hugging Face shard index, when there are several files."""
        weight_map = {tensor.name: file.name for file in self.files for tensor in file.tensors}
        total = sum(tensor.nbytes for file in self.files for tensor in file.tensors)
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a partial output to be continued: source, recipe, layout, versions."""
        digest = xxhash.xxh3_64()
        for file in self.files:
            digest.update(file.header)
        return {
            "source": [file.identity() for file in self.checkpoint.files],
            "recipe": self.recipe.describe(),
            "output": {"files": [file.name for file in self.files], "headers_xxh3_64": digest.hexdigest()},
            "streamquant": __version__,
        }


def plan(source: str | Path | Checkpoint, recipe: Recipe | None = None, *, name: str = "model.safetensors",
         shard_size: int | None = None, unrotated: frozenset[str] = frozenset()) -> Plan:  # fmt: skip
    """Plan a conversion from headers alone.

    source: a path as for `open_checkpoint`, or an opened checkpoint. name: the output's file name. shard_size: bytes a
    shard may hold (a larger layer gets a shard of its own); None writes one file. unrotated: layers left to us that are
    better as they are (no byte of the layout depends on it). Raises PatternError when a regular
    expression finds no candidate, NothingToConvertError when no layer would be quantized.
    """
    checkpoint = open_checkpoint(source)
    refuse_adapter(checkpoint)
    recipe = recipe or Recipe()
    rules = Rules(recipe, list(checkpoint.tensors))
    contents = _stored_contents(checkpoint)
    units, removed = _make_units(checkpoint, contents, rules, unrotated)
    _complain_about_unmatched(rules, checkpoint, removed)
    if all(isinstance(unit.format, Copy) for unit in units):
        raise errors.NothingToConvertError(_nothing_sentence(checkpoint, units, contents.foreign if contents else {}))
    _refuse_name_clashes(units)
    groups = _shard_groups(units, shard_size)
    names = _file_names(name, len(groups))
    files, placement = [], {}
    for number, (file_name, members) in enumerate(zip(names, groups, strict=True)):
        file = _plan_file(file_name, members, checkpoint, recipe)
        files.append(file)
        placement |= {tensor.name: (number, len(file.header) + tensor.start, tensor.nbytes) for tensor in file.tensors}
    index_name = f"{name.removesuffix('.safetensors')}.safetensors.index.json" if len(groups) > 1 else None
    return Plan(
        checkpoint=checkpoint,
        files=tuple(files),
        index_name=index_name,
        recipe=recipe,
        architecture=rules.recognised.title,
        units=tuple(units),
        removed=removed,
        placement=placement,
        notes=tuple(_notes(units, removed, contents.foreign if contents else {}, rules)),
        presets=tuple(dict.fromkeys((*rules.presets, rules.recognised))),
        prefix=rules.prefix,
        stored=contents.layers if contents else {},
    )


def _stored_contents(checkpoint: Checkpoint) -> Contents | None:
    """Which layers are quantized already; None for a checkpoint in which none can be."""
    if any(tensor.info.dtype in QUANTIZED for tensor in checkpoint.tensors.values()) or foreign_layers(checkpoint.tensors):
        return read_contents(checkpoint)
    return None


def _make_units(
    checkpoint: Checkpoint, contents: Contents | None, rules: Rules, unrotated: frozenset[str]
) -> tuple[list[Unit], dict[str, str]]:
    """What becomes of every tensor, in order, and which are left out, with the reason."""
    listed = listed_layers(checkpoint)
    layers = contents.layers if contents else {}
    owners = {tensor.name: layer for layer in layers.values() for tensor in layer.tensors.values()}
    foreign = {layer_of(name) for name in contents.foreign} if contents else set()
    legacy = {} if listed else {name: tensor for name, tensor in checkpoint.tensors.items() if is_legacy_marker(name)}
    # Two numbers in the marker of the older spelling say that its layers are not to be multiplied in FP8.
    careful = {"full_precision_matrix_mult": True} if any(tensor.info.elements == 2 for tensor in legacy.values()) else {}
    weights: dict[str, Unit] = {}
    for layer in layers.values():
        if not rules.removes(layer.key):
            unit = make_unit(0, layer.tensors["weight"], rules, unrotated, layer, listed.get(layer.name))
            weights[layer.key] = unit if unit.quantized else marked_anew(unit, layer, rules.recipe.comfy_quant, careful)
    units: list[Unit] = []
    removed: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        owner = owners.get(name)
        if reason := rules.removes(owner.key if owner else name):
            removed[name] = reason
        elif name in legacy:
            removed[name] = "the spelling of today, in which each layer has a marker of its own"
        elif owner is None and foreign and layer_of(name) in foreign:
            units.append(foreign_unit(len(units), tensor))
        elif owner is None:
            entry = listed.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            units.append(make_unit(len(units), tensor, rules, unrotated, listed=entry))
        elif name == owner.key:
            units.append(replace(weights[name], index=len(units)))
        elif weights[owner.key].decoded is None:
            units.append(scale_unit(len(units), tensor, owner))
    return units, removed


def _complain_about_unmatched(rules: Rules, checkpoint: Checkpoint, removed: dict[str, str]) -> None:
    for pattern, count in rules.matches.items():
        if count:
            continue
        touched = [key for key in checkpoint.tensors if pattern.finds(key.removesuffix(".weight"), key)]
        if touched and touched[0] in removed:
            raise errors.PatternError(
                f"{pattern.origin} {pattern.text!r} finds only tensors that {removed[touched[0]]} leaves out, such as "
                f"{printable(touched[0])!r}."
            )
        if touched:
            raise errors.PatternError(
                f"{pattern.origin} {pattern.text!r} finds only tensors that cannot be quantized, such as "
                f"{printable(touched[0])!r}: only 2-D floating-point *.weight tensors can."
            )
        examples = [key for key, tensor in checkpoint.tensors.items() if len(tensor.info.shape) == 2][:3]
        raise errors.PatternError(
            f"{pattern.origin} {pattern.text!r} finds no tensor; names here look like "
            f"{', '.join(repr(printable(example)) for example in examples) or 'nothing: there is no 2-D tensor'}."
        )


def _nothing_sentence(checkpoint: Checkpoint, units: list[Unit], foreign: dict[str, str]) -> str:
    where = printable(str(checkpoint.path), 300)
    if foreign:
        name, tool = next(iter(foreign.items()))
        return (
            f"No layer of {where} would be converted: it was quantized by {tool} (such as {printable(name)}), which cannot be "
            f"decoded here; convert from the original checkpoint."
        )
    already = Counter(unit.reason for unit in units if unit.reason and unit.reason.endswith(" already"))
    if already:
        found = ", ".join(f"{count} {'is' if count == 1 else 'are'} {printable(words[3:])}" for words, count in already.items())
        return f"No layer of {where} would be converted: {found}. Ask for another format, or convert from the original."
    unknown = sum((unit.reason or "").startswith("already quantized") for unit in units)
    if unknown:
        return (
            f"No layer of {where} would be converted: {_layers(unknown)} quantized already, in a way that is not known "
            f"here; convert from the original checkpoint."
        )
    if not any(len(unit.shape) == 2 for unit in units):
        return f"No layer of {where} would be converted: it holds no 2-D *.weight tensor."
    return f"No layer of {where} would be converted: every candidate stays by a rule; --preset none lifts the preset's."


def _refuse_name_clashes(units: list[Unit]) -> None:
    """A source tensor named like something we write for a layer (its old scale, say) would come twice."""
    counts = Counter(name for unit in units for name in unit.output_names)
    for unit in units:
        for name in unit.output_names:
            if counts[name] > 1:
                raise errors.CheckpointError(
                    f"The source already has a tensor {printable(name)!r}, which converting "
                    f"{printable(unit.layer)!r} would write: it seems quantized already, convert from the original."
                )


def _shard_groups(units: list[Unit], shard_size: int | None) -> list[list[Unit]]:
    """Units per output file: greedily in order, a layer's tensors together."""
    if shard_size is None:
        return [units]
    groups: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        size = sum(_tensor_bytes(output) for output in unit.outputs)
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += size
    return groups


def _tensor_bytes(output: Output) -> int:
    info = layout([("", output.dtype, output.shape)])[0]
    return info.nbytes


def _file_names(name: str, count: int) -> list[str]:
    if count == 1:
        return [name]
    stem = name.removesuffix(".safetensors")
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _plan_file(name: str, units: list[Unit], checkpoint: Checkpoint, recipe: Recipe) -> PlannedFile:
    tensors = (
        (name, output.dtype, output.shape)
        for unit in units
        for name, output in zip(unit.output_names, unit.outputs, strict=True)
    )
    layers = {unit.layer: unit.listed for unit in units if unit.listed is not None}
    listing = _quantization_metadata(layers) if layers else None
    if listing:
        # Which rows of INT8 are rotated is known after the layout is: spaces take the place of what an entry lacks.
        longest = _quantization_metadata(layers | {unit.layer: marker for unit in units if (marker := _rotated_marker(unit))})
        listing += " " * (len(json.dumps(longest)) - len(json.dumps(listing)))
    return planned_file(name, tensors, checkpoint, {"recipe": recipe.describe()}, listing)


def _quantization_metadata(layers: dict[str, Any]) -> str:
    return json.dumps({"format_version": "1.0", "layers": layers})


def _rotated_marker(unit: Unit) -> dict[str, Any] | None:
    """What a layer of INT8 rows carries if it is rotated, None for every other layer."""
    rotation = unit.choice.rotation(unit.shape[1]) if unit.quantized and unit.choice else 0
    return replace(unit.format, convrot_group_size=rotation).comfy_quant() if rotation else None


def _notes(units: list[Unit], removed: dict[str, str], foreign: dict[str, str], rules: Rules) -> Iterator[str]:
    if "auto" in rules.recipe.preset:
        prefix = f", with the prefix {printable(rules.prefix)!r}" if rules.prefix else ""
        if rules.recognised.name.startswith("_"):
            yield (
                f"Architecture not recognised{prefix}: embeddings, first and last layers stay as they are by the general rule; "
                f"--preset names another, --dry-run shows what stays."
            )
        else:
            yield f"Architecture recognised by its keys: {rules.recognised.title}{prefix}."
    for reason, count in Counter(reason.partition(" (")[0] for reason in removed.values()).items():
        yield f"{_tensors(count)} left out by {reason}."
    if decoded := Counter(unit.decoded.format for unit in units if unit.decoded):
        if len(decoded) > 1:
            found = ", ".join(f"{count:,} {printable(name)}" for name, count in decoded.items())
        else:
            (found,) = map(printable, decoded)
        yield (
            f"The source is quantized: {_layers(decoded.total())} decoded on the way ({found}). Errors are against the decoded "
            f"weights; convert from the original checkpoint if you have it, which loses less."
        )
    if already := sum(_was_quantized(unit) for unit in units):
        yield f"{_layers(already)} quantized already and copied with their scales."
    for tool, count in Counter({layer_of(name): tool for name, tool in foreign.items()}.values()).items():
        yield f"{_layers(count)} of {tool}, which cannot be decoded here, and copied as they are."


def _was_quantized(unit: Unit) -> bool:
    return unit.key.endswith(".weight") and not unit.quantized and unit.source.info.dtype in QUANTIZED


def _layers(count: int) -> str:
    return f"{count:,} layers are" if count != 1 else "1 layer is"


def _tensors(count: int) -> str:
    return f"{count:,} tensors are" if count != 1 else "1 tensor is"
