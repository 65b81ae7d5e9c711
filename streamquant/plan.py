"""Recipe × checkpoint → plan: every output tensor's name, dtype, shape and byte offset, before a weight is read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from streamquant import __version__, errors
from streamquant.checkpoint.header import TensorInfo, build_header, layout, printable
from streamquant.checkpoint.json_text import load_json
from streamquant.checkpoint.reader import Checkpoint, SourceTensor, open_checkpoint
from streamquant.formats import Format, Output
from streamquant.formats.base import json_output
from streamquant.formats.plain import Cast, Copy
from streamquant.presets import Preset
from streamquant.recipe import CONVROT_GROUP_SIZES, Decision, FormatChoice, Recipe, Rules

FLOATS = ("BF16", "F16", "F32", "F64")
QUANTIZED = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "F4", "F6_E2M3", "F6_E3M2")
HASH_DIGITS = 16  # of an xxh3_64, in hex
PROVENANCE_KEY = "streamquant"
QUANTIZATION_KEY = "_quantization_metadata"


@dataclass(frozen=True)
class Unit:
    """One source tensor and what it becomes.

    layer: the key without `.weight`. elements: how the format counts the tensor (bytes, for a copy). element_bytes: of
    the source, per such element. rule: which rule decided. reason: why it stays, or why it is not in the format asked
    for; None when all went as asked.
    """

    index: int
    source: SourceTensor
    layer: str
    format: Format
    outputs: tuple[Output, ...]
    elements: int
    element_bytes: int
    granularity: int
    rule: str
    reason: str | None
    choice: FormatChoice | None = None

    @property
    def key(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> str:
        return self.source.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.info.shape

    @property
    def quantized(self) -> bool:
        return not isinstance(self.format, Copy | Cast)

    def output_name(self, output: Output) -> str:
        """The tensor name of one of the outputs."""
        return f"{self.layer}.{output.suffix}" if output.suffix else self.key


@dataclass(frozen=True)
class PlannedFile:
    """One output file. header: its first bytes, with zeros where the tensor hashes go. hash_offset: where that is."""

    name: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    hash_offset: int

    @property
    def size(self) -> int:
        return len(self.header) + (self.tensors[-1].end if self.tensors else 0)


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, complete.

    units: in the order in which they are processed. placement: output tensor name -> (file number, byte offset in the
    file, bytes). removed: source tensors left out, with the reason. notes: what a person should know before it starts.
    presets, prefix: those in force and the one recognised, and what the checkpoint's names carry before their own.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    architecture: str
    units: tuple[Unit, ...]
    removed: dict[str, str]
    files: tuple[PlannedFile, ...]
    placement: dict[str, tuple[int, int, int]]
    index_name: str | None
    notes: tuple[str, ...] = field(default=())
    presets: tuple[Preset, ...] = ()
    prefix: str = ""

    @property
    def name(self) -> str:
        """The output's file name; of shards, the one they are numbered after."""
        return self.index_name.removesuffix(".index.json") if self.index_name else self.files[0].name

    @property
    def output_size(self) -> int:
        """Bytes of all output files."""
        return sum(file.size for file in self.files)

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read (once)."""
        return sum(unit.source.info.nbytes for unit in self.units)

    def file_of(self, unit: Unit) -> int:
        """The number of the output file that holds all of a unit's tensors."""
        return self.placement[unit.output_name(unit.outputs[0])][0]

    def output_bytes(self, unit: Unit) -> int:
        """Bytes of all tensors that a unit becomes."""
        return sum(self.placement[unit.output_name(output)][2] for output in unit.outputs)

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
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    recipe = recipe or Recipe()
    rules = Rules(recipe, list(checkpoint.tensors))
    units, removed = [], {}
    for tensor in checkpoint.tensors.values():
        if reason := rules.removes(tensor.name):
            removed[tensor.name] = reason
        else:
            units.append(_make_unit(len(units), tensor, rules, unrotated))
    _complain_about_unmatched(rules, checkpoint, removed)
    if all(isinstance(unit.format, Copy) for unit in units):
        raise errors.NothingToConvertError(_nothing_sentence(checkpoint, units))
    _refuse_name_clashes(units)
    groups = _shard_groups(units, shard_size)
    names = _file_names(name, len(groups))
    files, placement = [], {}
    inherited = listed_layers(checkpoint)
    for number, (file_name, members) in enumerate(zip(names, groups, strict=True)):
        file = _plan_file(file_name, members, checkpoint, recipe, inherited)
        files.append(file)
        placement |= {tensor.name: (number, len(file.header) + tensor.start, tensor.nbytes) for tensor in file.tensors}
    index_name = f"{name.removesuffix('.safetensors')}.safetensors.index.json" if len(groups) > 1 else None
    architecture = rules.recognised.title
    notes = _notes(units, removed, rules)
    known = tuple(dict.fromkeys((*rules.presets, rules.recognised)))
    return Plan(
        checkpoint, recipe, architecture, tuple(units), removed, tuple(files), placement, index_name, notes, known,
        rules.prefix,
    )  # fmt: skip


