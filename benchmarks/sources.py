"""The checkpoints that benchmarks convert: made once in the working folder, then used again."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from benchmarks.checkpoints import write_checkpoint
from benchmarks.race import lacking_room
from benchmarks.shapes import FluxShape, TensorShape, flux_of_size, one_tensor
from benchmarks.units import format_size, parse_size

SPARSE = "-sparse"


def check(name: str) -> None:
    """Raise ValueError when there is no source called `name`; nothing is written."""
    _tensors(name.removesuffix(SPARSE))


def prepare(workdir: Path, name: str, console: Console, seed: int = 0) -> Path:
    """Return the checkpoint called `name`, made first when it is not there.

    Names are `4GB` (a Flux.2 of that size), `16GB-sparse` and `flux2-dev-sparse` (of that size, and the full shape: all zeros,
    no disk) and `one-tensor-4GB` (a single layer).
    """
    path = workdir / "sources" / f"{name}-seed{seed}.safetensors"
    if path.exists():
        return path
    sparse = name.endswith(SPARSE)
    tensors, size = _tensors(name.removesuffix(SPARSE))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not sparse and (reason := lacking_room(path.parent, size)):
        raise OSError(f"{path.name} {reason}")
    console.print(f"writing {path} ({format_size(size)}{', sparse' if sparse else ''})")
    write_checkpoint(path, tensors, seed, sparse)
    return path


def _tensors(name: str) -> tuple[list[TensorShape], int]:
    """Return the tensors that `name` stands for and about how many bytes they take."""
    if name == "flux2-dev":
        shape = FluxShape()
        return shape.tensors(), 2 * shape.parameters()
    if name.startswith("one-tensor-"):
        size = parse_size(name.removeprefix("one-tensor-"))
        return one_tensor(size), size
    size = parse_size(name)
    return flux_of_size(size).tensors(), size
