"""JSON from a file that anyone may have written: read with bounds, so that all a hostile text can get is a refusal."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

# What checkpoints hold is 3 or 4 deep; what is much deeper ends in a RecursionError somewhere, at the latest on a screen.
MAX_DEPTH = 32
MAX_DIGITS = 40
MAX_MARKER_BYTES = 1 << 16  # of JSON in a tensor: a layer's marker is a few hundred bytes, and one of megabytes is none
LONG = 1 << 20  # characters up to which the brackets are not counted: their objects are a few dozen MB at the most
CHARACTERS_PER_BRACKET = 16  # at least, in what tensors need: `{"dtype":"F4","shape":[],"data_offsets":[0,0]}` has three

_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def load_json(text: str | bytes) -> Any:
    """The JSON value in `text`. Raises ValueError, with a clause that says why, for text that is not UTF-8 or not JSON, a key
    twice in one object, values nested more than MAX_DEPTH deep, integers of more than MAX_DIGITS digits, and long texts that
    hold hardly anything but brackets, which would take a hundred times their own size in memory.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if bracket_bomb(text):
        raise ValueError("it holds hardly anything but brackets")
    try:
        integer = _integer if _LONG_NUMBER.search(text) else int  # which the reader reads itself, ten times as fast
        value = json.loads(text, object_pairs_hook=_unique, parse_int=integer)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    if _deeper_than(value, MAX_DEPTH):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return value


def bracket_bomb(text: str) -> bool:
    """Whether a long JSON text opens more objects and arrays than any checkpoint's; each takes 60 bytes of memory or more."""
    if len(text) <= LONG or text.count("[") + text.count("{") <= len(text) // CHARACTERS_PER_BRACKET:
        return False
    bare = _STRING.sub("", text)  # brackets may stand in names and in metadata
    return bare.count("[") + bare.count("{") > len(text) // CHARACTERS_PER_BRACKET


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict, which would silently keep the last of two values under one key."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has {twice[:80]!r} twice in one object")
    return entries


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits):,} digits")
    return int(digits)


def _deeper_than(value: Any, depth: int) -> bool:
    """Whether objects and arrays lie in each other more than `depth` deep; found without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    while level and depth:
        depth -= 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)
