"""One hash per source, recipe and device class, written down: golden.toml. Whatever the threads, budget, tiles and I/O.

Rounded to nearest, the bytes hold on every machine. Searched scales and learned codes come from sums in floating point,
whose order depends on the vector width of the CPU, and from BLAS: their hashes hold for one kind of CPU, which the file
names; on any other only the agreement of all ways to get there is checked.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from small_checkpoints import EVERY_FORMAT, LEARNED_CHOICES, NUMPY, SEARCHED_FORMATS, Tensor, load, of_values, save

from streamquant import FormatChoice, Recipe, budget, errors, pour
from streamquant.calibration import Calibration, LayerStatistics
from streamquant.options import Silent
from streamquant.transcode import convert

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATH = Path(__file__).with_name("golden.toml")
GOLDEN = tomllib.loads(PATH.read_text(encoding="utf-8"))
SHAPES = {"a": (64, 96, "BF16"), "b": (33, 31, "F16"), "c": (32, 256, "F32"), "d": (5, 7, "F64")}
MIXED = Recipe(
    FormatChoice("nf4", block_size=32, double_quant=True, rounding="rtn"), custom_layers="^c$",
    custom=FormatChoice("fp8", "block", 32, rounding="rtn"), exclude_layers="^b$", cast="F16", comfy_quant=True,
    layer_config=(("^d$", FormatChoice("int8", "row", rounding="rtn")),),
)  # fmt: skip
# The ways to the same bytes: options, the tile aimed at, whether the run is stopped after a few tiles and resumed.
WAYS = {
    "at one go": ({"threads": 1}, 8 << 20, False),
    "small tiles": ({"threads": 3}, 640, False),
    "pread": ({"threads": 2, "io": "pread"}, 4096, False),
    "smallest tiles, tight budget": ({"threads": 1, "io": "pread", "memory_budget": 170 << 20}, 1, False),
    "resumed": ({"threads": 2}, 1000, True),
}


def values(count: int, seed: int) -> np.ndarray:
    """Numbers that no library's random generator can change: a congruential sequence, spread over many exponents."""
    bits = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(6364136223846793005) + np.uint64(seed)) >> np.uint64(33)
    uniform = bits.astype(np.float64) / 2**31 - 0.5
    return uniform * np.exp2(np.arange(count) % 13 - 8)


def fixed_source() -> dict[str, Tensor]:
    made = {
        f"{name}.weight": of_values(values(rows * columns, seed).reshape(rows, columns), dtype)
        for seed, (name, (rows, columns, dtype)) in enumerate(SHAPES.items())
    }
    assert set(NUMPY) < {dtype for _, _, dtype in SHAPES.values()}
    return made | {"zeros.weight": of_values(np.zeros((32, 32))), "a.bias": of_values(values(96, 9), "F32")}


def fixed_calibration(path: Path) -> Path:
    """Second moments of 300 inputs a layer, whole."""
    layers = {}
    for seed, (name, (_, columns, _)) in enumerate(SHAPES.items()):
        seen = values(300 * columns, 50 + seed).reshape(300, columns).astype(np.float32)
        moment = seen.T @ seen / len(seen)
        layers[name] = LayerStatistics(len(seen), seen.mean(0), np.diagonal(moment).copy(), hessian=moment)
    Calibration(layers).save(path)
    return path


def digest(folder: Path) -> str:
    """Of all tensors of all files there, in the order of the files."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        for name, (dtype, shape, data) in load(path).items():
            found.update(f"{name} {dtype} {shape} {len(data)}\n".encode() + data)
    return found.hexdigest()


def convert_so(folder: Path, recipe: Recipe, way: str, monkeypatch: pytest.MonkeyPatch, **options) -> str:
    """The hash of what becomes of the fixed source in one of the ways."""
    folder.mkdir(parents=True)
    source = save(folder / "source" / "m.safetensors", fixed_source())
    destination, (more, tile_bytes, resumed) = folder / "o.safetensors", WAYS[way]
    with monkeypatch.context() as patch:
        patch.setattr(budget, "TARGET_TILE_BYTES", tile_bytes)
        if resumed:
            stop = threading.Event()
            observer = Silent()
            observer.progress = lambda unit, nbytes: stop.set()
            with pytest.raises(errors.InterruptedRunError):
                convert(source, destination, recipe, observer=observer, stop=stop, **more, **options)
        convert(source, destination, recipe, resume=resumed, **more, **options)
    return digest(folder)


def all_ways(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, **options) -> str:
    found = {way: convert_so(tmp_path / way, recipe, way, monkeypatch, **options) for way in WAYS}
    assert len(set(found.values())) == 1, found
    return found["at one go"]


def kind_of_cpu() -> str:
    """What the bytes of searched scales and learned codes depend on: the CPU that LLVM compiles for, and BLAS's kernels."""
    from threadpoolctl import threadpool_info

    try:
        from llvmlite.binding import get_host_cpu_name
    except ImportError:
        return "no numba"
    numpys = [pool for pool in threadpool_info() if pool["user_api"] == "blas" and "numpy" in pool["filepath"]]
    blas = {f"{pool['internal_api']} {pool['version']} {pool.get('architecture')}" for pool in numpys}
    return ", ".join([get_host_cpu_name(), *sorted(blas)])


