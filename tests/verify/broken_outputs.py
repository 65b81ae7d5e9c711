"""Sound outputs, and the same with one thing wrong: how files go wrong in practice, made on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from small_checkpoints import Tensor, floats, load, metadata_of, of_values, save

import streamquant
from streamquant import Recipe
from streamquant.verdict import Verdict
from streamquant.verify import verify

Tensors = dict[str, Tensor]
LAYER = "blocks.1.a"
SIZE = 256


def source_tensors() -> Tensors:
    """Six square layers, one of them with rows of very different magnitude, and a bias."""
    tensors = {f"blocks.{block}.{name}.weight": floats(SIZE, SIZE, seed=10 * block + number)
               for block in range(3) for number, name in enumerate("ab")}  # fmt: skip
    loud = np.random.default_rng(3).standard_normal((SIZE, SIZE)) * np.geomspace(0.1, 10, SIZE)[:, None]
    return tensors | {"blocks.0.b.weight": of_values(loud), "blocks.0.a.bias": floats(SIZE, seed=99)}


def write_source(folder: Path) -> Path:
    return save(folder / "source.safetensors", source_tensors())


def broken(
    folder: Path, recipe: Recipe, edit: Callable[[Tensors, dict[str, str]], None], keep_manifest: bool = False
) -> Verdict:
    """Convert, break the output, verify it. Without its manifest, so that the weights alone must tell."""
    source = folder / "source.safetensors"
    if not source.exists():
        write_source(folder)
    output = folder / "output.safetensors"
    streamquant.convert(source, output, recipe, force=True)
    tensors, metadata = load(output), metadata_of(output)
    if not keep_manifest:
        metadata.pop("streamquant")
    edit(tensors, metadata)
    return verify(source, save(folder / "broken.safetensors", tensors, metadata))


def cause(found: Verdict, layer: str = LAYER) -> str:
    """What the verdict says of one layer, after making sure that it speaks of no other."""
    assert not found.sound
    assert {finding.tensor for finding in found.findings} == {f"{layer}.weight"}, found.findings
    return found.findings[0].text


def change(tensors: Tensors, name: str, edit: Callable[[np.ndarray], np.ndarray], dtype=np.float32) -> None:
    """Edit a tensor's elements, given as a flat copy."""
    before = tensors[name]
    values = np.frombuffer(before.data, dtype=dtype).copy()
    tensors[name] = before._replace(data=np.ascontiguousarray(edit(values), dtype=dtype).tobytes())


def mark(tensors: Tensors, metadata: dict[str, str], marker: dict, layer: str = LAYER) -> None:
    """Give a layer another ComfyUI marker, in both places."""
    listed = json.loads(metadata["_quantization_metadata"])
    listed["layers"][layer] = marker
    metadata["_quantization_metadata"] = json.dumps(listed)
    data = json.dumps(marker).encode()
    tensors[f"{layer}.comfy_quant"] = Tensor("U8", (len(data),), data)
