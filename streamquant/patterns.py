"""Regular expressions given by a person: compiled with a clear complaint, searched with a time limit."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field

import regex

from streamquant.checkpoint.header import printable
from streamquant.errors import PatternError

# A sane pattern needs microseconds a name; a catastrophic one would need years, for one name or for all together.
SEARCH_SECONDS = 2.0
TOTAL_SECONDS = 20.0
MAX_LENGTH = 200_000  # characters: thousands of layers by name; compiling takes seconds from there on, and cannot be stopped
MAX_UNROLLED = 50_000  # parts that counted repetitions may add: the engine writes them out
SHOWN = 72  # characters of a pattern around the fault


@dataclass(frozen=True)
class Pattern:
    """A regular expression and where it came from (a flag or a file), for messages."""

    text: str
    origin: str
    compiled: regex.Pattern = field(init=False, repr=False, compare=False)
    _clock: list[float] = field(init=False, repr=False, compare=False, default_factory=lambda: [0.0])  # seconds searched so far

    def __post_init__(self) -> None:
        if not self.text:
            raise PatternError(f"{self.origin} is empty, which finds every layer: say . for all of them, or leave it out.")
        if len(self.text) > MAX_LENGTH:
            raise PatternError(
                f"{self.origin} is {len(self.text):,} characters long, more than {MAX_LENGTH:,}: say what the names have in "
                f"common."
            )
        if _CALL.search(_ESCAPE.sub("", self.text)):
            raise PatternError(
                f"{self.origin} '{printable(self.text)}' calls a part of itself, as (?R) does, which no time limit stops: "
                f"write it out."
            )
        if _unrolled(self.text) > MAX_UNROLLED + len(self.text):
            raise PatternError(
                f"{self.origin} '{printable(self.text)}' repeats a part more than {MAX_UNROLLED:,} times, which fills "
                f"the memory: write * or + instead of the number."
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # regex' own, of meanings that may change in a later version
                object.__setattr__(self, "compiled", regex.compile(self.text))
        except regex.error as error:
            raise PatternError(self._fault(error.msg, error.pos)) from None
        # What else the parser raises on odd patterns: flags that contradict, numbers too large, groups too deep.
        except (ValueError, OverflowError, RecursionError, LookupError, TypeError, AttributeError, MemoryError) as error:
            words = "it is nested too deep" if isinstance(error, RecursionError) else str(error) or type(error).__name__
            raise PatternError(self._fault(words, None)) from None

    def _fault(self, words: str, position: int | None) -> str:
        """The complaint: a sentence, the pattern, a caret under the fault."""
        said = f"{self.origin} is not a valid regular expression: {printable(words)}"
        if position is None:
            return f"{said}.\n    {printable(self.text, SHOWN)}"
        from rich.cells import cell_len  # only here: a help text needs no rich

        position = min(position, len(self.text))
        begin = max(position - SHOWN // 2, 0) if len(self.text) > SHOWN else 0
        before = ("..." if begin else "") + printable(self.text[begin:position], SHOWN)
        after = printable(self.text[position : begin + SHOWN], SHOWN) + ("..." if begin + SHOWN < len(self.text) else "")
        return f"{said} at position {position:,}.\n    {before}{after}\n    {' ' * cell_len(before)}^"

    def finds(self, layer: str, key: str) -> bool:
        """Whether the expression is found in the layer's name or in the tensor's whole key.

        Raises PatternError when that takes more than SEARCH_SECONDS, or TOTAL_SECONDS for all names so far.
        """
        begin = time.perf_counter()
        try:
            found = self.compiled.search(layer, timeout=SEARCH_SECONDS) or self.compiled.search(key, timeout=SEARCH_SECONDS)
            self._clock[0] += time.perf_counter() - begin
            if self._clock[0] > TOTAL_SECONDS:
                raise self._too_slow(f"{TOTAL_SECONDS:g} s on the names of one checkpoint")
            return bool(found)
        except TimeoutError:
            raise self._too_slow(f"{SEARCH_SECONDS:g} s on one name") from None
        except MemoryError:
            raise self._too_slow("the memory it may have on one name") from None

    def _too_slow(self, how: str) -> PatternError:
        shown = printable(self.text)
        return PatternError(
            f"{self.origin} '{shown}' takes more than {how}: nested repetition such as (a+)+ explodes, write it without."
        )


_ESCAPE = regex.compile(r"\\.", regex.DOTALL)
_CALL = regex.compile(r"\(\?(?:R|[-+]?\d|&|P>)")
_PART = regex.compile(r"\\.|\{(\d+)(?:,\d*)?\}|.", regex.DOTALL)


def _unrolled(text: str) -> int:
    """About how many parts the engine compiles: it writes `x{1000}` out a thousand times, nested ones times each other.

    Character classes are not understood, so that their brackets and braces count as if they meant something.
    """
    levels, last = [0], 0  # parts in each open group; parts in what a repetition would repeat
    for part in _PART.finditer(text):
        if part[0] == "(":
            levels.append(0)
            continue
        if part[1]:
            added = last * max(int(part[1][:9]) - 1, 0)
            last += added
        elif part[0] == ")":
            added = last = levels[-1]
            if len(levels) > 1:
                levels.pop()
            else:
                added = 0
        else:
            added = last = 1
        levels[-1] += added
    return sum(levels)