def _make_unit(index: int, tensor: SourceTensor, rules: Rules, unrotated: frozenset[str]) -> Unit:
    info = tensor.info
    layer = info.name.removesuffix(".weight")
    decision = _decide(tensor, layer, rules)
    chosen, reason = _choose_format(decision, tensor, rules)
    if chosen is None:
        return _plain_unit(index, tensor, layer, decision.rule, reason, rules.recipe.cast)
    marker = chosen.comfy_quant()
    room = len(json.dumps(marker))
    if layer in unrotated:
        chosen = replace(chosen, convrot_group_size=0)
        marker = chosen.comfy_quant()
    outputs = list(chosen.outputs(info.shape, info.dtype))
    if marker and (chosen.in_quantization_metadata() or rules.recipe.comfy_quant):
        outputs.append(json_output("comfy_quant", marker, room))
    granularity = chosen.granularity(info.shape, info.dtype)
    return Unit(
        index, tensor, layer, chosen, tuple(outputs), info.elements, info.nbytes // info.elements, granularity,
        decision.rule, reason, decision.choice,
    )  # fmt: skip


def _decide(tensor: SourceTensor, layer: str, rules: Rules) -> Decision:
    """What the rules say of a tensor; what is no candidate stays, whatever they say."""
    info = tensor.info
    if not info.name.endswith(".weight") or len(info.shape) != 2:
        return Decision(None, "not a linear weight")
    if info.dtype not in FLOATS:
        reason = f"already quantized ({info.dtype})" if info.dtype in QUANTIZED else f"not floating point ({info.dtype})"
        return Decision(None, "not a linear weight", reason)
    if not info.elements:
        return Decision(None, "not a linear weight", "empty")
    return rules.decide(layer, info.name)


def _choose_format(decision: Decision, tensor: SourceTensor, rules: Rules) -> tuple[Format | None, str | None]:
    """The format that fits the shape: the one decided, its stated fallback, or none."""
    if decision.choice is None:
        return None, decision.reason
    shape = tensor.info.shape
    if small := decision.choice.too_small(shape):
        return None, small
    wanted = decision.choice.format
    if rotation := decision.choice.rotation(shape[1]):
        wanted = replace(wanted, convrot_group_size=rotation)
    elif decision.choice.convrot:
        sizes = decision.choice.convrot_group_size or " or ".join(map(str, reversed(CONVROT_GROUP_SIZES)))
        return wanted, f"{shape[1]} columns are not divisible into groups of {sizes}: not rotated"
    if wanted is None or not (misfit := wanted.misfit(shape)):
        return wanted, None
    fallback = wanted.fallback()
    became = f"row scales ({fallback.name})" if fallback else "kept"
    return fallback, f"{misfit}: {became}"


def _plain_unit(index: int, tensor: SourceTensor, layer: str, rule: str, reason: str | None, cast: str | None) -> Unit:
    info = tensor.info
    if cast and info.dtype in FLOATS and info.dtype != cast and not _belongs_to_quantized(info.name):
        outputs = (*Cast(cast).outputs(info.shape, info.dtype),)
        width = info.nbytes // info.elements if info.elements else 1
        return Unit(index, tensor, layer, Cast(cast), outputs, info.elements, width, 1, rule, reason)
    outputs = (*Copy().outputs(info.shape, info.dtype),)
    return Unit(index, tensor, layer, Copy(), outputs, info.nbytes, 1, 1, rule, reason)


_SCALE_SUFFIXES = (
    "weight_scale", "weight_scale_2", "scale_weight", "input_scale", "scale_input", "absmax", "quant_map",
    "nested_absmax", "nested_quant_map", "scaled_fp8", "pre_quant_scale",
)  # fmt: skip


def _belongs_to_quantized(key: str) -> bool:
    """Scales of an already quantized source keep their dtype: casting them would change every weight."""
    return key.rsplit(".", 1)[-1] in _SCALE_SUFFIXES


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


def _nothing_sentence(checkpoint: Checkpoint, units: list[Unit]) -> str:
    where = printable(str(checkpoint.path), 300)
    already = sum((unit.reason or "").startswith("already quantized") for unit in units)
    if already:
        return f"No layer of {where} would be converted: {already} are quantized already, convert from the original checkpoint."
    if not any(len(unit.shape) == 2 for unit in units):
        return f"No layer of {where} would be converted: it holds no 2-D *.weight tensor."
    return f"No layer of {where} would be converted: every candidate stays by a rule; --preset none lifts the preset's."


