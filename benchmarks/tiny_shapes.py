"""Pictures to train on, made by formula: one coloured shape on a plain ground, and the prompt that describes it.

A prompt is one value of each of five attributes, one context token each: a fixed random vector per value. Pictures are
48 x 48; a fixed orthonormal transform of their 8 x 8 patches stands in for the autoencoder and makes the latent
[128, 6, 6] that a Flux.2 works on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

KINDS = ("circle", "square", "triangle", "ring", "cross", "diamond")
COLOURS = {
    "red": (0.90, 0.15, 0.15), "orange": (0.98, 0.55, 0.10), "yellow": (0.98, 0.90, 0.20), "green": (0.15, 0.70, 0.25),
    "blue": (0.15, 0.30, 0.90), "violet": (0.60, 0.25, 0.80), "pink": (0.98, 0.60, 0.75), "brown": (0.50, 0.30, 0.12),
}  # fmt: skip
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
SIZES = {"small": 6.0, "medium": 9.0, "large": 12.0}  # half the extent, in pixels
GROUNDS = {
    "white": (0.95, 0.95, 0.95), "black": (0.05, 0.05, 0.05), "grey": (0.50, 0.50, 0.50),
    "sand": (0.85, 0.78, 0.60), "sky": (0.60, 0.82, 0.95), "navy": (0.08, 0.12, 0.35),
}  # fmt: skip
ATTRIBUTES: tuple[Sequence[str], ...] = (KINDS, tuple(COLOURS), PLACES, tuple(SIZES), tuple(GROUNDS))
PROMPTS = math.prod(map(len, ATTRIBUTES))

SIDE, PATCH = 48, 8
GRID = SIDE // PATCH
LUMA, CHROMA = 64, 32  # coefficients kept of brightness and of each of the two colour axes: 128 together
CONTEXT_WIDTH = 64
CONTEXT_SEED = 20261122
JITTER = 0.5  # pixels a shape may lie off its place, so that the noise has something to decide


def prompts(count: int, seed: int, skip: int = 0) -> Tensor:
    """Different prompts, int64 [count, 5]: numbers `skip` and following of all prompts in an order drawn from `seed`."""
    if skip + count > PROMPTS:
        raise ValueError(f"there are only {PROMPTS} prompts, {skip + count} were asked for")
    order = torch.randperm(PROMPTS, generator=torch.Generator().manual_seed(seed))[skip : skip + count]
    chosen = []
    for values in reversed(ATTRIBUTES):
        chosen.append(order % len(values))
        order = order // len(values)
    return torch.stack(chosen[::-1], dim=1)


def words(prompt: Sequence[int]) -> str:
    """A prompt in English."""
    kind, colour, place, size, ground = (values[int(i)] for values, i in zip(ATTRIBUTES, prompt, strict=True))
    return f"{size} {colour} {kind}, {place}, on {ground}"


@cache
def _code_book() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(CONTEXT_SEED)
    return tuple(torch.randn(len(values), CONTEXT_WIDTH, generator=generator) for values in ATTRIBUTES)


def context(prompt: Tensor) -> Tensor:
    """Context tokens float32 [n, 5, 64] of prompts [n, 5]."""
    return torch.stack([book[prompt[:, i]] for i, book in enumerate(_code_book())], dim=1)


def pictures(prompt: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures float32 [n, 3, 48, 48] in -1 … 1 of prompts [n, 5]; the generator jitters where the shape lies."""
    kind, colour, place, size, ground = prompt.T
    jitter = (torch.rand(len(prompt), 2, generator=generator) * 2 - 1) * JITTER
    centre = torch.stack((place // 3, place % 3), dim=1) * (SIDE / 3) + SIDE / 6
    # A large shape would leave the picture at its border: it is drawn in until it touches.
    half = torch.tensor(list(SIZES.values()))[size]
    centre = torch.clamp(centre + jitter, half[:, None], SIDE - half[:, None])
    pixels = torch.arange(SIDE) + 0.5
    y = (pixels[None, :, None] - centre[:, 0, None, None]) / half[:, None, None]
    x = (pixels[None, None, :] - centre[:, 1, None, None]) / half[:, None, None]
    y, x = y.expand(-1, -1, SIDE), x.expand(-1, SIDE, -1)
    distances = torch.stack([distance(x, y) for distance in _DISTANCES])[kind, torch.arange(len(prompt))]
    cover = (0.5 - distances * half[:, None, None]).clamp(0, 1)[:, None]
    front, back = (
        torch.tensor(list(table.values()))[index][:, :, None, None] for table, index in ((COLOURS, colour), (GROUNDS, ground))
    )
    return (cover * front + (1 - cover) * back) * 2 - 1


def _box(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


# How far a point lies outside each kind of shape of extent 1, negative inside; x to the right, y down.
_DISTANCES = (
    lambda x, y: torch.hypot(x, y) - 1,
    lambda x, y: _box(x, y, 0.9, 0.9),
    lambda x, y: torch.maximum(y - 0.9, (2 * x.abs() - y - 1) / math.sqrt(5)),
    lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.25,
    lambda x, y: torch.minimum(_box(x, y, 1.0, 0.33), _box(x, y, 0.33, 1.0)),
    lambda x, y: (x.abs() + y.abs() - 1) / math.sqrt(2),
)


@cache
def _transform() -> tuple[Tensor, Tensor]:
    """Rows [128, 192] of the orthonormal transform of a patch (colour axes times cosines), and the weight of each [128].

    A picture's coefficients fall about as one over frequency; the weights undo that, so that channels are of like size.
    """
    n = torch.arange(PATCH, dtype=torch.float64)
    cosines = torch.cos(math.pi / PATCH * (n + 0.5) * n[:, None]) * math.sqrt(2 / PATCH)
    cosines[0] /= math.sqrt(2)
    basis = torch.einsum("uy,vx->uvyx", cosines, cosines).reshape(PATCH * PATCH, PATCH * PATCH)
    frequency = (n[:, None] + n).reshape(-1)
    low_first = torch.argsort(frequency, stable=True)
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
    axes = axes / axes.norm(dim=1, keepdim=True)
    rows, weights = [], []
    for axis, kept in zip(axes, (LUMA, CHROMA, CHROMA), strict=True):
        chosen = low_first[:kept]
        rows.append(torch.einsum("c,kp->kcp", axis, basis[chosen]).reshape(kept, -1))
        weights.append(0.35 + frequency[chosen])
    return torch.cat(rows).float(), torch.cat(weights).float()


def encode(images: Tensor) -> Tensor:
    """Latents [n, 128, 6, 6] of pictures [n, 3, 48, 48]."""
    rows, weights = _transform()
    patches = torch.nn.functional.unfold(images, PATCH, stride=PATCH)
    return (weights[:, None] * (rows @ patches)).unflatten(-1, (GRID, GRID))


def decode(latents: Tensor) -> Tensor:
    """Pictures [n, 3, 48, 48], clamped to -1 … 1, of latents [n, 128, 6, 6]."""
    rows, weights = _transform()
    patches = rows.T @ (latents.flatten(2) / weights[:, None])
    return torch.nn.functional.fold(patches, SIDE, PATCH, stride=PATCH).clamp(-1, 1)
