"""Documents with parts that are written by `report`: between `<!-- report: NAME -->` and `<!-- /report: NAME -->`."""

from __future__ import annotations

import re

_PART = re.compile(r"(<!-- report: ([\w-]+) -->\n).*?(<!-- /report: \2 -->\n)", re.DOTALL)


def names(text: str) -> list[str]:
    """The parts that a document has. Raises ValueError when one is begun and not ended."""
    found = [match[2] for match in _PART.finditer(text)]
    begun = re.findall(r"<!-- report: ([\w-]+) -->", text)
    if begun != found:
        raise ValueError(f"parts begun and not ended, or twice: {', '.join(sorted(set(begun) ^ set(found))) or begun}")
    return found


def filled(text: str, parts: dict[str, str]) -> str:
    """The document with its parts as they are in `parts`. Raises ValueError when it has one that is not."""
    if unknown := [name for name in names(text) if name not in parts]:
        raise ValueError(f"no such part: {', '.join(unknown)}. There are: {', '.join(parts)}")
    return _PART.sub(lambda match: f"{match[1]}\n{parts[match[2]].strip()}\n\n{match[3]}", text)
