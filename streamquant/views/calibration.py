"""What `streamquant calibration inspect` shows."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from streamquant.checkpoint.header import printable

from .common import table


def calibration_table(rows: list[dict[str, Any]]) -> Table:
    """The layers of a calibration file, as `Calibration.summary` has them."""
    numbers = ("columns", "inputs", "kept", "in mean", "in sketch", "in top")
    made = table("layer", *numbers, right=numbers)
    for row in rows:
        kept = "whole H" if row["kind"] == "hessian" else f"rank {row['rank']}"
        shares = [f"{row[name]:.1%}" if name in row else "" for name in ("energy_in_mean", "energy_in_sketch", "top_channel")]
        made.add_row(Text(printable(str(row["layer"]))), f"{row['columns']:,}", f"{row['count']:,}", kept, *shares)
    return made
