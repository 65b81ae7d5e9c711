"""The calibration file: what the linear layers of a model saw, in a safetensors file.

Metadata, all strings:

    format   "streamquant-calibration"
    version  "1"
    kind     "sketch", or "dense" where at least one layer holds its whole H
    seed     of Ω, a decimal integer
    keys     "module": layers are named by their path in the model, without ".weight"

Tensors per layer, N its in_features, x its inputs, n their number, H = Σ xᵀx / n:

    {layer}.count     I64 []        n
    {layer}.mean      F32 [N]       mean of x
    {layer}.diagonal  F32 [N]       mean of x², the diagonal of H
    {layer}.sketch    F32 [N, r]    H Ω, Ω = `sketch.probe(N, r, seed)`; r = rank + 8            either this
    {layer}.hessian   F32 [N, N]    H                                                            or this

The file keeps H Ω and not the V and D that rounding wants: moments of two sets of inputs add, so that merging is exact,
whereas factors V cannot be added; and any rank up to r can be chosen when it is used. V and D take a few milliseconds a
layer (`LayerStatistics.low_rank`). Divided by n, so that numbers do not grow with the data and a file reads as it is.

A layer is found whatever prefix the checkpoint's names have: "model.diffusion_model.blocks.0.attn.qkv", with or
without ".weight", finds "blocks.0.attn.qkv", and the other way round.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from streamquant.checkpoint.header import build_header, layout, printable
from streamquant.checkpoint.reader import TileReader, open_file
from streamquant.checkpoint.writer import write_file
from streamquant.errors import CalibrationError, CheckpointError, SourceReadError

from .statistics import LayerStatistics

FORMAT, VERSION = "streamquant-calibration", "1"
ADVICE = "mend the cause and try again"
# What loaders, wrappers and compilers put before a layer's name; more than one may be there.
PREFIXES = ("model.", "diffusion_model.", "transformer.", "unet.", "net.", "module.", "_orig_mod.", "base_model.")
_DTYPES = {"count": "I64", "mean": "F32", "diagonal": "F32", "sketch": "F32", "hessian": "F32"}
_DIMENSIONS = {"count": 0, "mean": 1, "diagonal": 1, "sketch": 2, "hessian": 2}
_NUMPY = {"I64": np.dtype("<i8"), "F32": np.dtype("<f4")}


def bare_name(name: str) -> str:
    """A layer's name without ".weight" and without known prefixes."""
    name = name.removesuffix(".weight")
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix) and len(name) > len(prefix)), None):
        name = name.removeprefix(prefix)
    return name


