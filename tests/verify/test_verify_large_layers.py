"""Layers of many tiles, at random: what one tile is rounded by may be owed to another, and nothing sound is blamed for it."""

from __future__ import annotations

import numpy as np
import pytest
from small_checkpoints import load, metadata_of, of_values, save

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


def _half_shifted(codes: np.ndarray, row: int) -> None:
    codes[codes.size // 2 :] = np.roll(codes[codes.size // 2 :], 1)


def _rows_exchanged(codes: np.ndarray, row: int) -> None:
    part = codes[500 * row : 516 * row].reshape(16, row)
    part[:] = np.roll(part, 3, axis=0)


def _rows_without_codes(codes: np.ndarray, row: int) -> None:
    codes[500 * row : 516 * row] = codes[0]


@pytest.mark.parametrize("damage", [_half_shifted, _rows_exchanged, _rows_without_codes])
@pytest.mark.parametrize(
    "choice",
    [
        FormatChoice("fp8", rounding="rtn"),
        FormatChoice("fp8", "row", rounding="rtn"),
        FormatChoice("int8", "block", 128, rounding="rtn"),
        FormatChoice("int8", convrot=True, rounding="rtn"),
        FormatChoice("nf4", rounding="rtn"),
        FormatChoice("fp4", rounding="rtn"),
        FormatChoice("nf4", double_quant=True, rounding="rtn"),
    ],
    ids=lambda choice: f"{choice.kind} {choice.scaling_mode or ''} {'double' if choice.double_quant else ''}".strip(),
)
@pytest.mark.parametrize("loudest", [1, 30])
def test_a_fault_in_one_of_many_tiles_is_found(tmp_path, choice, damage, loudest):
    """Whatever the rows' magnitudes, and whatever is tried to explain it."""
    values = np.random.default_rng(7).standard_normal((768, 4096)) * np.geomspace(1 / loudest, loudest, 768)[:, None]
    source, output = save(tmp_path / "source.safetensors", {"a.weight": of_values(values)}), tmp_path / "output.safetensors"
    streamquant.convert(source, output, Recipe(choice, preset=("none",)))
    tensors, metadata = load(output), metadata_of(output)
    metadata.pop("streamquant")
    codes = np.frombuffer(tensors["a.weight"].data, np.uint8).copy()
    damage(codes, codes.size // 768)
    tensors["a.weight"] = tensors["a.weight"]._replace(data=codes.tobytes())
    found = verify(source, save(tmp_path / "damaged.safetensors", tensors, metadata))
    assert [finding.tensor for finding in found.findings] == ["a.weight"]


@pytest.mark.long
def test_sound_layers_of_many_tiles_are_not_blamed_a_thousand_times(tmp_path):
    for seed in range(SEEDS, LONG_SEEDS):
        _check(tmp_path, seed)
