"""Verifying and dequantizing take the memory of a few tiles, whatever the layer."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from small_checkpoints import Tensor, save

import streamquant
from streamquant import FormatChoice, Recipe
from streamquant.dequantize import dequantize
from streamquant.options import Options
from streamquant.verify import verify

ONE_THREAD = Options(threads=1, io="mmap")
LIMIT = 16 << 20  # bytes; the layer below has 32 MiB, and twice that in float32


def peak(work: Callable[[], object]) -> int:
    work()  # tables and imports are made once
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_memory_does_not_grow_with_the_layer(tmp_path, kind):
    rows, columns = 2048, 8192
    bits = np.random.default_rng(0).integers(0x3C00, 0x3E00, rows * columns).astype(np.uint16)
    source = save(tmp_path / "source.safetensors", {"a.weight": Tensor("BF16", (rows, columns), bits.tobytes())})
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, Recipe(FormatChoice(kind, rounding="rtn")))
    assert peak(lambda: verify(source, output, options=ONE_THREAD)) < LIMIT
    plain = tmp_path / "plain.safetensors"
    assert peak(lambda: dequantize(output, plain, force=True, options=ONE_THREAD)) < LIMIT
