"""Which layer becomes what: the rules a person gives, and the decision they come to for each layer.

Precedence: layer config > custom layers > excluded layers > preset > base format.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from streamquant import formats, presets
from streamquant.errors import UsageError
from streamquant.formats import Format
from streamquant.patterns import Pattern

KINDS = ("fp8", "fp8_e5m2", "int8", "nf4", "fp4", "keep")
DEFAULT_MODE = {"fp8": "tensor", "fp8_e5m2": "tensor", "int8": "row"}
DEFAULT_BLOCK_SIZE = {"fp8": 128, "int8": 128, "nf4": 64, "fp4": 64}
LEGAL_MODES = {"fp8": ("tensor", "row", "block", "block3d"), "fp8_e5m2": ("tensor",), "int8": ("tensor", "row", "block")}
ROUNDINGS = ("nearest",)


@dataclass(frozen=True)
class FormatChoice:
    """A format and its parameters as a person names them; None takes the format's own default.

    kind: one of KINDS; "keep" leaves the layer as it is. heur: leave layers too small or unaligned for the block.
    """

    kind: str = "fp8"
    scaling_mode: str | None = None
    block_size: int | None = None
    double_quant: bool = False
    rounding: str = "nearest"
    heur: bool = False

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

    def __post_init__(self) -> None:
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
        }


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

