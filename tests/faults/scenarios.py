"""Conversions to be attacked: a small source, the flags, what was there before; and what must hold after any attack."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conversions import files
from faults.server import Result, Server
from faults.shim import KINDS
from small_checkpoints import floats, noise, of_values, save

from streamquant.calibration import Calibration, LayerStatistics

TILES = {"tile_bytes": 4096, "sync_bytes": 16_000}
EVERY = {"source": KINDS, "destination": KINDS}  # kinds of calls that may be struck


@dataclass(frozen=True)
class Scenario:
    """Flags of `streamquant convert`. old: the names it will write are taken by other files. calibrated: so it is learned.
    begun: what faults strike is the resume of a run that was killed after three quarters of its calls."""

    flags: str
    old: bool = False
    calibrated: bool = False
    begun: bool = False


SCENARIOS = {
    "one pass": Scenario("--fp8 --scaling-mode row --rtn --io pread"),
    "two passes": Scenario("--fp8 --rtn --io mmap"),
    "nested state": Scenario("--bnb-4bit --bnb-double-quant --rtn --io mmap"),
    "shards": Scenario("--int8 --scaling-mode block --block-size 32 --rtn --shard-size 24000"),
    "two passes, shards, threads": Scenario("--int8 --scaling-mode tensor --rtn --shard-size 24000 --threads 3 --io mmap"),
    "over an old file": Scenario("--bnb-4bit --rtn --force", old=True),
    "over old shards": Scenario("--fp8 --scaling-mode block3d --block-size 32 --rtn --shard-size 24000 --force", old=True),
    "a resume": Scenario("--fp8 --rtn --shard-size 24000", begun=True),
    "learned": Scenario("--int8 --io pread", calibrated=True),
    "learned, shards": Scenario("--fp8 --io mmap --shard-size 24000", calibrated=True),
}


def make_sources(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of several tiles a layer, with a layer of zeros and what is copied; and a calibration for it."""
    tensors = {
        "blocks.0.qkv.weight": floats(96, 64, seed=1),
        "blocks.0.qkv.bias": floats(96, seed=2),
        "blocks.0.up.weight": floats(37, 33, dtype="F16", seed=3),
        "blocks.1.qkv.weight": floats(64, 96, dtype="F32", seed=4),
        "blocks.2.zeros.weight": of_values(np.zeros((64, 64))),
        "position_ids": noise("I64", 5, seed=5),
        "z.weight": floats(48, 128, seed=6),
    }
    source = save(folder / "m.safetensors", tensors)
    layers = {}
    for name, columns in {"blocks.0.qkv": 64, "blocks.1.qkv": 96, "z": 128}.items():
        seen = np.random.default_rng(columns).standard_normal((200, columns)).astype(np.float32)
        moment = seen.T @ seen / len(seen)
        layers[name] = LayerStatistics(len(seen), seen.mean(0), np.diagonal(moment).copy(), hessian=moment)
    calibration = folder / "calibration.safetensors"
    Calibration(layers).save(calibration)
    return source, calibration


class Ordeal:
    """One scenario: its untouched output, and runs of it that are attacked, each in a folder of its own."""

    def __init__(self, server: Server, source: Path, calibration: Path, folder: Path, name: str):
        self.server, self.source, self.folder, self.name = server, source, folder, name
        self.scenario = SCENARIOS[name]
        self.flags = ["--preset", "none", "--threads", "1", *shlex.split(self.scenario.flags)]
        if self.scenario.calibrated:
            self.flags += ["--calibration", str(calibration)]
        self.old: dict[str, bytes] = {}
        server.warm_up(arguments=self.arguments(self.make("warm")), **TILES)
        result = self.run(self.make("whole"))
        assert result.exit == 0, result.err
        self.kinds = result.kinds
        self.whole = files(folder / "whole")
        self.old = dict.fromkeys(self.whole, b"an old file") if self.scenario.old else {}

    @property
    def calls(self) -> int:
        """How many calls an untouched run makes."""
        return sum(sum(kinds.values()) for kinds in self.kinds.values())

    def make(self, name: str) -> Path:
        """A folder to convert into, holding the old files."""
        folder = self.folder / name
        folder.mkdir()
        for path, old in self.old.items():
            (folder / path).write_bytes(old)
        return folder

    def arguments(self, folder: Path, *more: str) -> list[str]:
        return ["convert", str(self.source), "-o", str(folder / "out.safetensors"), *self.flags, *more]

    def run(self, folder: Path, *more: str, **job: Any) -> Result:
        return self.server.run(
            arguments=self.arguments(folder, *more), source=str(self.source.parent), destination=str(folder), **TILES, **job
        )

    def begin(self, folder: Path) -> tuple[str, ...]:
        """Bring the folder to where the attack starts; returns the flags that go on from there."""
        if not self.scenario.begun:
            return ()
        assert self.run(folder, orders={"at": self.calls * 3 // 4, "how": "kill after", "calls": EVERY}).killed
        return ("--resume",)

    def check_names(self, folder: Path, trail: Any) -> None:
        """No final name holds anything but the whole new file or the old one."""
        for name, content in files(folder).items():
            assert content in (self.whole.get(name), self.old.get(name)), f"{name} is partial after {trail}"

    def check_done(self, folder: Path, trail: Any) -> None:
        """The output is that of an untouched run, and nothing else is left behind."""
        assert files(folder) == self.whole, trail
        left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
        # Of a run that ended before its journal had a first line, what there is of that may stay; nothing else ever.
        left = [name for name in left if not name.endswith(".journal") or len(_lines(folder / name)) > 1]
        assert not left, (trail, left)


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()
