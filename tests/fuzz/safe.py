"""What is safe to show on a terminal."""

from __future__ import annotations

import unicodedata


def is_safe(text: str) -> bool:
    """Whether a terminal shows it and does nothing else: no controls but line ends, nothing invisible or reordering."""
    return all(character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text)
