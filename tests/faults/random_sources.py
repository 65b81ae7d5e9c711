"""Checkpoints and recipes made by chance: every dtype, every odd shape, every kind of weight, every rule."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from small_checkpoints import Tensor, noise, of_values
from tiles import KINDS

from streamquant import FormatChoice, Recipe
from streamquant.checkpoint.header import DTYPE_BITS

FLOATS = ("BF16", "F16", "F32", "F64")
FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
OTHERS = tuple(dtype for dtype in DTYPE_BITS if dtype not in FLOATS)
DIMENSIONS = (1, 2, 3, 5, 7, 13, 16, 31, 32, 48, 64, 65, 96, 127, 128, 130, 256, 300, 512, 0)
LARGE = ((1024, 96), (96, 1024), (1, 5000), (5000, 1), (512, 256), (257, 263))
NAMES = (
    *(f"blocks.{n}.{part}" for n in range(3) for part in ("attn.qkv.weight", "mlp.up.weight", "mlp.up.bias", "norm1.weight")),
    "double_blocks.0.img_attn.qkv.weight", "model.diffusion_model.blocks.0.x.weight", "img_in.weight", "txt_in.weight",
    "final_layer.linear.weight", "shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "pos_ids", "a b.weight",
    "größe.weight", "[red]x[/red].weight", "weight", ".weight", "x.weight.weight", "blocks.0.attn.qkv.weight_scale",
    "blocks.1.attn.qkv.weight.absmax", "blocks.2.mlp.up.input_scale", "scalar", "conv.weight",
)  # fmt: skip
PRESETS = (("none",), ("none",), ("auto",), ("auto",), ("flux2",), ("t5xxl", "wan"))
SIZES = (None, 1, 16, 32, 64, 128, 100)
ODDS = 60  # one in so many times what cannot be is asked for


class Kind(NamedTuple):
    """A tensor as it is drawn: short to print, and quick to shrink."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    seed: int

    @property
    def is_matrix(self) -> bool:
        return self.dtype in FLOATS and len(self.shape) == 2 and math.prod(self.shape) > 0

    def made(self) -> Tensor:
        if self.kind == "noise":
            return noise(self.dtype, *self.shape, seed=self.seed)
        return _values(self.kind, self.shape, self.dtype, self.seed)


class Case(NamedTuple):
    """One conversion. tile_bytes: the tile aimed at. options: of `convert`."""

    tensors: dict[str, Kind]
    recipe: dict
    options: dict
    tile_bytes: int


def _values(kind: str, shape: tuple[int, ...], dtype: str, seed: int) -> Tensor:
    """A floating tensor. Kinds beyond those of `tiles`: zeros, the largest and smallest that the dtype has, no numbers."""
    count = math.prod(shape)
    random = np.random.default_rng(seed)
    largest = {"BF16": 3.38e38, "F16": 65504.0, "F32": 3.4028234e38, "F64": 1.7e308}[dtype]
    if kind == "zeros":
        values = np.zeros(count)
    elif kind == "huge":
        values = random.uniform(-1, 1, count) * largest
    elif kind == "largest":
        values = np.where(random.random(count) < 0.5, largest, -largest)
    elif kind == "tiny":
        values = random.standard_normal(count) * {"F16": 1e-7, "F64": 1e-300}.get(dtype, 1e-44)
    else:
        values = KINDS["gauss" if kind in ("nan", "inf") else kind](random, count).astype(np.float64) if count else np.empty(0)
        if kind in ("nan", "inf") and count:
            values[random.integers(count)] = {"nan": math.nan, "inf": -math.inf}[kind]
    if dtype != "F64" and kind != "inf":
        values = np.clip(values, -largest, largest)
    return of_values(values.reshape(shape), dtype)


def rarely(draw: st.DrawFn) -> bool:
    """Not at the ends of a range, which come up far more often than by chance."""
    return draw(st.integers(0, 1 << 20)) % ODDS == ODDS // 2


@st.composite
def tensors(draw: st.DrawFn) -> Kind:
    dimension = st.sampled_from(DIMENSIONS)
    shape = draw(
        st.one_of(
            *[st.tuples(dimension, dimension)] * 6, *[st.sampled_from(LARGE)] * 2, st.just(()), st.tuples(dimension),
            st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 3)),
        )
    )  # fmt: skip
    seed = draw(st.integers(0, 1 << 16))
    if draw(st.integers(0, 9)) < 8:
        usual = st.sampled_from(["gauss", "gauss", "gauss", *sorted(KINDS)])
        odd = st.sampled_from(["zeros", "huge", "largest", "tiny"])
        kinds = st.one_of(*[usual] * 9, *[odd] * 2, st.sampled_from(["nan", "inf", "zeros"]))
        return Kind(draw(kinds), draw(st.sampled_from(FLOATS)), shape, seed)
    dtype = draw(st.sampled_from(OTHERS))
    if DTYPE_BITS[dtype] % 8:
        shape = (*shape, 4)  # whole bytes
    return Kind("noise", dtype, shape, seed)


