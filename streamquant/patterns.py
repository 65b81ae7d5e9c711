"""Regular expressions given by a person: compiled with a clear complaint, searched with a time limit."""

from __future__ import annotations

from dataclasses import dataclass, field

import regex

from streamquant.errors import PatternError

SEARCH_SECONDS = 2.0  # a sane pattern needs microseconds a name; a catastrophic one would need years


@dataclass(frozen=True)
class Pattern:
    """A regular expression and where it came from (a flag or a file), for messages."""

    text: str
    origin: str
    compiled: regex.Pattern = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "compiled", regex.compile(self.text))
        except regex.error as error:
            position = min(error.pos or 0, len(self.text))
            raise PatternError(
                f"{self.origin} is not a valid regular expression: {error.msg} at position {position}.\n"
                f"    {self.text}\n    {' ' * position}^"
            ) from None

    def finds(self, layer: str, key: str) -> bool:
        """Whether the expression is found in the layer's name or in the tensor's whole key."""
        try:
            return bool(
                self.compiled.search(layer, timeout=SEARCH_SECONDS) or self.compiled.search(key, timeout=SEARCH_SECONDS)
            )
        except TimeoutError:
            raise PatternError(
                f"{self.origin} {self.text!r} takes more than {SEARCH_SECONDS:g} s on one name: nested repetition such "
                f"as (a+)+ explodes, write it without."
            ) from None
