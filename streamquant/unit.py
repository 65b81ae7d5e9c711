"""One weight on its way: the tensors of the source it is read from, and the tensors of the output it becomes."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from streamquant import errors
from streamquant.checkpoint.header import element_bytes
from streamquant.checkpoint.reader import SourceTensor
from streamquant.formats import Format, Output
from streamquant.formats.base import json_output
from streamquant.formats.bnb4 import BitsAndBytes4bit
from streamquant.formats.plain import Cast, Copy
from streamquant.recipe import CONVROT_GROUP_SIZES, Decision, FormatChoice, Rules
from streamquant.stored import Read, ScaledCodes, StoredLayer, elements
from streamquant.stored.contents import BESIDE, LEGACY_MARKER, UNDER
from streamquant.stored.recognise import FLOATS, undecodable_sentence

NESTED_ABSMAX = {"weight.nested_absmax"}
LEGACY_SCALE = "scale_weight"
QUANTIZED = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "F4", "F6_E2M3", "F6_E3M2")


@dataclass(frozen=True)
class Unit:
    """What is read and becomes tensors of the output, all at once.

    source: the weight, or its codes. layer: the key without `.weight`. origin: dtype of the weights, in a quantized source
    the one they were made from. elements: how the format counts the tensor (bytes, for a copy). element_bytes: of the
    source as it is read, per such element. rule: which rule decided. reason: why it stays, or why it is not in the
    format asked for; None when all went as asked. listed: its entry in the header's list of ComfyUI-quantized layers.
    decoded: the layer of a quantized source that is decoded on the way.
    """

    index: int
    source: SourceTensor
    layer: str
    format: Format
    outputs: tuple[Output, ...]
    origin: str
    elements: int
    element_bytes: int
    granularity: int
    rule: str
    reason: str | None
    choice: FormatChoice | None = None
    listed: dict[str, Any] | None = None
    decoded: StoredLayer | None = None

    @property
    def key(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> str:
        """Of what `read` returns."""
        return self.source.info.dtype if self.decoded is None else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.info.shape if self.decoded is None else self.decoded.shape

    @property
    def quantized(self) -> bool:
        return not isinstance(self.format, Copy | Cast)

    @property
    def sources(self) -> tuple[SourceTensor, ...]:
        """Every tensor of the source that it is made of, the weight first."""
        return (self.source,) if self.decoded is None else tuple(self.decoded.tensors.values())

    @property
    def source_bytes(self) -> int:
        """Bytes of the source that it is made of."""
        return self.source.info.nbytes if self.decoded is None else self.decoded.nbytes

    def source_bytes_of(self, begin: int, end: int) -> int:
        """The share of `source_bytes` that elements [begin, end) stand for; shares of all tiles sum to the whole."""
        if self.decoded is None:
            return (end - begin) * self.element_bytes
        return self.source_bytes * end // self.elements - self.source_bytes * begin // self.elements

    def read(self, tile: Read, begin: int, end: int) -> memoryview:
        """The bytes of elements [begin, end) in `dtype`. tile: reads a range of a tensor, as `TileReader.tile`."""
        if self.decoded is None:
            return tile(self.source, begin * self.element_bytes, end * self.element_bytes)
        return memoryview(elements(self.decoded.layout, tile, begin, end).view(np.uint8))

    def output_name(self, output: Output) -> str:
        """The tensor name of one of the outputs."""
        return f"{self.layer}.{output.suffix}" if output.suffix else self.key

    @functools.cached_property
    def output_names(self) -> tuple[str, ...]:
        """The tensor names of all outputs."""
        return tuple(map(self.output_name, self.outputs))


def make_unit(
    index: int, tensor: SourceTensor, rules: Rules, unrotated: frozenset[str], stored: StoredLayer | None = None,
    listed: dict[str, Any] | None = None,
) -> Unit:  # fmt: skip
    """What becomes of a tensor that is no part of another's layer.

    unrotated: layers left to us that are better as they are. stored: the layer whose weight it is, in a quantized source.
    listed: the source's entry for it in its list of ComfyUI-quantized layers. Raises CheckpointError for a layer that is to
    be converted and cannot be decoded.
    """
    info = tensor.info
    layer = info.name.removesuffix(".weight")
    shape = stored.shape if stored else info.shape
    decision = _decide(tensor, layer, shape, rules, stored is not None)
    chosen, reason = _choose_format(decision, shape)
    if chosen is not None and stored is not None and already_is(stored, chosen, decision.choice):
        chosen, reason = None, f"is {stored.format} already"
    if chosen is None:
        return replace(_plain_unit(index, tensor, decision.rule, reason, rules.recipe.cast), listed=listed)
    if stored is not None:
        _refuse_undecodable(stored)
    origin = (stored.origin or "BF16") if stored else info.dtype
    asked, chosen = chosen, replace(chosen, convrot_group_size=0) if layer in unrotated else chosen
    is_listed = chosen.in_quantization_metadata()
    outputs, granularity = _layer_layout(chosen, shape, origin, asked if is_listed or rules.recipe.comfy_quant else None)
    elements_, width = info.elements, info.nbytes // info.elements
    if stored is not None:
        elements_, width, granularity = stored.elements, 4, math.lcm(granularity, stored.layout.alignment)
    return Unit(
        index, tensor, layer, chosen, outputs, origin, elements_, width, granularity, decision.rule, reason,
        decision.choice, chosen.comfy_quant() if is_listed else None, stored,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)  # many layers have one shape
def _layer_layout(
    chosen: Format, shape: tuple[int, ...], dtype: str, asked: Format | None
) -> tuple[tuple[Output, ...], int]:
    """The outputs of a weight, and its granularity. asked: the format whose marker there must be room for, if any."""
    outputs = list(chosen.outputs(shape, dtype))
    if asked and (marker := chosen.comfy_quant()):
        outputs.append(json_output("comfy_quant", marker, room=len(json.dumps(asked.comfy_quant()))))
    return tuple(outputs), chosen.granularity(shape, dtype)


def scale_unit(index: int, tensor: SourceTensor, owner: StoredLayer) -> Unit:
    """A scale or marker of a quantized layer that stays: copied, under the name that loaders look for now."""
    unit = _plain_unit(index, tensor, "scales and markers of what stays", None, None)
    suffix = tensor.name.removeprefix(f"{owner.name}.")
    if modern(suffix) == suffix:
        return unit
    return replace(unit, layer=owner.name, outputs=(replace(unit.outputs[0], suffix=modern(suffix)),))


def foreign_unit(index: int, tensor: SourceTensor) -> Unit:
    """A tensor of a layer in the layout of another tool: copied, for nothing here knows what another dtype would do to it."""
    return _plain_unit(index, tensor, "layers of other tools", None, None)


def modern(suffix: str) -> str:
    """How the older `scaled_fp8` spelling of a scale is spelled now."""
    return {"scale_weight": "weight_scale", "scale_input": "input_scale"}.get(suffix, suffix)


def _refuse_undecodable(stored: StoredLayer) -> None:
    """Raise CheckpointError when a layer's weights cannot be had, or only without the scale that it should have."""
    scaleless = isinstance(stored.layout, ScaledCodes) and stored.layout.scale is None
    if stored.layout is None or (stored.faults and scaleless):
        sentence = undecodable_sentence(stored.name, stored.format, stored.faults)
        raise errors.CheckpointError(f"{sentence[:-1]}; --exclude-layers copies it as it is.")


