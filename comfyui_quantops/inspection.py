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
    if contents.plain:
        sizes["not quantized"] = [sum(tensor.info.nbytes for tensor in contents.plain.values())]
    for layer in contents.layers.values():
        sizes.setdefault(_described(layer), []).append(layer.nbytes)
    lines = [printable(Path(path).name), f"{len(checkpoint.tensors):,} tensors, {checkpoint.size:,} bytes", ""]
    for kind, members in sorted(sizes.items(), key=lambda item: -sum(item[1])):
        lines.append(f"{sum(members):>18,} bytes  {kind}" + (f" ({len(members):,} layers)" if kind != "not quantized" else ""))
    if "streamquant" in checkpoint.metadata:
        lines += ["", "Converted by streamquant."]
    named = {printable(layer.name): layer for layer in contents.layers.values()}
    width = max(map(len, named), default=0)
    rows = []
    for name, layer in sorted(named.items()):
        rows.append(f"{name:<{width}}  {' x '.join(map(str, layer.shape))}  {_described(layer)}")
    return "\n".join([*lines, "", *rows])


def _described(layer: StoredLayer) -> str:
    return f"{printable(layer.format)}, {printable(layer.detail)}"
