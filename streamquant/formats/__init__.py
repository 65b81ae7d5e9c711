"""The formats on disk, one class each, by name. Adding a format is adding a file and a line here."""

from . import bnb4, fp8, int8, plain
from .base import Encoded, Encoder, Fill, Format, Output

FORMATS: dict[str, type[Format]] = Format.registry

__all__ = ["FORMATS", "Encoded", "Encoder", "Fill", "Format", "Output", "bnb4", "fp8", "int8", "plain"]
