"""Sizes as people write them: `4GB` is decimal, `1GiB` is binary."""

from __future__ import annotations

import re

_FACTORS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` (`4GB`, `256 MiB`, `1e9`) stands for."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in _FACTORS:
        raise ValueError(f"{text!r} is not a size: write for example 4GB or 256MiB")
    return int(float(match[1]) * _FACTORS[match[2].upper()])


def format_size(size: float | None, binary: bool = False) -> str:
    """Return `size` in bytes for a person: decimal for files, binary for memory, `-` for none."""
    if size is None:
        return "-"
    step, suffix = (1024.0, "iB") if binary else (1000.0, "B")
    value = float(size)
    for unit in ("", "K", "M", "G"):
        if value < step:
            return f"{value:.0f} B" if unit == "" else f"{value:.1f} {unit}{suffix}"
        value /= step
    return f"{value:.2f} T{suffix}"
