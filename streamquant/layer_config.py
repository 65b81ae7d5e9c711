r"""Layer-config files: TOML or JSON, a table from regular expression to format and parameters, first match wins.

TOML:

    ['double_blocks\.0\.']
    format = "int8"
    scaling_mode = "row"

    [final_layer]
    format = "keep"

JSON: {"double_blocks\\.0\\.": {"format": "int8", "scaling_mode": "row"}, "final_layer": "keep"}
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from streamquant.checkpoint.header import printable
from streamquant.checkpoint.json_text import load_json
from streamquant.errors import LayerConfigError, UsageError
from streamquant.patterns import SHOWN, Pattern
from streamquant.recipe import KINDS, FormatChoice

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 16 << 20
# On-disk format names are accepted too: what `inspect` shows can be written back into a config.
DISK_NAMES = {
    "float8_e4m3fn": ("fp8", "tensor"),
    "float8_e4m3fn_rowwise": ("fp8", "row"),
    "float8_e4m3fn_blockwise": ("fp8", "block"),
    "float8_e4m3fn_block3d": ("fp8", "block3d"),
    "float8_e5m2": ("fp8_e5m2", "tensor"),
    "int8_tensorwise": ("int8", None),
    "int8_blockwise": ("int8", "block"),
    "bnb_nf4": ("nf4", None),
    "bnb_fp4": ("fp4", None),
}


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """One entry of a layer config."""

    format: str
    scaling_mode: str | None = None
    block_size: int | None = None
    double_quant: bool = False
    heur: bool = False
    rounding: str | None = None
    convrot: bool | None = None
    convrot_group_size: int | None = None


def read_layer_config(path: str | Path, rounding: str = "learned") -> tuple[tuple[str, FormatChoice], ...]:
    """The (regular expression, choice) pairs of a file, in its order. rounding: of entries that do not name one.

    Raises LayerConfigError when the file cannot be read, is neither TOML nor JSON, or an entry is not understood.
    """
    path = Path(path)
    shown = printable(str(path), 300)
    try:
        with open(path, "rb") as file:  # perhaps a pipe: <(...) in a shell
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LayerConfigError(f"Cannot read the layer config {shown}: it is not UTF-8 text.") from None
    except (OSError, ValueError) as error:
        raise LayerConfigError(f"Cannot read the layer config {shown}: {getattr(error, 'strerror', None) or error}.") from None
    if len(raw) > MAX_BYTES:
        raise LayerConfigError(f"The layer config {shown} is larger than {MAX_BYTES:,} bytes: it is something else.")
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        table = load_json(text) if kind == "JSON" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else printable(str(error), 300)
        raise LayerConfigError(f"The layer config {shown} is not valid {kind}: {why}.") from None
    if not isinstance(table, dict) or not table:
        raise LayerConfigError(f"The layer config {shown} must be a table from regular expression to format.")
    return tuple((pattern, _choice(shown, pattern, value, rounding)) for pattern, value in table.items())


def _choice(path: str, pattern: str, value: object, rounding: str) -> FormatChoice:
    Pattern(pattern, f"The layer config {path}, entry '{printable(pattern, SHOWN)}',")  # complains if it is none
    try:
        entry = msgspec.convert({"format": value} if isinstance(value, str) else value, Entry)
        kind, mode = DISK_NAMES.get(entry.format, (entry.format, None))
        if kind not in KINDS:
            known = ", ".join([*KINDS, *DISK_NAMES])
            raise UsageError(f"there is no format {entry.format!r}, take one of {known}.")
        return FormatChoice(
            kind,
            entry.scaling_mode or mode,
            entry.block_size,
            entry.double_quant,
            entry.rounding or rounding,
            entry.heur,
            entry.convrot,
            entry.convrot_group_size,
        )
    except (msgspec.ValidationError, UsageError) as error:
        why = printable(str(error).rstrip("."), 600)
        raise LayerConfigError(f"The layer config {path}, entry '{printable(pattern)}': {why}.") from None
