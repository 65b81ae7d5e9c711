"""Which layer becomes what: the rules a person gives, and the decision they come to for each layer.

Precedence: layer config > custom layers > excluded layers > preset > base format.
"""

from __future__ import annotations

import functools
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from streamquant import formats, presets
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.positioned import opened
from streamquant.errors import CalibrationError, UsageError
from streamquant.formats import Format
from streamquant.patterns import Pattern

KINDS = ("fp8", "fp8_e5m2", "int8", "nf4", "fp4", "keep")
DEFAULT_MODE = {"fp8": "tensor", "fp8_e5m2": "tensor", "int8": "row"}
DEFAULT_BLOCK_SIZE = {"fp8": 128, "int8": 128, "nf4": 64, "fp4": 64}
LEGAL_MODES = {"fp8": ("tensor", "row", "block", "block3d"), "fp8_e5m2": ("tensor",), "int8": ("tensor", "row", "block")}
# learned: codes that lower the output error, where the layer's inputs are known; scales of least error everywhere.
# simple: nearest, with scales of least error. rtn: nearest, with the scales that absmax gives.
ROUNDINGS = ("learned", "simple", "rtn")
CONVROT_GROUP_SIZES = (256, 64)  # tried in this order where none is given
CALIBRATION_MODES = ("sketch", "dense")
OBJECTIVES = ("output", "svd")


