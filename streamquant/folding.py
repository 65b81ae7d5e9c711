"""Layer names folded: blocks of one kind differ by a number only, and are shown as one."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_DIGITS = 18
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
    if len(names) == 1:
        return names[0]
    columns = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    ranges = iter([_spell_column(column) for column in columns])
    return _NUMBER.sub(lambda _: next(ranges), names[0])


def _spell_column(numbers: tuple[str, ...]) -> str:
    """The numbers at one place. One of more digits than any block has is a word: Python does not read thousands of digits."""
    if max(map(len, numbers)) > MAX_DIGITS:
        return numbers[0] if len(set(numbers)) == 1 else "*"
    return _ranges(sorted(set(map(int, numbers))))


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as "0-3,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
