"""Layers of many tiles, at random: what one tile is rounded by may be owed to another, and nothing sound is blamed for it."""

from __future__ import annotations

import numpy as np
import pytest
from small_checkpoints import of_values, save

import streamquant
from streamquant import FormatChoice, Recipe
from streamquant.verify import verify

SEEDS = 24
LONG_SEEDS = 1000


def _shape(random: np.random.Generator) -> tuple[int, int]:
    columns = int(random.choice([random.integers(1, 9000), 2 ** random.integers(4, 14), 128 * random.integers(1, 80), 40_000]))
    rows = min(max(1, int(random.integers(400_000, 3_000_000)) // columns), 6000)
    return max(128, rows // 128 * 128) if random.random() < 0.5 else rows, columns


def _weights(random: np.random.Generator) -> np.ndarray:
    rows, columns = _shape(random)
    values = random.standard_t(random.choice([2.2, 3, 8, 50]), (rows, columns)) * 10.0 ** random.integers(-4, 1)
    loud = 10 ** random.uniform(0, 3)
    match random.integers(0, 7):
        case 1:
            values[random.integers(0, rows)] *= loud
        case 2:
            values[:, random.integers(0, columns)] *= loud
        case 3:
            values[random.integers(0, rows), random.integers(0, columns)] *= loud
        case 4:
            values *= np.geomspace(0.01, 10, rows)[:, None]
        case 5:
            values[: rows // 2] = 0
        case 6:
            values[random.random((rows, columns)) < 0.9] = 0
    return values


def _choice(random: np.random.Generator) -> FormatChoice:
    kind = str(random.choice(["fp8", "int8", "nf4", "fp4", "fp8_e5m2"]))
    rounding = str(random.choice(["rtn", "simple", "learned"]))
    if kind in ("nf4", "fp4"):
        return FormatChoice(kind, block_size=int(random.choice([32, 64, 128, 256, 1024, 4096])), rounding=rounding)
    mode = "tensor" if kind == "fp8_e5m2" else str(random.choice(["tensor", "row", "block"]))
    size = int(random.choice([16, 32, 48, 64, 128, 256, 1000])) if mode == "block" else None
    convrot = True if (kind, mode) == ("int8", "row") and random.random() < 0.6 else None
    return FormatChoice(kind, mode, size, convrot=convrot, rounding=rounding)


def _check(folder, seed: int) -> None:
    random = np.random.default_rng(seed)
    dtype = str(random.choice(["BF16", "BF16", "F16", "F32"]))
    layers = {f"{name}.weight": of_values(_weights(random), dtype) for name in "ab"}
    source, output = save(folder / "source.safetensors", layers), folder / "output.safetensors"
    recipe = Recipe(_choice(random), preset=("none",), allow_nonfinite=True)
    streamquant.convert(source, output, recipe, force=True)
    for share in (1.0, 0.3):
        found = verify(source, output, sample=share)
        assert found.sound, (seed, share, recipe.base, [tensor.shape for tensor in layers.values()], found.findings)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_sound_layers_of_many_tiles_are_not_blamed(tmp_path, seed):
    _check(tmp_path, seed)


@pytest.mark.long
def test_sound_layers_of_many_tiles_are_not_blamed_a_thousand_times(tmp_path):
    for seed in range(SEEDS, LONG_SEEDS):
        _check(tmp_path, seed)
