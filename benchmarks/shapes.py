"""The tensors of a Flux.2 transformer of any size, by the names its released checkpoints use.

The names and shapes follow ComfyUI's `comfy/ldm/flux/model.py` with the settings its model detection gives a Flux.2
file: SwiGLU of ratio 3, no biases, one modulation shared by all blocks of a kind. Released files call the query and
key norms `.scale`; ComfyUI's own module calls them `.weight` and accepts both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log, prod
from typing import NamedTuple

HEAD = 128
CHANNELS = 128
TIME = 256
FULL_HIDDEN, FULL_DOUBLE_BLOCKS, FULL_SINGLE_BLOCKS = 6144, 8, 48
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


class TensorShape(NamedTuple):
    """One tensor of a checkpoint, as its header states it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FluxShape:
    """A Flux.2 transformer: `hidden` wide (a multiple of the head, 128), with this many blocks of each kind."""

    hidden: int = FULL_HIDDEN
    double_blocks: int = FULL_DOUBLE_BLOCKS
    single_blocks: int = FULL_SINGLE_BLOCKS

    def tensors(self, dtype: str = "BF16", prefix: str = "") -> list[TensorShape]:
        """Return every tensor of the model."""
        return [TensorShape(prefix + name, dtype, shape) for name, shape in self._layers()]

    def parameters(self) -> int:
        return sum(prod(shape) for _, shape in self._layers())

    def _layers(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden = self.hidden
        yield "img_in.weight", (hidden, CHANNELS)
        yield "txt_in.weight", (hidden, hidden * 5 // 2)
        for embedder in ("time_in", "guidance_in"):
            yield f"{embedder}.in_layer.weight", (hidden, TIME)
            yield f"{embedder}.out_layer.weight", (hidden, hidden)
        yield "double_stream_modulation_img.lin.weight", (6 * hidden, hidden)
        yield "double_stream_modulation_txt.lin.weight", (6 * hidden, hidden)
        yield "single_stream_modulation.lin.weight", (3 * hidden, hidden)
        for index in range(self.double_blocks):
            for stream in ("img", "txt"):
                block = f"double_blocks.{index}.{stream}"
                yield f"{block}_attn.qkv.weight", (3 * hidden, hidden)
                yield f"{block}_attn.proj.weight", (hidden, hidden)
                yield from self._norms(f"{block}_attn")
                yield f"{block}_mlp.0.weight", (6 * hidden, hidden)
                yield f"{block}_mlp.2.weight", (hidden, 3 * hidden)
        for index in range(self.single_blocks):
            block = f"single_blocks.{index}"
            yield f"{block}.linear1.weight", (9 * hidden, hidden)
            yield f"{block}.linear2.weight", (hidden, 4 * hidden)
            yield from self._norms(block)
        yield "final_layer.linear.weight", (CHANNELS, hidden)
        yield "final_layer.adaLN_modulation.1.weight", (2 * hidden, hidden)

    @staticmethod
    def _norms(block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{block}.norm.query_norm.scale", (HEAD,)
        yield f"{block}.norm.key_norm.scale", (HEAD,)


def flux_of_size(size: int, dtype: str = "BF16") -> FluxShape:
    """Return the Flux.2 shape whose weights come closest to `size` bytes, all kinds of layers kept.

    Width and depth shrink together, as the cube root of the size, so that the largest tensor stays about as small a
    part of the file as it is of the real one. A little of the size is traded for that balance.
    """
    parameters = size / ITEM_BYTES[dtype]
    ideal = FULL_HIDDEN * (parameters / FluxShape().parameters()) ** (1 / 3)

    def cost(shape: FluxShape) -> float:
        miss = abs(shape.parameters() / parameters - 1)
        depth_ratio = FULL_SINGLE_BLOCKS / FULL_DOUBLE_BLOCKS
        unbalance = abs(log(shape.hidden / ideal)) + abs(log(shape.single_blocks / shape.double_blocks / depth_ratio))
        return miss + 0.04 * unbalance

    best = min(_candidates(parameters, ideal), key=cost, default=None)
    if best is None or abs(best.parameters() / parameters - 1) > 0.1:
        smallest = FluxShape(HEAD, 1, 1).parameters() * ITEM_BYTES[dtype]
        raise ValueError(f"no Flux.2 shape comes near {size} bytes: the smallest takes {smallest}")
    return best


def _candidates(parameters: float, ideal: float) -> Iterator[FluxShape]:
    """Yield shapes near `ideal` width, each with the number of single blocks that fills `parameters`."""
    for hidden in range(HEAD, int(ideal * 1.6) + 2 * HEAD, HEAD):
        for double_blocks in range(1, round(FULL_DOUBLE_BLOCKS * hidden / FULL_HIDDEN) + 2):
            bare = FluxShape(hidden, double_blocks, 0).parameters()
            per_block = FluxShape(hidden, double_blocks, 1).parameters() - bare
            yield FluxShape(hidden, double_blocks, max(1, round((parameters - bare) / per_block)))


def one_tensor(size: int, dtype: str = "BF16", prefix: str = "") -> list[TensorShape]:
    """Return a checkpoint of a single layer of about `size` bytes: the layer no whole-tensor converter can hold."""
    rows = max(HEAD, round(size / ITEM_BYTES[dtype] / FULL_HIDDEN / HEAD) * HEAD)
    return [TensorShape(f"{prefix}single_blocks.0.linear1.weight", dtype, (rows, FULL_HIDDEN))]
