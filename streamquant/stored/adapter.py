"""LoRA and its kin: files that hold changes to a model, and no model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from streamquant import errors
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.reader import Checkpoint, SourceTensor

# (kind, what a tensor of it is named, whether its first dimension is the rank)
_PARTS = (
    ("LoRA", re.compile(r"(^|[._])lora_A(\.[^.]+)?(\.weight)?$"), True),
    ("LoRA", re.compile(r"(^|[._])lora_B(\.[^.]+)?(\.weight|\.bias)?$"), False),
    ("LoRA", re.compile(r"(^|[._])lora[._](linear_layer\.)?down\.weight$"), True),
    ("LoRA", re.compile(r"(^|[._])lora[._](linear_layer\.)?up\.weight$"), False),
    ("LoHa", re.compile(r"\.hada_w[12]_b$"), True),
    ("LoHa", re.compile(r"\.hada_(w[12]_a|t[12])$"), False),
    ("LoKr", re.compile(r"\.lokr_(w[12]_b)$"), True),
    ("LoKr", re.compile(r"\.lokr_(w[12](_a)?|t2)$"), False),
)
_BESIDE = re.compile(r"\.(alpha|dora_scale|lora_magnitude_vector(\.[^.]+)?(\.weight)?)$")


@dataclass(frozen=True)
class Adapter:
    """kind: "LoRA", "LoHa" or "LoKr". layers: that it changes. ranks: rank -> layers, where the shapes tell. alphas: names
    of the tensors that hold its alphas.
    """

    kind: str
    layers: int
    ranks: dict[int, int]
    alphas: tuple[str, ...]

    @property
    def rank_in_words(self) -> str:
        """"rank 16", "ranks 4 to 64", or nothing where no shape tells it."""
        if not self.ranks:
            return ""
        low, high = min(self.ranks), max(self.ranks)
        return f"rank {low:,}" if low == high else f"ranks {low:,} to {high:,}"


def find_adapter(tensors: Mapping[str, SourceTensor]) -> Adapter | None:
    """What adapter a file is, by the names of its tensors; None unless most of them are parts of one."""
    kinds, ranks, layers = Counter(), Counter(), set()
    beside, alphas = 0, []
    for name, tensor in tensors.items():
        for kind, pattern, has_rank in _PARTS:
            if found := pattern.search(name):
                kinds[kind] += 1
                layers.add(name[: found.start()])
                if has_rank and tensor.info.shape:
                    ranks[tensor.info.shape[0]] += 1
                break
        else:
            if found := _BESIDE.search(name):
                beside += 1
                if found[1] == "alpha":
                    alphas.append(name)
    if not kinds or 2 * (kinds.total() + beside) <= len(tensors):
        return None
    return Adapter(kinds.most_common(1)[0][0], len(layers), dict(ranks), tuple(alphas))


def refuse_adapter(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a file that is an adapter and no checkpoint."""
    if found := find_adapter(checkpoint.tensors):
        rank = f", {found.rank_in_words}" if found.ranks else ""
        raise errors.CheckpointError(
            f"{printable(str(checkpoint.path), 300)} is a {found.kind} ({found.layers:,} layers{rank}), not a checkpoint: it "
            f"changes a model when both are loaded. Give the model's own checkpoint."
        )
