"""Kinds of words that several commands take."""

from __future__ import annotations

import re
from typing import Any

import click

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Size(click.ParamType):
    """A number of bytes: 512MiB (binary), 5GB (decimal), or a plain count."""

    name = "size"

    def convert(self, value: Any, param: Any, context: Any) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", value, re.IGNORECASE)
        if not match:
            self.fail(f"{value!r} is not a size: write 512MiB, 5GB or a number of bytes.", param, context)
        return int(float(match[1]) * UNITS[(match[2] or "").lower()])