def marked_anew(unit: Unit, stored: StoredLayer, comfy_quant: bool, careful: dict[str, Any]) -> Unit:
    """A quantized layer that stays, with the marker that loaders need and the source does not have.

    careful: what the older spelling says of all its layers.
    """
    if "comfy_quant" in stored.tensors or stored.faults:
        return unit
    if LEGACY_SCALE in stored.tensors and unit.listed is None:
        marker = {"format": stored.format} | careful
        unit = replace(unit, listed=marker)
    elif comfy_quant and issubclass(Format.registry.get(stored.format, Copy), BitsAndBytes4bit):
        marker = Format.registry[stored.format]().comfy_quant()
    else:
        return unit
    return replace(unit, outputs=(*unit.outputs, json_output("comfy_quant", marker)))


def _decide(tensor: SourceTensor, layer: str, shape: tuple[int, ...], rules: Rules, decodable: bool) -> Decision:
    """What the rules say of a tensor; what is no candidate stays, whatever they say."""
    info = tensor.info
    if not info.name.endswith(".weight") or len(shape) != 2:
        return Decision(None, "not a linear weight")
    if info.dtype not in FLOATS and not decodable:
        if info.dtype in QUANTIZED:
            return Decision(None, "not a linear weight", f"already quantized ({info.dtype}), in a way that is not known here")
        return Decision(None, "not a linear weight", f"not floating point ({info.dtype})")
    if not info.elements:
        return Decision(None, "not a linear weight", "empty")
    return rules.decide(layer, info.name)


def _choose_format(decision: Decision, shape: tuple[int, ...]) -> tuple[Format | None, str | None]:
    """The format that fits the shape: the one decided, its stated fallback, or none."""
    if decision.choice is None:
        return None, decision.reason
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


def already_is(stored: StoredLayer, chosen: Format, choice: FormatChoice) -> bool:
    """Whether a layer of the source is in the format asked for, so that encoding it anew could only lose.

    Then its codes and scales take as many bytes as the format gives them, whatever dtype the codes are stored as. The scale
    may be spelled the older way, or be missing (a plain cast). Rows of INT8 count whether rotated or not, unless that was
    asked for.
    """
    if stored.format != chosen.name or stored.layout is None:
        return False
    there = {modern(suffix): tensor.info.nbytes for suffix, tensor in stored.tensors.items()}
    wanted = {output.suffix: output for output in chosen.outputs(stored.shape, stored.origin or "BF16")}
    if there.keys() & NESTED_ABSMAX != wanted.keys() & NESTED_ABSMAX:
        return False
    for suffix, output in wanted.items():
        if suffix == "weight_scale" and suffix not in there:
            return not output.shape and isinstance(stored.layout, ScaledCodes) and stored.layout.scale is None
        if output.streamed and there[suffix] != element_bytes(output.dtype, math.prod(output.shape)):
            return False
    asked = choice.convrot is not None or choice.convrot_group_size is not None
    return not asked or getattr(stored.layout, "rotation", 0) == getattr(chosen, "convrot_group_size", 0)


def _plain_unit(index: int, tensor: SourceTensor, rule: str, reason: str | None, cast: str | None) -> Unit:
    info = tensor.info
    layer = info.name.removesuffix(".weight")
    if cast and info.dtype in FLOATS and info.dtype != cast and not _belongs_to_quantized(info.name):
        outputs, _ = _layer_layout(Cast(cast), info.shape, info.dtype, None)
        width = info.nbytes // info.elements if info.elements else 1
        return Unit(index, tensor, layer, Cast(cast), outputs, info.dtype, info.elements, width, 1, rule, reason)
    outputs, _ = _layer_layout(Copy(), info.shape, info.dtype, None)
    return Unit(index, tensor, layer, Copy(), outputs, info.dtype, info.nbytes, 1, 1, rule, reason)


def _belongs_to_quantized(key: str) -> bool:
    """Scales of an already quantized source keep their dtype: casting them would change every weight."""
    return key.rsplit(".", 1)[-1] in (*BESIDE, *UNDER, LEGACY_MARKER)
