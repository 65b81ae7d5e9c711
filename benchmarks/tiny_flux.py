"""A small Flux.2: the architecture as ComfyUI has it, its key names, its arithmetic, in plain torch.

What a Flux.2 is, from ComfyUI's comfy/ldm/flux: two streams of tokens (image, text) that share attention in the double
blocks and are one sequence in the single blocks; one modulation for all blocks of a kind, made from the time embedding
alone; SwiGLU; rotary positions over four axes (0: which image, 1: row, 2: column, 3: place in the text); no biases.
ComfyUI fixes the head width (128), the MLP ratio (3), theta (2000) and the 128 output channels, and reads the rest
from the weights' shapes, so that the files made here load there as Flux2. Without `guidance_in`: as in the models
distilled for few steps, which ComfyUI tells by its absence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

HEAD_WIDTH = 128
AXIS_WIDTHS = (32, 32, 32, 32)
MLP_RATIO = 3
THETA = 2000
CHANNELS = 128
TIME_CHANNELS = 256
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class FluxSize:
    """What a Flux.2 may choose. hidden: a multiple of 128, that many heads of 128; context: width of a text token."""

    hidden: int = 128
    context: int = 64
    double_blocks: int = 2
    single_blocks: int = 4

    def __post_init__(self) -> None:
        if self.hidden < HEAD_WIDTH or self.hidden % HEAD_WIDTH:
            raise ValueError(f"a hidden size of {self.hidden} is not a multiple of the head width, {HEAD_WIDTH}")


def linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; epsilon is that of the inputs' dtype, as torch's default."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.scale.shape, self.scale.to(x.dtype))


class QueryKeyNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(HEAD_WIDTH), RMSNorm(HEAD_WIDTH)


class Embedder(nn.Module):
    def __init__(self, in_features: int, hidden: int):
        super().__init__()
        self.in_layer, self.out_layer = linear(in_features, hidden), linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(functional.silu(self.in_layer(x)))


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return functional.silu(gate) * value


class Modulation(nn.Module):
    """(shift, scale, gate) [batch, 1, hidden] each, `count` times over, from the time embedding [batch, hidden]."""

    def __init__(self, hidden: int, count: int):
        super().__init__()
        self.lin, self.count = linear(hidden, 3 * count * hidden), count

    def forward(self, time: Tensor) -> list[tuple[Tensor, ...]]:
        parts = self.lin(functional.silu(time))[:, None].chunk(3 * self.count, dim=-1)
        return [parts[3 * i : 3 * i + 3] for i in range(self.count)]


class SelfAttention(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.qkv, self.norm, self.proj = linear(hidden, 3 * hidden), QueryKeyNorm(), linear(hidden, hidden)


class DoubleBlock(nn.Module):
    """Text and image keep their own weights and meet in attention."""

    def __init__(self, hidden: int):
        super().__init__()
        self.img_attn, self.txt_attn = SelfAttention(hidden), SelfAttention(hidden)
        self.img_mlp, self.txt_mlp = (
            nn.Sequential(linear(hidden, 2 * MLP_RATIO * hidden), SwiGLU(), linear(MLP_RATIO * hidden, hidden)) for _ in "it"
        )

    def forward(self, img: Tensor, txt: Tensor, modulation: tuple, rotation: Tensor) -> tuple[Tensor, Tensor]:
        (img_first, img_second), (txt_first, txt_second) = modulation
        parts = [
            _heads(attention.qkv(_modulated(x, first)), attention.norm)
            for x, attention, first in ((txt, self.txt_attn, txt_first), (img, self.img_attn, img_first))
        ]
        mixed = _attend(*(torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)), rotation)
        txt_mixed, img_mixed = mixed.split((txt.shape[1], img.shape[1]), dim=1)
        img = img + img_first[2] * self.img_attn.proj(img_mixed)
        img = img + img_second[2] * self.img_mlp(_modulated(img, img_second))
        txt = txt + txt_first[2] * self.txt_attn.proj(txt_mixed)
        txt = txt + txt_second[2] * self.txt_mlp(_modulated(txt, txt_second))
        return img, txt


class SingleBlock(nn.Module):
    """Attention and MLP side by side: linear1 feeds both, linear2 takes both."""

    def __init__(self, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.linear1 = linear(hidden, 3 * hidden + 2 * MLP_RATIO * hidden)
        self.linear2 = linear(hidden + MLP_RATIO * hidden, hidden)
        self.norm, self.act = QueryKeyNorm(), SwiGLU()

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...], rotation: Tensor) -> Tensor:
        qkv, inner = self.linear1(_modulated(x, modulation)).split((3 * self.hidden, 2 * MLP_RATIO * self.hidden), dim=-1)
        mixed = _attend(*_heads(qkv, self.norm), rotation)
        return x + modulation[2] * self.linear2(torch.cat((mixed, self.act(inner)), dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.linear = linear(hidden, CHANNELS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear(_modulated(x, self.adaLN_modulation(time)[:, None].chunk(2, dim=-1)))


class TinyFlux2(nn.Module):
    """Velocity of a flow-matching path: x_t = (1 - t) · image + t · noise, velocity = noise - image."""

    def __init__(self, size: FluxSize | None = None):
        super().__init__()
        self.size = size = size or FluxSize()
        hidden = size.hidden
        self.img_in, self.txt_in = linear(CHANNELS, hidden), linear(size.context, hidden)
        self.time_in = Embedder(TIME_CHANNELS, hidden)
        self.double_stream_modulation_img = Modulation(hidden, 2)
        self.double_stream_modulation_txt = Modulation(hidden, 2)
        self.single_stream_modulation = Modulation(hidden, 1)
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden) for _ in range(size.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(hidden) for _ in range(size.single_blocks))
        self.final_layer = FinalLayer(hidden)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """x [batch, 128, height, width], timestep [batch] in 0 … 1, context [batch, tokens, context]: as x, the velocity."""
        batch, _, height, width = x.shape
        img, txt = self.img_in(x.flatten(2).transpose(1, 2)), self.txt_in(context)
        time = self.time_in(time_embedding(timestep).to(x.dtype))
        rotation = rotations(txt.shape[1], height, width, x.device)
        double = self.double_stream_modulation_img(time), self.double_stream_modulation_txt(time)
        for block in self.double_blocks:
            img, txt = block(img, txt, double, rotation)
        both, (single,) = torch.cat((txt, img), dim=1), self.single_stream_modulation(time)
        for block in self.single_blocks:
            both = block(both, single, rotation)
        velocity = self.final_layer(both[:, txt.shape[1] :], time)
        return velocity.transpose(1, 2).reshape(batch, CHANNELS, height, width)

    @classmethod
    def of(cls, weights: dict[str, Tensor]) -> TinyFlux2:
        """The model whose state these weights are, in their dtype's float32. Raises ValueError when they are none's."""
        missing = {"img_in.weight", "txt_in.weight"} - weights.keys()
        if missing:
            raise ValueError(f"no weights of a Flux.2: {' and '.join(sorted(missing))} missing")

        def blocks(kind: str) -> int:
            return len({name.split(".")[1] for name in weights if name.startswith(f"{kind}_blocks.")})

        hidden, context = weights["txt_in.weight"].shape
        model = cls(FluxSize(hidden, context, blocks("double"), blocks("single")))
        model.load_state_dict({name: weight.float() for name, weight in weights.items()})
        return model.eval()

    @classmethod
    def load(cls, path: Path) -> TinyFlux2:
        return cls.of(load_file(path))


def time_embedding(timestep: Tensor) -> Tensor:
    """[batch, 256] float32: cosines, then sines, of 1000 t at 128 frequencies falling from 1 to nearly 1 / 10000."""
    half = TIME_CHANNELS // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = (1000 * timestep)[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotations(tokens: int, height: int, width: int, device: torch.device) -> Tensor:
    """Rotary angles' e^(iφ) for text then image: complex64 [tokens + height · width, 64], one per pair of a head."""
    places = torch.zeros(tokens + height * width, len(AXIS_WIDTHS), dtype=torch.float64, device=device)
    places[:tokens, 3] = torch.arange(tokens)
    places[tokens:, 1] = torch.arange(height).repeat_interleave(width)
    places[tokens:, 2] = torch.arange(width).repeat(height)
    angles = []
    for axis, axis_width in enumerate(AXIS_WIDTHS):
        steps = torch.arange(0, axis_width, 2, dtype=torch.float64, device=device) / axis_width
        angles.append(places[:, axis, None] * THETA**-steps)
    return torch.polar(torch.ones(1, dtype=torch.float64, device=device), torch.cat(angles, dim=-1)).to(torch.complex64)


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def _modulated(x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
    shift, scale = modulation[:2]
    return functional.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON) * (1 + scale) + shift


def _heads(qkv: Tensor, norm: QueryKeyNorm) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, tokens, 3 · hidden] as query, key, value [batch, heads, tokens, 128], the first two normalised."""
    query, key, value = qkv.unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
    return norm.query_norm(query), norm.key_norm(key), value


def _attend(query: Tensor, key: Tensor, value: Tensor, rotation: Tensor) -> Tensor:
    mixed = functional.scaled_dot_product_attention(_rotated(query, rotation), _rotated(key, rotation), value)
    return mixed.transpose(1, 2).flatten(2)
