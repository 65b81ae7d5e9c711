"""Verifying and dequantizing take the memory of a few tiles, whatever the layer."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from small_checkpoints import Tensor, load, metadata_of, save

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


def test_a_suspect_is_looked_into_by_tiles_too(tmp_path):
    """Every other reading of a layer is tried, stored transposed among them: none takes the layer into memory."""
    rows, columns = 4096, 8192
    bits = np.random.default_rng(0).integers(0x3C00, 0x3E00, rows * columns).astype(np.uint16)
    source = save(tmp_path / "source.safetensors", {"a.weight": Tensor("BF16", (rows, columns), bits.tobytes())})
    output = tmp_path / "output.safetensors"
    streamquant.convert(source, output, Recipe(FormatChoice("fp8", rounding="rtn")))
    tensors = load(output)
    codes = np.frombuffer(tensors["a.weight"].data, np.uint8).reshape(rows, columns)
    save(output, tensors | {"a.weight": Tensor("F8_E4M3", (rows, columns), codes.T.tobytes())}, metadata_of(output))
    found = []
    held = peak(lambda: found.append(verify(source, output, options=Options(threads=1, io="pread"))))
    assert held < len(bits.tobytes())
    assert [layer.cause for layer in found[0].layers] == ["it is stored transposed"]
