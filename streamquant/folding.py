"""Layer names folded: blocks of one kind differ by a number only, and are shown as one."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<![0-9A-Za-z_])\d+(?![0-9A-Za-z_])")


def fold(name: str) -> tuple[str, ...]:
    """What is left of a name without the numbers that stand between dots: equal for blocks of one kind."""
    return tuple(_NUMBER.split(name))


def fold_all(names: Iterable[str]) -> list[list[str]]:
    """The names, those of one kind together, in order of first appearance."""
    folded: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        folded.setdefault(fold(name), []).append(name)
    return list(folded.values())


def spell(names: list[str]) -> str:
    """Names of one kind as one, with the ranges of their numbers: `double_blocks.0-7.img_attn.qkv`."""
    numbers = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    ranges = iter([_ranges(sorted(set(column))) for column in numbers])
    return _NUMBER.sub(lambda _: next(ranges), names[0])


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as "0-3,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
