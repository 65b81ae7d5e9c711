"""streamquant: huge diffusion checkpoints made small, in constant memory.

    import streamquant
    report = streamquant.convert("flux2-dev.safetensors", "flux2-dev-nf4.safetensors", streamquant.Recipe(...))

Importing this package imports neither torch nor numba; they come when a weight is read.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamquant._version import __version__

# `kernels/` stands beside this folder in the repository and inside it when installed. From a checkout (also an
# editable install) the package must look there too.
_checkout = Path(__file__).resolve().parent.parent
if not Path(__file__).with_name("kernels").is_dir() and (_checkout / "kernels" / "dispatch.py").is_file():
    __path__.append(str(_checkout))

from streamquant.checkpoint.reader import Checkpoint, open_checkpoint  # noqa: E402
from streamquant.errors import StreamquantError  # noqa: E402
from streamquant.plan import Plan, plan  # noqa: E402
from streamquant.recipe import FormatChoice, Recipe  # noqa: E402

if TYPE_CHECKING:
    from streamquant.transcode import Options, Report


def convert(
    source: str | Path, destination: str | Path, recipe: Recipe | None = None, *, options: Options | None = None, **named: Any
) -> Report:
    """Convert a checkpoint: see `streamquant.transcode.convert`, to which this hands everything."""
    from streamquant.transcode import convert as run

    return run(source, destination, recipe, options=options, **named)


def __getattr__(name: str) -> Any:
    """`streamquant.calibration`, which is imported when it is asked for."""
    if name == "calibration":
        return importlib.import_module("streamquant.calibration")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Checkpoint",
    "FormatChoice",
    "Plan",
    "Recipe",
    "StreamquantError",
    "__version__",
    "convert",
    "open_checkpoint",
    "plan",
]
