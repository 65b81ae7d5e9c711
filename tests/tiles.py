"""Tiles for tests: weights of every kind that ever broke an encoder, as raw bytes and as tensors."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from streamquant.kernels import JitBackend, TorchBackend

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
JIT, TORCH = JitBackend(), TorchBackend()

QUICK = settings(max_examples=150)


def raw_bytes(tensor: torch.Tensor) -> bytearray:
    """The tensor's elements as they lie in a checkpoint. A bytearray: torch warns of memory it may not write."""
    return bytearray(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def weights(kind: str, elements: int, dtype: str, seed: int) -> torch.Tensor:
    """[elements] finite values of `dtype` (a key of TORCH_DTYPES). kind: a name in KINDS."""
    rng = np.random.default_rng(seed)
    values = KINDS[kind](rng, elements)
    if dtype == "F64":
        # Below half a float32 step, so that narrowing has something to round and yet no limit is crossed.
        return torch.from_numpy(values.astype(np.float64) * (1 + rng.uniform(-(2.0**-26), 2.0**-26, elements)))
    tensor = torch.from_numpy(values).to(TORCH_DTYPES[dtype])
    limit = torch.finfo(tensor.dtype).max
    return tensor.clamp(-limit, limit)


def _gauss(rng, elements):
    return (rng.standard_normal(elements) * 0.02).astype(np.float32)


def _wide(rng, elements):
    """Magnitudes over twelve decades in one tensor."""
    return (rng.standard_normal(elements) * 10.0 ** rng.uniform(-9, 3, elements)).astype(np.float32)


def _outlier(rng, elements):
    """One weight thirty thousand times the others, which leaves them an FP8 scale's subnormals."""
    values = _gauss(rng, elements)
    values[rng.integers(0, elements)] = 600.0
    return values


def _sparse(rng, elements):
    """Mostly zeros, of both signs; whole groups of nothing else."""
    zeros = np.where(rng.random(elements) < 0.5, np.float32(0.0), np.float32(-0.0))
    return np.where(rng.random(elements) < 0.02, _gauss(rng, elements), zeros)


def _bits(rng, elements):
    """Any finite float32 whatever: subnormals, the largest, everything between."""
    patterns = rng.integers(0, 1 << 32, elements, dtype=np.uint32)
    infinite = (patterns & 0x7F800000) == 0x7F800000
    return np.where(infinite, patterns & np.uint32(0xFF7FFFFF), patterns).view(np.float32)


def _ties(rng, elements):
    """Halves of small integers with 127 among them: with a power of two as scale every second one is a tie."""
    values = rng.integers(-254, 255, elements).astype(np.float32) / 2
    values[rng.integers(0, elements)] = 127
    return values * np.float32(2.0 ** rng.integers(-12, 4))


def _subnormal(rng, elements):
    """Only float32 subnormals (in F16 they are zeros)."""
    mantissas, signs = rng.integers(0, 1 << 23, elements), rng.integers(0, 2, elements)
    return (mantissas | (signs << 31)).astype(np.uint32).view(np.float32)


def _constant(rng, elements):
    return np.full(elements, _gauss(rng, 1)[0], dtype=np.float32)


KINDS = {
    "gauss": _gauss,
    "wide": _wide,
    "outlier": _outlier,
    "sparse": _sparse,
    "bits": _bits,
    "ties": _ties,
    "subnormal": _subnormal,
    "constant": _constant,
}

kinds = st.sampled_from(sorted(KINDS))
dtypes = st.sampled_from(sorted(TORCH_DTYPES))
seeds = st.integers(0, 1 << 20)
# Sizes about the vector widths, the spans of the compiled loops (4096) and everything odd.
group_sizes = st.one_of(st.integers(1, 70), st.sampled_from([127, 255, 1000, 4095, 4096, 4097, 8191, 8200]))


def with_neighbours(points: np.ndarray) -> np.ndarray:
    """float32 `points`, and after them the next float32 above and the next below each."""
    points = points.astype(np.float32)
    return np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])


def all_bf16() -> torch.Tensor:
    """Every BF16 bit pattern, in order: 0x0000 … 0xFFFF."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def loads(tensor: torch.Tensor):
    """The tensor as a tile of either backend: (JIT tile, torch tile)."""
    raw = raw_bytes(tensor)
    tag = next(tag for tag, dtype in TORCH_DTYPES.items() if dtype == tensor.dtype)
    return JIT.load(raw, tag), TORCH.load(raw, tag)
