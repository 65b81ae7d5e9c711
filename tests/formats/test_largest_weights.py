"""Weights at the end of float32: what is finite in the source is finite when it is decoded, or is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_checkpoints import EVERY_FORMAT, SEARCHED_FORMATS, load, of_values, save
from tiles import TORCH_DTYPES

from streamquant import errors
from streamquant.formats import FORMATS
from streamquant.transcode import convert
from streamquant.verify import verify

QUANTIZING = {name: recipe for name, recipe in (EVERY_FORMAT | SEARCHED_FORMATS).items() if recipe.base.format and not recipe.cast}
STORED = TORCH_DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8}


@pytest.mark.parametrize("name", QUANTIZING)
def test_the_largest_weights_stay_finite(tmp_path, name):
    largest = float(np.finfo(np.float32).max)
    random = np.random.default_rng(3)
    rows = {
        "all": np.full((64, 128), largest), "both": random.choice([-largest, largest], (64, 128)),
        "near": random.uniform(0.7, 1.0, (64, 128)) * largest, "wide": random.uniform(-1, 1, (64, 128)) * largest,
        "few": np.where(random.random((64, 128)) < 0.01, largest, 1.0),
    }  # fmt: skip
    source = save(tmp_path / "m.safetensors", {f"{key}.weight": of_values(values, "F32") for key, values in rows.items()})
    try:
        report = convert(source, tmp_path / "o.safetensors", QUANTIZING[name])
    except errors.NonFiniteError as error:  # rotated they would be larger, and in 8 bits an absmax may be
        assert ("double" in name or "rotated" in name) and "beyond what" in str(error)
        assert not (tmp_path / "o.safetensors").exists()
        return
    found = load(tmp_path / "o.safetensors")
    for layer in report.layers:
        own = {
            key.removeprefix(layer.key.removesuffix("weight")): torch.frombuffer(bytearray(t.data), dtype=STORED[t.dtype]).view(t.shape)
            for key, t in found.items()
            if key.startswith(layer.key.removesuffix("weight"))
        }
        decoded = FORMATS[layer.format](**layer.parameters).decode(own, torch.float32)
        assert torch.isfinite(decoded).all(), (layer.key, int((~torch.isfinite(decoded)).sum()))
    assert verify(source, tmp_path / "o.safetensors").sound