def _refuse_name_clashes(units: list[Unit]) -> None:
    """A source tensor named like something we write for a layer (its old scale, say) would come twice."""
    counts = Counter(unit.output_name(output) for unit in units for output in unit.outputs)
    for unit in units:
        for output in unit.outputs:
            if counts[unit.output_name(output)] > 1:
                raise errors.CheckpointError(
                    f"The source already has a tensor {printable(unit.output_name(output))!r}, which converting "
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


def _plan_file(
    name: str, units: list[Unit], checkpoint: Checkpoint, recipe: Recipe, inherited: dict[str, Any]
) -> PlannedFile:
    tensors = layout(
        (unit.output_name(output), output.dtype, output.shape) for unit in units for output in unit.outputs
    )
    metadata = dict(checkpoint.metadata)
    metadata.setdefault("format", "pt")
    metadata.pop(QUANTIZATION_KEY, None)  # the source's may list layers of other shards, or that are left out
    if layers := _quantization_layers(units, inherited):
        metadata[QUANTIZATION_KEY] = _quantization_metadata(layers)
        # Which rows of INT8 are rotated is known after the layout is: spaces take the place of what an entry lacks.
        longest = _quantization_metadata(layers | {unit.layer: marker for unit in units if (marker := _rotated_marker(unit))})
        metadata[QUANTIZATION_KEY] += " " * (len(json.dumps(longest)) - len(json.dumps(metadata[QUANTIZATION_KEY])))
    provenance = {
        "tool": "streamquant",
        "version": __version__,
        "recipe": recipe.describe(),
        "source": [{"name": file.path.name, "header_sha256": file.header.sha256} for file in checkpoint.files],
    }
    # The tensors' hashes are known last but their length is known now: zeros keep their place at the very end.
    zeros = "0" * HASH_DIGITS * len(tensors)
    opening = json.dumps(provenance)[:-1] + ', "tensor_xxh3_64": "'
    metadata[PROVENANCE_KEY] = opening + zeros + '"}'
    header = build_header(tensors, metadata)
    marker = json.dumps(opening, ensure_ascii=False)[1:-1].encode()
    return PlannedFile(name, header, tuple(tensors), header.index(marker) + len(marker))


def _quantization_metadata(layers: dict[str, Any]) -> str:
    return json.dumps({"format_version": "1.0", "layers": layers})


def _rotated_marker(unit: Unit) -> dict[str, Any] | None:
    """What a layer of INT8 rows carries if it is rotated, None for every other layer."""
    rotation = unit.choice.rotation(unit.shape[1]) if unit.quantized and unit.choice else 0
    return replace(unit.format, convrot_group_size=rotation).comfy_quant() if rotation else None


def _quantization_layers(units: list[Unit], inherited: dict[str, Any]) -> dict[str, Any]:
    """The header's list of ComfyUI-quantized layers: ours, and those the source had and keeps."""
    layers: dict[str, Any] = {}
    for unit in units:
        if unit.quantized and unit.format.in_quantization_metadata():
            layers[unit.layer] = unit.format.comfy_quant()
        elif unit.layer in inherited and unit.key.endswith(".weight"):
            layers[unit.layer] = inherited[unit.layer]
    return layers


def listed_layers(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The ComfyUI-quantized layers that the headers list, of all files. Raises MetadataError when an entry is malformed."""
    layers: dict[str, Any] = {}
    for file in checkpoint.files:
        try:
            listed = load_json(file.header.metadata.get(QUANTIZATION_KEY, "{}")).get("layers", {})
        except (ValueError, AttributeError):
            listed = None
        if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
            raise errors.MetadataError(
                f"{printable(str(file.path), 300)}: its {QUANTIZATION_KEY} entry is not the JSON object of layers it should "
                f"be: mend or remove it."
            )
        layers |= listed
    return layers


def _notes(units: list[Unit], removed: dict[str, str], rules: Rules) -> tuple[str, ...]:
    notes = []
    if removed:
        notes.append(f"{len(removed)} tensors are left out by {next(iter(removed.values()))}.")
    already = [unit for unit in units if (unit.reason or "").startswith("already quantized")]
    if already:
        notes.append(f"{len(already)} layers are quantized already and are copied with their scales.")
    if "auto" in rules.recipe.preset:
        prefix = f", with the prefix {printable(rules.prefix)!r}" if rules.prefix else ""
        notes.insert(0, f"Architecture recognised by its keys: {rules.recognised.title}{prefix}.")
    return tuple(notes)
