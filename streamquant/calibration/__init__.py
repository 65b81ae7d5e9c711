"""What a model's linear layers see, collected while it runs and kept in a file, for learned rounding to use.

Importing this package does not import torch; `collect` and `self_calibrate` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamquant.errors import CalibrationError

from .file import Calibration, load, merge
from .statistics import LayerStatistics

if TYPE_CHECKING:
    from .collector import collect, self_calibrate

__all__ = ["Calibration", "CalibrationError", "LayerStatistics", "collect", "load", "merge", "self_calibrate"]


def __getattr__(name: str) -> Any:
    if name in ("collect", "self_calibrate"):
        from . import collector

        return getattr(collector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
