"""The names of the converter this grew from: the same words on the command line and in Python, without logic.

    python -m streamquant.convert_to_quant model.safetensors --bnb-4bit --flux2 …
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamquant.errors import UsageError
from streamquant.recipe import KINDS, FormatChoice, Recipe
from streamquant.report import Report


def convert_to_bnb_4bit(
    input: str | Path,
    output: str | Path,
    quant_type: str = "nf4",
    blocksize: int = 64,
    exclude_layers: str | None = None,
    custom_layers: str | None = None,
    custom_type: str | None = None,
    custom_block_size: int | None = None,
    custom_scaling_mode: str | None = None,
    custom_simple: bool = False,
    custom_heur: bool = False,
    comfy_quant: bool = False,
    **named: Any,
) -> Report:
    """Convert a checkpoint to bitsandbytes 4-bit, with layers of another format where `custom_layers` finds them.

    input, output: paths. quant_type: "nf4" or "fp4". blocksize: weights per absmax. exclude_layers, custom_layers: regular
    expressions searched in layer names. custom_type: "fp8", "int8", "nf4", "fp4". custom_simple: round them to
    nearest. custom_heur: keep custom layers too small for the block. comfy_quant: mark 4-bit
    layers for ComfyUI too. named: `double_quant`, `rounding`, `calibration`, `preset` (a name or a sequence of names), and
    fields of `streamquant.transcode.Options`. Raises StreamquantError.
    """
    return create_converter_for_format(
        quant_type,
        block_size=blocksize,
        double_quant=named.pop("double_quant", False),
        exclude_layers=exclude_layers,
        custom_layers=custom_layers,
        custom_type=custom_type,
        custom_block_size=custom_block_size,
        custom_scaling_mode=custom_scaling_mode,
        custom_simple=custom_simple,
        custom_heur=custom_heur,
        comfy_quant=comfy_quant,
        preset=named.pop("preset", "auto"),
        rounding=named.pop("rounding", "learned"),
        calibration=named.pop("calibration", None),
    )(input, output, **named)


def create_converter_for_format(
    fmt: str,
    *,
    scaling_mode: str | None = None,
    block_size: int | None = None,
    double_quant: bool = False,
    exclude_layers: str | None = None,
    custom_layers: str | None = None,
    custom_type: str | None = None,
    custom_block_size: int | None = None,
    custom_scaling_mode: str | None = None,
    custom_simple: bool = False,
    custom_heur: bool = False,
    comfy_quant: bool = False,
    preset: str | tuple[str, ...] | list[str] = "auto",
    rounding: str = "learned",
    calibration: str | Path | None = None,
) -> Callable[..., Report]:
    """A function (input, output, **options) -> Report that converts to `fmt` ("fp8", "int8", "nf4", "fp4", "fp8_e5m2").

    rounding, calibration: of `streamquant.recipe`'s FormatChoice and Recipe. The other arguments are those of
    `convert_to_bnb_4bit`. Raises UsageError at once where they contradict.
    """
    if fmt not in KINDS[:-1]:
        raise UsageError(f"There is no format {fmt!r}: take one of {', '.join(KINDS[:-1])}.")
    custom = None
    if custom_type is not None:
        custom_rounding = "simple" if custom_simple and rounding == "learned" else rounding
        custom = FormatChoice(custom_type, custom_scaling_mode, custom_block_size, False, custom_rounding, custom_heur)
    recipe = Recipe(
        base=FormatChoice(fmt, scaling_mode, block_size, double_quant, rounding),
        custom_layers=custom_layers,
        custom=custom,
        exclude_layers=exclude_layers,
        preset=(preset,) if isinstance(preset, str) else tuple(preset),
        comfy_quant=comfy_quant,
        calibration=calibration,
    )

    def converter(input: str | Path, output: str | Path, **options: Any) -> Report:
        from streamquant.transcode import convert

        return convert(input, output, recipe, **options)

    return converter


def main() -> None:
    """The old command: `streamquant convert` by its former name."""
    from streamquant.cli import main as command_line

    command_line(args=["convert", *sys.argv[1:]], prog_name="streamquant")


if __name__ == "__main__":
    main()
