"""A changed weight back onto the grid it came from, for the places where ComfyUI must merge a patch.

The grid's scales only ever grow: a = max(old, what the new values need), so a weight that the patch did not touch keeps
its bits. Rounding is stochastic where a seed is given (unbiased: small patches survive on average), else to nearest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch

from streamquant.kernels.codebooks import DYNAMIC_MAP

SMALLEST = 1e-38
CHUNK = 1 << 22  # elements rounded at a time: about 100 MB of temporaries


def pieces(elements: int, multiple: int) -> Iterator[slice]:
    """Consecutive slices that together cover `elements`, each but the last a multiple of `multiple` long."""
    step = max(CHUNK // multiple, 1) * multiple
    return (slice(begin, min(begin + step, elements)) for begin in range(0, elements, step))


@functools.cache
def grid_values(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Every finite value of an 8-bit grid in ascending order, float32 [n], and the code of each, uint8 [n].

    INT8 ends at ±127; of FP8's two zeros the positive one is taken.
    """
    codes = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(codes.copy()).view(dtype).float().numpy()
    kept = np.isfinite(values) & ~((values == 0) & (codes != 0))
    if dtype == torch.int8:
        kept &= values >= -127
    order = np.argsort(values[kept], kind="stable")
    return torch.from_numpy(values[kept][order]), torch.from_numpy(codes[kept][order])


def round_to_grid(
    values: torch.Tensor, grid: torch.Tensor, generator: torch.Generator | None, exact: float
) -> torch.Tensor:
    """Index into `grid` for each of `values`.

    values [n]: float32, clamped to the grid. grid [k]: float32, ascending. generator: None rounds to nearest, ties to
    the lower. exact: a value nearer to the grid than this share of its magnitude is on it: it is never rounded away.
    Returns int32 [n].
    """
    upper = torch.bucketize(values, grid, out_int32=True).clamp_(1, grid.numel() - 1)
    lower = upper - 1
    below, above = grid[lower], grid[upper]
    share = ((values - below) / (above - below)).clamp_(0, 1)
    up = share > 0.5
    if generator is not None:
        drawn = torch.rand(values.shape, generator=generator, device=values.device)
        nearest = torch.where(up, above, below)
        # Decoding and casting have moved a value by a rounding; drawing lots for that would change what nobody touched.
        untouched = (values - nearest).abs() <= exact * values.abs()
        up = torch.where(untouched, up, drawn < share)
    return torch.where(up, upper, lower)


def make_generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    """A generator for a seed above 0, else None: ComfyUI's way of asking for rounding to nearest."""
    return torch.Generator(device=device).manual_seed(seed) if seed else None


def tolerance(dtype: torch.dtype) -> float:
    """Relative error below which a value of `dtype` counts as unchanged: a rounding to it, and one of the scaling."""
    return 2 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def grow(scale: torch.Tensor, needed: torch.Tensor, exact: float) -> torch.Tensor:
    """Old scales, but where the new values need more (by more than a rounding): there what they need.

    scale: of either sign, for a negative absmax turns a 4-bit book round.
    """
    return torch.where(needed > scale.abs() * (1 + exact), needed, scale)


def divisor(scale: torch.Tensor) -> torch.Tensor:
    """`scale`, or the smallest number that can be divided by where it is nothing."""
    return torch.where(scale.abs() < SMALLEST, SMALLEST, scale)


def encode_absmax_above(
    absmax: torch.Tensor, old: torch.Tensor, old_codes: torch.Tensor, old_nested: torch.Tensor, block_size: int, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Double quantization of absmax of which some has grown, never below it.

    absmax, old [blocks]: float32, what is needed and what the old codes say; a block that did not grow keeps its code,
    unless one of those it shares a scale with has outgrown that scale.
    Returns uint8 codes [blocks] and float32 nested absmax [ceil(blocks / block_size)]; the offset stays, for its digits
    are part of the file's quant_state.
    """
    table = torch.from_numpy(DYNAMIC_MAP).to(absmax.device)
    wanted, grown = absmax - offset, absmax > old
    blocks = wanted.numel()
    reach = torch.where(grown, wanted, 0.0)
    reach = torch.nn.functional.pad(reach, (0, -blocks % block_size)).view(-1, block_size).amax(1)
    nested = torch.maximum(old_nested, reach)
    scale = nested.repeat_interleave(block_size)[:blocks]
    old_scale = old_nested.repeat_interleave(block_size)[:blocks]
    above = torch.bucketize(wanted / divisor(scale), table, out_int32=True).clamp_(max=255)
    # A quotient that rounded down may point one entry too low.
    above = torch.where(table[above] * scale < wanted, (above + 1).clamp(max=255), above)
    return torch.where(grown | (scale != old_scale), above.to(torch.uint8), old_codes), nested
