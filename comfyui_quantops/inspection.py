"""What is in a checkpoint, as a table of text: from its header and a few small tensors."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from streamquant.checkpoint.header import printable
from streamquant.checkpoint.json_text import load_json
from streamquant.checkpoint.reader import Checkpoint, open_checkpoint

QUANT_STATE = ".quant_state.bitsandbytes__"


def inspect(path: str | Path) -> str:
    """A table of the checkpoint's layers and their formats. Raises a CheckpointError for a damaged file."""
    checkpoint = open_checkpoint(path)
    formats = layer_formats(checkpoint)
    layers: dict[str, int] = Counter()
    for key, tensor in checkpoint.tensors.items():
        layers[owner(key, formats)] += tensor.info.nbytes
    lines = [printable(Path(path).name), f"{len(checkpoint.tensors):,} tensors, {checkpoint.size:,} bytes", ""]
    lines += _totals(layers, formats)
    if "streamquant" in checkpoint.metadata:
        lines += ["", "Converted by streamquant."]
    width = max((len(printable(layer)) for layer in formats), default=0)
    lines += ["", *(f"{printable(layer):<{width}}  {described}" for layer, described in sorted(formats.items()))]
    return "\n".join(lines)


def layer_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """What each quantized layer is in, in a few words; layers in high precision are left out."""
    markers = _header_markers(checkpoint)
    formats = {}
    for key, tensor in checkpoint.tensors.items():
        if QUANT_STATE in key and key.partition(QUANT_STATE)[0].endswith(".weight"):
            weight, _, book = key.partition(QUANT_STATE)
            state = _json(checkpoint, key)
            nested = ", absmax in 8 bits" if "nested_offset" in state else ""
            formats[weight.removesuffix(".weight")] = (
                f"{_shape(state.get('shape', ()))}  bitsandbytes {book}, blocks of {state.get('blocksize')}{nested}"
            )
        elif key.endswith(".comfy_quant"):
            markers.setdefault(key.removesuffix(".comfy_quant"), {}).update(_json(checkpoint, key))
        elif key.endswith(".scale_weight") and "scaled_fp8" in checkpoint.tensors:
            markers.setdefault(key.removesuffix(".scale_weight"), {"format": f"scaled fp8 ({tensor.info.dtype})"})
    for layer, marker in markers.items():
        weight = checkpoint.tensors.get(f"{layer}.weight")
        if layer not in formats and weight is not None:
            rest = ", ".join(f"{name} {value}" for name, value in marker.items() if name not in ("format", "orig_dtype"))
            formats[layer] = f"{_shape(weight.info.shape)}  {marker.get('format')}{', ' + rest if rest else ''}"
    return formats


def owner(key: str, formats: dict[str, str]) -> str:
    """The quantized layer that a tensor is a part of, or "" for what stands for itself."""
    layer = key
    while "." in layer:
        layer = layer.rpartition(".")[0]
        if layer in formats:
            return layer
    return ""


def _totals(layers: dict[str, int], formats: dict[str, str]) -> list[str]:
    """One line per format, the largest first: how many layers, how many bytes."""
    kinds: dict[str, list[int]] = {}
    for layer, nbytes in layers.items():
        kind = formats[layer].partition("  ")[2] if layer else "not quantized"
        kinds.setdefault(kind, []).append(nbytes)
    ranked = sorted(kinds.items(), key=lambda item: -sum(item[1]))
    return [
        f"{sum(sizes):>18,} bytes  {kind}" + (f" ({len(sizes):,} layers)" if kind != "not quantized" else "")
        for kind, sizes in ranked
    ]


def _header_markers(checkpoint: Checkpoint) -> dict[str, dict]:
    try:
        layers = load_json(checkpoint.metadata.get("_quantization_metadata", "{}")).get("layers", {})
    except (ValueError, AttributeError):
        return {}  # a table of what is there; whoever loads the file complains
    return {layer: dict(marker) for layer, marker in layers.items() if isinstance(marker, dict)}


def _json(checkpoint: Checkpoint, key: str) -> dict:
    info = checkpoint.tensors[key].info
    if math.prod(info.shape) > 1 << 16:
        return {}
    try:
        value = load_json(bytes(checkpoint.read(key).flatten().tolist()))
    except (ValueError, TypeError):
        return {}
    return value if isinstance(value, dict) else {}


def _shape(shape: tuple[int, ...] | list[int]) -> str:
    return " x ".join(f"{n}" for n in shape)
