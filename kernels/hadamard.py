"""Rotation of weights by Hadamard matrices, group by group (ConvRot): the reference, and its own inverse.

    H = H4 ⊗ H4 ⊗ … ⊗ H4 / √g,    H4 = [[ 1, 1, 1, -1],
                                        [ 1, 1, -1, 1],
                                        [ 1, -1, 1, 1],
                                        [-1, 1, 1, 1]]

H is symmetric and orthonormal, hence its own inverse. A row's outliers are spread over their group, which makes its
INT8 scale smaller; the loader rotates the activations alike, and the products are the same (comfy-kitchen's
`convrot_groupsize`; Huang et al., "ConvRot", arXiv 2512.03673, 2025).
"""

from __future__ import annotations

import torch

CHUNK = 1 << 16  # elements rotated at a time, so that both buffers stay in the CPU's cache


def rotate(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """`weight @ blockdiag(H)`: each run of `group_size` columns is multiplied by H.

    weight [rows, columns]: floating. group_size: a power of 4 that divides columns. Returns float32 [rows, columns].
    The order of the additions is part of the definition: after dividing by √g (exact, a power of two), one base-4
    digit of the column number after the other, the lowest first, each by `(x0 + x1) ± (x2 - x3)` and
    `(x2 + x3) ± (x0 - x1)`.
    """
    check_group_size(weight.shape[1], group_size)
    rotated = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    source, target = weight.reshape(-1, group_size), rotated.view(-1, group_size)
    step = len(source) if weight.device.type != "cpu" else max(CHUNK // group_size, 1)
    for begin in range(0, len(source), max(step, 1)):
        target[begin : begin + step] = _rotate_groups(source[begin : begin + step].float() * group_size**-0.5)
    return rotated


def check_group_size(columns: int, group_size: int) -> None:
    """Refuse a group that is no power of 4 or does not divide the columns."""
    is_power_of_4 = group_size > 1 and group_size & (group_size - 1) == 0 and group_size.bit_length() % 2 == 1
    assert is_power_of_4, f"group size {group_size} is not a power of 4"
    assert columns % group_size == 0, f"{columns} columns are not divisible into groups of {group_size}"


def _rotate_groups(groups: torch.Tensor) -> torch.Tensor:
    """groups [n, group]: float32, overwritten. Returns them multiplied by H * √g."""
    n, group = groups.shape
    other = torch.empty_like(groups)
    for _ in range((group.bit_length() - 1) // 2):
        # The lowest digit is taken off the end of the column number and comes back at its front: after as many stages
        # as there are digits, all are in place again.
        x0, x1, x2, x3 = groups.view(n, group // 4, 4).unbind(2)
        quarters = other.view(n, 4, group // 4)
        plus, minus = x0 + x1, x2 - x3
        torch.add(plus, minus, out=quarters[:, 0])
        torch.sub(plus, minus, out=quarters[:, 1])
        plus, minus = torch.add(x2, x3, out=plus), torch.sub(x0, x1, out=minus)
        torch.add(plus, minus, out=quarters[:, 2])
        torch.sub(plus, minus, out=quarters[:, 3])
        groups, other = other, groups
    return groups