@dataclass
class Calibration:
    """The statistics of a model's layers, by name. seed: of Ω. readers: of the files whose pages the arrays are, if any."""

    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    seed: int = 0
    readers: tuple[TileReader, ...] = field(default=(), repr=False, compare=False)

    def confirm(self) -> None:
        """Raise SourceReadError when a file has changed or a page of it could not be read: what came of the arrays is not to
        be believed."""
        for reader in self.readers:
            reader.confirm()

    @property
    def kind(self) -> str:
        return "dense" if any(layer.hessian is not None for layer in self.layers.values()) else "sketch"

    def find(self, name: str) -> LayerStatistics | None:
        """The statistics of a layer under any prefix, None when there are none.

        Raises CalibrationError when the name fits several layers and is none of them exactly.
        """
        name = name.removesuffix(".weight")
        if name in self.layers:
            return self.layers[name]
        bare = bare_name(name)
        fits = [own for own in self.layers if bare_name(own) == bare]
        if len(fits) > 1:
            raise CalibrationError(
                f"{printable(name)} could be any of {', '.join(map(printable, sorted(fits)))} in the calibration; "
                "use one that was collected on the model alone."
            )
        return self.layers[fits[0]] if fits else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; the name appears only when it is whole. Raises CalibrationError, DestinationWriteError, or
        SourceReadError for what was loaded and is not as it was."""
        tensors: dict[str, np.ndarray] = {}
        for name, layer in self.layers.items():
            layer.check(name)
            tensors[f"{name}.count"] = np.array(layer.count, dtype=np.int64)
            for part in ("mean", "diagonal", "sketch", "hessian"):
                if (values := getattr(layer, part)) is not None:
                    tensors[f"{name}.{part}"] = np.ascontiguousarray(values, dtype=np.float32)
        tags = {np.dtype(np.int64): "I64", np.dtype(np.float32): "F32"}
        placed = layout((name, tags[values.dtype], values.shape) for name, values in tensors.items())
        metadata = {"format": FORMAT, "version": VERSION, "kind": self.kind, "seed": str(self.seed), "keys": "module"}

        def parts() -> Iterator[bytes]:
            yield build_header(placed, metadata)
            for info in placed:
                # A copy: given to the system from a mapping, a page that cannot be read would seem a fault in writing.
                yield tensors[info.name].tobytes()
            self.confirm()

        write_file(Path(path), parts(), secrets.token_hex(4), ADVICE)

    def merged(self, other: Calibration) -> Calibration:
        """Both together: layers of one only are taken as they are, others joined, weighted by count.

        Names stay as they are here; the other's are found under any prefix. Raises CalibrationError.
        """
        if self.seed != other.seed and "sketch" in (self.kind, other.kind):
            raise CalibrationError(
                f"The sketches were made with seeds {self.seed} and {other.seed}; collect one of them again."
            )
        layers = dict(self.layers)
        own = {bare_name(name): name for name in layers}
        for name, layer in other.layers.items():
            mine = name if name in layers else own.get(bare_name(name), name)
            layers[mine] = layers[mine].merged(layer, mine) if mine in layers else layer
        return Calibration(layers, self.seed, (*self.readers, *other.readers))

    def summary(self) -> list[dict[str, object]]:
        """A row per layer, for a table: what was kept, of how many inputs, and where the inputs' energy lies.

        energy_in_mean: |mean|² / trace H. energy_in_sketch: the share of trace H that V holds. top_channel: the share
        of the largest single column. Shares lie between 0 and 1.
        """
        rows: list[dict[str, object]] = []
        for name, layer in sorted(self.layers.items()):
            trace = float(layer.diagonal.sum(dtype=np.float64)) or 1.0
            row = {"layer": name, "kind": "hessian" if layer.sketch is None else "sketch", "columns": layer.columns}
            row |= {
                "count": layer.count,
                "energy_in_mean": float(np.square(layer.mean, dtype=np.float64).sum()) / trace,
            }
            if layer.sketch is not None:
                vectors = layer.low_rank(layer.sketch.shape[1])[1]
                row |= {"rank": layer.sketch.shape[1], "energy_in_sketch": float(np.square(vectors).sum()) / trace}
            rows.append(row | {"top_channel": float(layer.diagonal.max(initial=0.0)) / trace})
        self.confirm()
        return rows


def load(path: str | os.PathLike[str], identity: tuple[int, int] | None = None) -> Calibration:
    """Read a calibration file and check all of it. Arrays are mapped, not copied, where that is safe.

    identity: (bytes, modification time in ns) that the file had when it was looked at before. Raises CalibrationError for a
    file that is no calibration or a damaged one, SourceMissingError or SourceReadError when there is nothing to read, or
    something else than before.
    """
    shown = printable(os.fspath(path), limit=4096)
    checkpoint = open_file(path)
    (file,) = checkpoint.files
    if identity is not None and identity != (file.header.size, file.mtime_ns):
        raise SourceReadError(f"The calibration {shown} changed after it was first looked at; convert again from the start.")
    metadata = checkpoint.metadata
    if metadata.get("format") != FORMAT:
        raise CalibrationError(
            f"{shown}: this is not a calibration file; make one with streamquant.calibration.collect."
        )
    if metadata.get("version") != VERSION:
        raise CalibrationError(
            f"{shown}: version {printable(str(metadata.get('version')))} of the file, where {VERSION} is known."
        )
    seed = metadata.get("seed", "")
    if not (seed.isascii() and seed.isdigit() and len(seed) < 20) or metadata.get("keys") != "module":
        raise CalibrationError(f"{shown}: the metadata lack a seed or the naming of keys; the file is damaged.")
    reader = TileReader(checkpoint, "mmap").kept()
    try:
        layers = _layers(reader, int(seed), shown)
    except CalibrationError:
        reader.confirm()  # what cannot be read is zeros, which are no calibration
        raise
    calibration = Calibration(layers, int(seed), (reader,) if reader.io == "mmap" else ())
    calibration.confirm()
    if metadata.get("kind") != calibration.kind:
        raise CalibrationError(
            f"{shown}: says it is {printable(str(metadata.get('kind')))} and holds {calibration.kind} layers."
        )
    return calibration


def _layers(reader: TileReader, seed: int, shown: str) -> dict[str, LayerStatistics]:
    """The statistics in a file, each layer checked. Raises CalibrationError."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in reader.checkpoint.tensors.items():
        info = tensor.info
        layer, _, part = name.rpartition(".")
        if not layer or _DTYPES.get(part) != info.dtype or (part == "count" and info.shape != ()):
            raise CalibrationError(f"{shown}: {printable(name)} ({info.dtype}) has no place in a calibration file.")
        if len(info.shape) != _DIMENSIONS[part]:
            raise CalibrationError(f"{shown}: {printable(name)} has the wrong dimension, {len(info.shape)}.")
        # The data section need not be aligned to 4 bytes in a file that others wrote.
        raw = reader.tile(tensor, 0, info.nbytes)
        parts.setdefault(layer, {})[part] = np.frombuffer(raw, dtype=_NUMPY[info.dtype]).reshape(info.shape)
    if not parts:
        raise CalibrationError(f"{shown}: holds no layer; collect it while the model runs.")
    layers = {}
    for layer, arrays in parts.items():
        if missing := {"count", "mean", "diagonal"} - arrays.keys():
            raise CalibrationError(f"{shown}: {printable(layer)} lacks its {' and '.join(sorted(missing))}.")
        count = int(arrays.pop("count"))
        layers[layer] = LayerStatistics(count, seed=seed, **arrays)
        try:
            layers[layer].check(printable(layer))
        except CalibrationError as fault:
            raise CalibrationError(f"{shown}: {fault}") from None
    return layers


def merge(files: Iterable[str | os.PathLike[str]]) -> Calibration:
    """The calibrations of several files as one. Raises CalibrationError when they do not fit together."""
    merged: Calibration | None = None
    for path in files:
        try:
            calibration = load(path)
            merged = calibration if merged is None else merged.merged(calibration)
        except (CalibrationError, CheckpointError) as fault:
            if os.fspath(path) in str(fault):
                raise
            raise CalibrationError(f"{printable(os.fspath(path), limit=4096)}: {fault}") from None
    if merged is None:
        raise CalibrationError("No calibration files were given to merge.")
    return merged
