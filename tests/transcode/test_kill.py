"""`kill -9` and power cuts at any system call: a resumed run gives the same bytes, a final name is never partial."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from crash_server import CrashServer
from small_checkpoints import floats, of_values, sample, save

SMALL = {"threads": 2, "io": "pread"}
# name: (recipe, options). One and two passes, one file and shards, over an old file and not.
SCENARIOS = {
    "one pass": ("fp8-row", {}),
    "two passes": ("fp8-tensor", {}),
    "nested state": ("nf4-double", {"io": "mmap"}),
    "blocks, shards": ("int8-block", {"shard_size": 60_000}),
    "two passes, shards": ("int8-tensor", {"shard_size": 60_000, "threads": 3}),
    "over an old file": ("nf4", {"force": True}),
    "over old shards": ("fp8-block3d", {"force": True, "shard_size": 60_000}),
}
POINTS = 18


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The sample, and a layer of zeros as large as several tiles: its scales are replaced when it ends."""
    tensors = sample() | {"blocks.3.zeros.weight": of_values(np.zeros((96, 128))), "z.weight": floats(64, 256, seed=30)}
    return save(tmp_path_factory.mktemp("source") / "m.safetensors", tensors)


@pytest.fixture(scope="module")
def server(source, tmp_path_factory):
    server = CrashServer()
    for number, (recipe, options) in enumerate(SCENARIOS.values()):
        job = job_of(source, tmp_path_factory.mktemp("warm") / str(number), recipe, options)
        assert server.run(**job, warm_up=True)["error"] is None
    yield server
    server.close()


def job_of(source: Path, destination: Path, recipe: str, options: dict, crash: dict | None = None) -> dict:
    return {
        "source": str(source), "destination": str(destination), "recipe": recipe, "options": SMALL | options,
        "tile_bytes": 4096, "sync_bytes": 20_000, "crash": crash,
    }  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


class Ordeal:
    """One scenario's conversions, each in a folder of its own, each killed and resumed until it is done."""

    def __init__(self, server: CrashServer, source: Path, folder: Path, scenario: str):
        self.server, self.source, self.folder = server, source, folder
        self.recipe, self.options = SCENARIOS[scenario]
        (folder / "whole").mkdir()
        result = self.run("whole")
        assert result["error"] is None
        self.calls = result["calls"]
        self.whole = contents(folder / "whole")
        self.old = dict.fromkeys(self.whole, b"an old file") if "force" in self.options else {}

    def run(self, name: str, crash: dict | None = None, **options) -> dict:
        destination = self.folder / name / "out.safetensors"
        return self.server.run(**job_of(self.source, destination, self.recipe, self.options | options, crash))

    def survive(self, name: str, crashes: list[dict]) -> None:
        """Crash the run and then its resumptions; then let it end."""
        folder = self.folder / name
        folder.mkdir()
        for path, old in self.old.items():
            (folder / path).write_bytes(old)
        for number, crash in enumerate([*crashes, None]):
            result = self.run(name, crash, resume=number > 0)
            assert result["killed"] or result["error"] is None, (crashes, result)
            for path, content in contents(folder).items():
                assert content in (self.whole[path], self.old.get(path)), (
                    f"{path} is partial after {crashes[: number + 1]}"
                )
        assert contents(folder) == self.whole, crashes
        left = [path for path in folder.iterdir() if path.name.startswith(".")]
        # Of a run that was killed before its journal had a first line, what there is of that stays; nothing else ever.
        assert all(path.suffix == ".journal" and len(path.read_bytes().splitlines()) <= 1 for path in left), (
            crashes,
            left,
        )


@pytest.fixture(params=SCENARIOS)
def ordeal(request, server, source, tmp_path):
    return Ordeal(server, source, tmp_path, request.param)


def points(ordeal: Ordeal, count: int, seed: int) -> list[int]:
    """Calls to strike at: the first and last ones all, of those between a sample."""
    between = random.Random(seed).sample(range(6, ordeal.calls - 8), max(count - 14, 0))
    return [*range(1, 6), *sorted(between), *range(ordeal.calls - 8, ordeal.calls + 1)]


def test_killed_at_any_call_and_resumed(ordeal):
    dice = random.Random(1)
    for at in points(ordeal, POINTS, 2):
        how = dice.choice(["before", "after", "half"])
        ordeal.survive(f"kill-{at}", [{"at": at, "how": how, "power": None}])


def test_power_cut_at_any_call_and_resumed(ordeal):
    dice = random.Random(3)
    for at in points(ordeal, POINTS, 4):
        crash = {"at": at, "how": dice.choice(["before", "after", "half"]), "power": dice.randrange(1 << 30)}
        ordeal.survive(f"power-{at}", [crash])


def test_the_resume_is_killed_too_and_resumed_again(ordeal):
    dice = random.Random(5)
    for at in dice.sample(range(6, ordeal.calls - 8), 5):
        crashes = [{"at": at, "how": "after", "power": None}]
        for _ in range(3):
            power = dice.randrange(1 << 30) if dice.random() < 0.5 else None
            crashes.append({"at": dice.randint(1, 30), "how": dice.choice(["before", "after", "half"]), "power": power})
        ordeal.survive(f"again-{at}", crashes)
