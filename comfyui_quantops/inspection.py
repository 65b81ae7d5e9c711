"""What is in a checkpoint, as a table of text: from its header and a few small tensors."""

from __future__ import annotations

from pathlib import Path

from streamquant.checkpoint.header import printable
from streamquant.stored import StoredLayer, read_contents


def inspect(path: str | Path) -> str:
    """A table of the checkpoint's layers and their formats. Raises a CheckpointError for a damaged file."""
    contents = read_contents(path)
    checkpoint = contents.checkpoint
    sizes: dict[str, list[int]] = {}
    for layer in contents.layers.values():
        sizes.setdefault(_described(layer), []).append(layer.nbytes)
    totals = [(sum(members), f"{kind} ({_layers(len(members))})") for kind, members in sizes.items()]
    if contents.plain:
        totals.append((sum(tensor.info.nbytes for tensor in contents.plain.values()), "not quantized"))
    lines = [printable(Path(path).name), f"{len(checkpoint.tensors):,} tensors, {checkpoint.size:,} bytes", ""]
    lines += [f"{nbytes:>18,} bytes  {what}" for nbytes, what in sorted(totals, reverse=True)]
    if "streamquant" in checkpoint.metadata:
        lines += ["", "Converted by streamquant."]
    layers = contents.layers.values()
    rows = sorted((printable(layer.name), f"{' x '.join(map(str, layer.shape))}  {_described(layer)}") for layer in layers)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([*lines, "", *(f"{name:<{width}}  {what}" for name, what in rows)])


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count:,} layers"


def _described(layer: StoredLayer) -> str:
    return f"{printable(layer.format)}, {printable(layer.detail)}"