def nearest() -> dict[str, tuple[Recipe, dict]]:
    shards = {"shards": (EVERY_FORMAT["int8-row"], {"shard_size": 6000}), "mixed": (MIXED, {}), "mixed-shards": (MIXED, {"shard_size": 4000})}
    return {name: (recipe, {}) for name, recipe in EVERY_FORMAT.items()} | shards


def careful(calibration: Path) -> dict[str, Recipe]:
    learned = {
        f"learned-{name}": Recipe(choice, preset=("none",), calibration=calibration, calibration_mode="dense")
        for name, choice in LEARNED_CHOICES.items()
    }
    sketch = {"learned-nf4-low-rank": replace(learned["learned-nf4"], calibration_mode="sketch", calibration_rank=8)}
    svd = {"svd-int8": Recipe(FormatChoice("int8", convrot=False), preset=("none",), objective="svd", sweeps=1)}
    return SEARCHED_FORMATS | learned | sketch | svd


NAMES = [*SEARCHED_FORMATS, *(f"learned-{name}" for name in LEARNED_CHOICES), "learned-nf4-low-rank", "svd-int8"]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    return fixed_calibration(tmp_path_factory.mktemp("calibration") / "c.safetensors")


@pytest.mark.parametrize("name", nearest())
def test_rounded_to_nearest(tmp_path, monkeypatch, name):
    recipe, options = nearest()[name]
    assert all_ways(tmp_path, recipe, monkeypatch, **options) == GOLDEN["nearest"][name]


@pytest.mark.parametrize("name", nearest())
def test_rounded_to_nearest_without_numba(tmp_path, monkeypatch, name):
    from streamquant.kernels import TorchBackend

    monkeypatch.setattr(pour, "select", TorchBackend)
    recipe, options = nearest()[name]
    assert convert_so(tmp_path / "torch", recipe, "small tiles", monkeypatch, **options) == GOLDEN["nearest"][name]


@pytest.mark.parametrize("name", NAMES)
def test_searched_and_learned(tmp_path, monkeypatch, calibration, name):
    found = all_ways(tmp_path, careful(calibration)[name], monkeypatch)
    recorded = GOLDEN["searched-and-learned"]
    if recorded["cpu"] != kind_of_cpu():
        return  # all ways agree, and what they agree on is not written down for this kind of CPU
    assert found == recorded[name]


def test_every_hash_is_of_something_tested_here():
    assert GOLDEN["nearest"].keys() == nearest().keys()
    assert GOLDEN["searched-and-learned"].keys() - {"cpu"} == set(NAMES)


def write() -> None:
    """Print golden.toml as it should be, here and now."""
    from tempfile import TemporaryDirectory

    opening = PATH.read_text(encoding="utf-8").split("[nearest]")[0]
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root = Path(folder)
        print(f"{opening}[nearest]")
        for name, (recipe, options) in nearest().items():
            print(f'{name} = "{all_ways(root / name, recipe, patch, **options)}"')
        print("\n# These hold for one kind of CPU and BLAS.\n[searched-and-learned]")
        lines = [
            f'{name} = "{all_ways(root / f"careful-{name}", recipe, patch)}"'
            for name, recipe in careful(fixed_calibration(root / "c.safetensors")).items()
        ]
        print(f'cpu = "{kind_of_cpu()}"', *lines, sep="\n")


if __name__ == "__main__":
    write()