@dataclass(frozen=True)
class FormatChoice:
    """A format and its parameters as a person names them; None takes the format's own default.

    kind: one of KINDS; "keep" leaves the layer as it is. rounding: one of ROUNDINGS. heur: leave layers too small or
    unaligned for the block. convrot: whether INT8 rows are stored rotated; None decides layer by layer, for the lower
    error. convrot_group_size: columns rotated together, a power of 4; None takes 256, or 64 where that does not divide.
    """

    kind: str = "fp8"
    scaling_mode: str | None = None
    block_size: int | None = None
    double_quant: bool = False
    rounding: str = "learned"
    heur: bool = False
    convrot: bool | None = None
    convrot_group_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"There is no format {self.kind!r}: take one of {', '.join(KINDS)}.")
        legal = LEGAL_MODES.get(self.kind, ())
        mode = {"block2d": "block"}.get(self.scaling_mode or "", self.scaling_mode)
        object.__setattr__(self, "scaling_mode", mode)
        if mode is not None and mode not in legal:
            choices = f"{self.kind} takes {', '.join(legal)}" if legal else f"{self.kind} has no scaling mode"
            raise UsageError(f"Scaling mode {mode!r} does not go with {self.kind}: {choices}.")
        size = self.block_size
        if self.kind in ("nf4", "fp4") and size is not None and size not in formats.bnb4.BLOCK_SIZES:
            sizes = ", ".join(map(str, formats.bnb4.BLOCK_SIZES))
            raise UsageError(f"bitsandbytes has no block size {size}: take one of {sizes}.")
        if size is not None and size < 1:
            raise UsageError(f"A block size must be at least 1, not {size}.")
        if self.double_quant and self.kind not in ("nf4", "fp4"):
            raise UsageError(f"Double quantization belongs to nf4 and fp4, not to {self.kind}.")
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"There is no rounding {self.rounding!r}: take one of {', '.join(ROUNDINGS)}.")
        if self.convrot and not self._has_rows_of_int8:
            raise UsageError("ConvRot belongs to INT8 with row scales: take --int8 without another scaling mode.")
        group = self.convrot_group_size
        if group is not None and not (group >= 4 and group & (group - 1) == 0 and group.bit_length() % 2 == 1):
            raise UsageError(f"A ConvRot group size must be a power of 4 (16, 64, 256, 1024), not {group}.")

    @property
    def _has_rows_of_int8(self) -> bool:
        return self.kind == "int8" and self.scaling_mode in (None, "row")

    def rotation(self, in_features: int) -> int:
        """Columns that are rotated together, if the rows are rotated at all; 0 where no group divides in_features."""
        if not self._has_rows_of_int8 or self.convrot is False:
            return 0
        if self.convrot is None and self.rounding == "rtn":
            return 0
        sizes = CONVROT_GROUP_SIZES if self.convrot_group_size is None else (self.convrot_group_size,)
        return next((size for size in sizes if in_features % size == 0), 0)

    @property
    def effective_block_size(self) -> int:
        """The block edge that counts for this choice, 128 where the format has none."""
        return self.block_size or DEFAULT_BLOCK_SIZE.get(self.kind, 128)

    @property
    def mode_word(self) -> str:
        """How a file name tells this choice from the default one: "row", "block128", or nothing."""
        mode = self.scaling_mode
        if mode in (None, DEFAULT_MODE.get(self.kind)):
            return "dq" if self.double_quant else ""
        return f"{mode}{self.effective_block_size}" if mode.startswith("block") else mode

    @functools.cached_property
    def format(self) -> Format | None:
        """The format on disk, or None for "keep"."""
        size = self.effective_block_size
        mode = self.scaling_mode or DEFAULT_MODE.get(self.kind)
        if self.kind == "fp8":
            return {
                "tensor": formats.fp8.Float8TensorWise(),
                "row": formats.fp8.Float8RowWise(),
                "block": formats.fp8.Float8BlockWise(size),
                "block3d": formats.fp8.Float8Block3d(size),
            }[mode]
        if self.kind == "fp8_e5m2":
            return formats.fp8.Float8E5M2()
        if self.kind == "int8":
            by_block = mode == "block"
            return formats.int8.Int8BlockWise(block_size=size) if by_block else formats.int8.Int8TensorWise(mode == "row")
        if self.kind in ("nf4", "fp4"):
            layout = formats.bnb4.BnbNF4 if self.kind == "nf4" else formats.bnb4.BnbFP4
            return layout(size, self.double_quant)
        return None

    def too_small(self, shape: tuple[int, ...]) -> str | None:
        """Why `heur` leaves a weight [M, N] as it is: a dimension below the block size, or not divisible by it."""
        size = self.effective_block_size
        if not self.heur:
            return None
        if min(shape) < size:
            return f"a dimension is below {size} (heur)"
        if any(dimension % size for dimension in shape):
            return f"a dimension is not divisible by {size} (heur)"
        return None

    def describe(self) -> dict[str, Any]:
        """The choice as JSON, without what does not apply."""
        described: dict[str, Any] = {"format": self.format.name if self.format else "keep"}
        if self.format:
            described |= self.format.parameters()
            described["rounding"] = self.rounding
        if self._has_rows_of_int8:
            described["convrot"] = "auto" if self.convrot is None else self.convrot
            described["convrot_group_size"] = self.convrot_group_size
        return described | ({"heur": True} if self.heur else {})


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a checkpoint becomes. Two runs with equal recipes and sources give equal bytes.

    base: the format of every candidate that no other rule claims. custom_layers, exclude_layers: regular expressions.
    layer_config: (regular expression, choice) pairs, first match wins. preset: names, or "auto", or "none".
    comfy_quant: mark bitsandbytes layers for ComfyUI too. cast: "BF16", "F16" or None, for floating tensors that stay.
    """

    base: FormatChoice = FormatChoice()
    custom_layers: str | None = None
    custom: FormatChoice | None = None
    exclude_layers: str | None = None
    layer_config: tuple[tuple[str, FormatChoice], ...] = ()
    preset: tuple[str, ...] = ("auto",)
    comfy_quant: bool = False
    cast: str | None = None
    allow_nonfinite: bool = False
    seed: int = 0
    calibration: str | Path | None = None
    calibration_mode: str = "sketch"
    calibration_rank: int = 64
    sweeps: int = 0
    structure: bool = False
    objective: str = "output"

    def __post_init__(self) -> None:
        if self.calibration_mode not in CALIBRATION_MODES:
            raise UsageError(f"There is no calibration mode {self.calibration_mode!r}: take sketch or dense.")
        if self.objective not in OBJECTIVES:
            raise UsageError(f"There is no objective {self.objective!r}: take output or svd.")
        if self.calibration_rank < 1 or self.sweeps < 0:
            raise UsageError("A calibration rank is at least 1, and a number of sweeps at least 0.")
        if self.objective == "svd" and (self.calibration or self.structure):
            raise UsageError("--objective svd looks at the weight alone: leave out --calibration and --structure.")
        if self.calibration_mode == "dense" and not self.calibration:
            raise UsageError("--calibration-mode dense needs --calibration FILE.")
        if self.custom_layers is not None and self.custom is None:
            raise UsageError("--custom-layers needs --custom-type: say which format those layers become.")
        if self.custom is not None and self.custom_layers is None:
            raise UsageError("--custom-type needs --custom-layers: say which layers it is for.")
        if self.cast not in (None, "BF16", "F16"):
            raise UsageError(f"Cannot cast to {self.cast!r}: take bf16 or fp16.")

    def describe(self) -> dict[str, Any]:
        """The recipe as JSON: what provenance records and what a resume compares."""
        return {
            "base": self.base.describe(),
            "custom_layers": self.custom_layers,
            "custom": self.custom.describe() if self.custom else None,
            "exclude_layers": self.exclude_layers,
            "layer_config": [[pattern, choice.describe()] for pattern, choice in self.layer_config],
            "preset": list(self.preset),
            "comfy_quant": self.comfy_quant,
            "cast": self.cast,
            "allow_nonfinite": self.allow_nonfinite,
            "seed": self.seed,
            "learned": {
                "calibration_xxh3_64": self.calibration_hash,
                "calibration_mode": self.calibration_mode,
                "calibration_rank": self.calibration_rank,
                "sweeps": self.sweeps,
                "structure": self.structure,
                "objective": self.objective,
            },
        }

    @property
    def calibration_hash(self) -> str | None:
        """xxh3_64 of the calibration file, in hex: its name says nothing of what is in it."""
        return None if self.calibration is None else self._hashed[0]

    @property
    def calibration_identity(self) -> tuple[int, int]:
        """(bytes, modification time in ns) of the calibration file that was hashed."""
        return self._hashed[1]

    @functools.cached_property
    def _hashed(self) -> tuple[str, tuple[int, int]]:
        """The hash of the calibration file, and its identity. Raises CalibrationError."""
        where = printable(str(self.calibration), 300)
        hasher = xxhash.xxh3_64()
        try:
            if not stat.S_ISREG(os.stat(self.calibration).st_mode):  # a pipe would be empty when it is read again
                raise CalibrationError(f"{where}: the calibration file is no regular file.")
            with opened(self.calibration) as file:
                before = os.fstat(file.fileno())
                while chunk := file.read(1 << 24):
                    hasher.update(chunk)
                after = os.fstat(file.fileno())
                identity = file.tell(), before.st_mtime_ns
        except OSError as error:
            raise CalibrationError(f"{where}: the calibration file cannot be read ({error.strerror}).") from error
        if identity != (after.st_size, after.st_mtime_ns):
            raise CalibrationError(f"{where}: the calibration file changed while it was read.")
        return hasher.hexdigest(), identity


@dataclass(frozen=True)
class Decision:
    """What becomes of one candidate. choice: None when it stays. rule: which rule decided. reason: why, if it stays."""

    choice: FormatChoice | None
    rule: str
    reason: str | None = None


class Rules:
    """A recipe made ready for one checkpoint: patterns compiled, presets found, matches counted."""

    def __init__(self, recipe: Recipe, keys: list[str]):
        self.recipe = recipe
        self.config = [
            (Pattern(text, f"layer config entry {number}"), choice)
            for number, (text, choice) in enumerate(recipe.layer_config, start=1)
        ]
        self.custom = Pattern(recipe.custom_layers, "--custom-layers") if recipe.custom_layers is not None else None
        self.exclude = Pattern(recipe.exclude_layers, "--exclude-layers") if recipe.exclude_layers is not None else None
        self.recognised, self.prefix = presets.recognise(keys)
        self.presets = self._choose_presets(recipe.preset)
        # Pattern -> the candidates it found; whoever plans complains about those that found none.
        self.matches: dict[Pattern, int] = dict.fromkeys(self.patterns(), 0)

    def _choose_presets(self, names: tuple[str, ...]) -> list[presets.Preset]:
        if "none" in names:
            if len(names) > 1:
                raise UsageError("Preset none does not go with other presets.")
            return []
        chosen = [self.recognised if name == "auto" else presets.named(name) for name in names]
        return [*chosen, presets.everywhere()]

    def patterns(self) -> list[Pattern]:
        """Every regular expression the user gave."""
        return [*(pattern for pattern, _ in self.config), *filter(None, (self.custom, self.exclude))]

    def removes(self, key: str) -> str | None:
        """The preset that leaves the tensor `key` out of the output, with its expression, or None."""
        bare = presets.strip_prefix(key, self.prefix)
        for preset in self.presets:
            if pattern := preset.removes(bare):
                return f"preset {preset.name} ({pattern})"
        return None

    def decide(self, layer: str, key: str) -> Decision:
        """What becomes of the candidate `key`, whose layer name is `layer`."""
        found = {pattern for pattern in self.matches if pattern.finds(layer, key)}
        for pattern in found:
            self.matches[pattern] += 1
        for pattern, choice in self.config:
            if pattern in found:
                rule = f"layer config {pattern.text!r}"
                return Decision(choice if choice.format else None, rule, None if choice.format else "layer config says keep")
        if self.custom in found and self.recipe.custom:
            return Decision(self.recipe.custom, f"custom layers {self.recipe.custom_layers!r}")
        if self.exclude in found:
            return Decision(None, f"excluded layers {self.recipe.exclude_layers!r}", "excluded")
        bare = presets.strip_prefix(layer, self.prefix)
        for preset in self.presets:
            if preset.keeps(bare):
                name = "every architecture" if preset is presets.everywhere() else preset.title or preset.name
                return Decision(None, f"preset {preset.name.lstrip('_')}", f"kept in high precision ({name})")
        return Decision(self.recipe.base, "base format")