@st.composite
def choices(draw: st.DrawFn) -> dict:
    """Arguments of `FormatChoice`, which now and then do not go together."""
    kind = draw(st.sampled_from(["fp8", "fp8", "int8", "int8", "nf4", "nf4", "fp4", "fp8_e5m2", "keep"]))
    found = {"kind": kind, "rounding": draw(st.sampled_from(["rtn", "simple", "learned"])), "heur": draw(st.integers(0, 20)) == 7}
    if kind in ("fp8", "int8"):
        modes = [None, "tensor", "row", "block", *(["block3d"] if kind == "fp8" else [])]
        found |= {"scaling_mode": draw(st.sampled_from(modes)), "block_size": draw(st.sampled_from(SIZES))}
    if kind == "int8" and found["scaling_mode"] in (None, "row"):
        found["convrot"] = draw(st.sampled_from([None, True, False]))
        found["convrot_group_size"] = draw(st.sampled_from([None, 4, 16, 64]))
    if kind in ("nf4", "fp4"):
        found |= {"block_size": draw(st.sampled_from([None, 32, 64, 128, 4096])), "double_quant": draw(st.booleans())}
    if rarely(draw):
        found |= draw(st.sampled_from([{"block_size": 0}, {"scaling_mode": "rows"}, {"convrot_group_size": 20}, {"kind": "int3"}]))
    return found


@st.composite
def recipes(draw: st.DrawFn, tensors: dict[str, Kind]) -> dict:
    """Arguments of `Recipe` for a checkpoint of these tensors; choices as dictionaries."""
    candidates = [name for name, kind in tensors.items() if name.endswith(".weight") and kind.is_matrix]
    weights = candidates or list(tensors)
    pieces = st.sampled_from(weights).map(lambda name: re.escape(name[len(name) // 2 :]))
    patterns = st.one_of(pieces, pieces, st.just("."), st.lists(pieces, min_size=2, max_size=2).map("|".join))
    odd = st.sampled_from(["is nowhere", "(", "weight$(?=x)"])

    def pattern() -> str:
        return draw(odd if rarely(draw) else patterns)

    found = {
        "base": draw(choices()),
        "preset": ("auto", "none") if rarely(draw) else draw(st.sampled_from(PRESETS)),
        "comfy_quant": draw(st.booleans()),
        "cast": draw(st.sampled_from([None, None, "BF16", "F16"])),
        "allow_nonfinite": draw(st.sampled_from([False, False, True])),
        "objective": draw(st.sampled_from(["output"] * 7 + ["svd"])),
        "seed": draw(st.integers(0, 3)),
    }
    if not draw(st.integers(0, 4)):
        found["exclude_layers"] = pattern()
    if draw(st.booleans()):
        found |= {"custom_layers": pattern(), "custom": draw(choices())}
    if not draw(st.integers(0, 3)):
        found["layer_config"] = tuple((pattern(), draw(choices())) for _ in range(draw(st.integers(1, 2))))
    return found


def made(arguments: dict) -> Recipe:
    """The recipe; raises a StreamquantError for what does not go together."""
    fields = dict(arguments)
    fields["base"] = FormatChoice(**fields["base"])
    config = fields.get("layer_config", ())
    fields["layer_config"] = tuple((pattern, FormatChoice(**choice)) for pattern, choice in config)
    if "custom" in fields:
        fields["custom"] = FormatChoice(**fields["custom"])
    return Recipe(**fields)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=7, unique=True))
    options = {
        "threads": draw(st.integers(1, 3)),
        "io": draw(st.sampled_from(["mmap", "pread"])),
        "memory_budget": draw(st.sampled_from([1 << 30, 1 << 28, 140 << 20])),
        "shard_size": draw(st.sampled_from([None, None, 100, 5_000, 60_000])),
    }
    if rarely(draw):
        options["memory_budget"] = 20 << 20
    found = {name: draw(tensors()) for name in names}
    return Case(found, draw(recipes(found)), options, draw(st.sampled_from([256, 4096, 8 << 20])))


def numbers(tensor: Tensor) -> np.ndarray:
    """The values of a floating tensor, or of FP8 codes that have no scale, in float64, flat."""
    if tensor.dtype in FLOAT8:
        return np.frombuffer(tensor.data, FLOAT8[tensor.dtype]).astype(np.float64)
    if tensor.dtype == "BF16":
        return (np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(tensor.data, {"F16": np.float16, "F32": np.float32, "F64": np.float64}[tensor.dtype]).astype(np.float64)


def empty(folder: Path) -> bool:
    return not any(folder.iterdir())
