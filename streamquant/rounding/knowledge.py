"""What is known of the inputs of each layer of a plan, from whom, and the converter that follows from it.

In this order: layers that see only the time embedding are known exactly, by sweeping t; a calibration file knows what it
has seen; `--structure` guesses an MLP's second layer from its first; of all others nothing is known, and the tool says
so instead of learning from nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from streamquant import calibration
from streamquant.budget import LearnedNeeds
from streamquant.calibration import Calibration, LayerStatistics
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.reader import TileReader
from streamquant.errors import CalibrationError
from streamquant.plan import Plan, Unit
from streamquant.presets import strip_prefix
from streamquant.report import NEAREST, SEARCHED

from . import converter, structure, svd, svd_converter
from .converter import LearnedRoundingConverter
from .hadamard import hadamard
from .hessian import LayerHessian
from .scales import searches
from .svd_converter import SvdConverter
from .time_sweep import SHRINKAGE as TIME_SHRINKAGE
from .time_sweep import TimeSweep
from .weights import CheckpointWeights

CALIBRATION, SVD, TIME, STRUCTURE = "calibration", "svd objective", "time sweep", "structure"


class LayerKnowledge:
    """What is known of the layers of one plan. `converter` may be called from several threads.

    look: whether weights may be read at once (small ones); without, what needs them is believed to go well. Raises
    CalibrationError when the calibration file is unsound or was made for another model.
    """

    def __init__(self, plan: Plan, reader: TileReader, look: bool = True):
        self.plan, self.reader, self.look, recipe = plan, reader, look, plan.recipe
        self.calibration: Calibration | None = None
        self.weights = weights = CheckpointWeights(reader, plan.prefix, plan.stored)
        self.feeds = next((preset.feeds for preset in plan.presets if preset.feeds), ()) if recipe.structure else ()
        graph = next((preset.time for preset in plan.presets if preset.time), None)
        self.sweep = TimeSweep(graph, weights) if graph else None
        if recipe.calibration is not None:
            self.calibration = calibration.load(recipe.calibration, recipe.calibration_identity)
        self.origins = {unit.index: self._origin(unit) for unit in plan.units if unit.format.learned_grid}
        self._check()

    def origin(self, unit: Unit) -> str:
        """In words, from whom we know the layer's inputs; or what is done where we do not. "" where nothing is rounded."""
        return self.origins.get(unit.index, "")

    def refines(self, unit: Unit) -> bool:
        """Whether the layer's codes are learned, for which its tiles must be whole rows."""
        return self.origin(unit) not in ("", NEAREST, SEARCHED)

    def needs(self, unit: Unit) -> LearnedNeeds | None:
        """The memory that learning the layer's codes takes, None where none is learned."""
        if not self.refines(unit):
            return None
        origin, rank = self.origin(unit), self.plan.recipe.calibration_rank
        if origin == SVD:
            return svd_converter.needs(unit.shape, rank)
        found = converter.needs(unit.shape[1], rank, dense="whole" in origin)
        if origin == STRUCTURE:
            return replace(found, preparing=max(found.preparing, 4 * structure.INPUTS * unit.shape[1] + (50 << 20)))
        return found

    def statistics(self, unit: Unit) -> LayerStatistics | None:
        """What is known of the layer's inputs."""
        origin, bare = self.origin(unit), strip_prefix(unit.layer, self.plan.prefix)
        if origin == TIME:
            return self.sweep.statistics(bare)
        if origin == STRUCTURE:
            return structure.statistics(self.feeds, self.weights, bare, self.plan.recipe.calibration_rank)
        return self.calibration.find(unit.layer) if origin.startswith(CALIBRATION) else None

    def hessian(self, unit: Unit) -> LayerHessian | None:
        """H of the layer's inputs, as the weight's columns see it."""
        statistics = self.statistics(unit)
        if statistics is None:
            return None
        dense = self.plan.recipe.calibration_mode == "dense" or self.origin(unit) == TIME
        return LayerHessian.of(statistics, self.plan.recipe.calibration_rank, dense)

    def converter(self, unit: Unit) -> LearnedRoundingConverter | SvdConverter | None:
        """What decides the layer's scales and codes; None for nearest and absmax. Takes a while: eigenvectors."""
        origin = self.origin(unit)
        if origin in ("", NEAREST):
            return None
        rows, columns = unit.shape
        recipe = self.plan.recipe
        rotation = getattr(unit.format, "convrot_group_size", 0)
        if origin == SVD:
            bare = strip_prefix(unit.layer, self.plan.prefix)
            objective = svd.prepare(self.weights, bare, recipe.calibration_rank, recipe.seed)
            return SvdConverter(objective, recipe.sweeps, rotation) if objective else None
        hessian = self.hessian(unit)
        if hessian is not None and rotation:
            hessian = hessian.rotated(hadamard(rotation))
        strength = {TIME: TIME_SHRINKAGE, STRUCTURE: structure.SHRINKAGE}.get(origin)
        careful = hessian is None and unit.choice.rounding == "learned"
        return LearnedRoundingConverter(
            columns, rows, hessian, strength=strength, sweeps=recipe.sweeps, careful=careful
        )  # fmt: skip

    def confirm(self) -> None:
        """Raise SourceReadError when what is known may be wrong, because the calibration file could not be read."""
        if self.calibration is not None:
            self.calibration.confirm()

    def notes(self) -> Iterator[str]:
        """What a person should know before the conversion starts."""
        yield from self._rotation_note()
        counts = Counter(origin.split(" (")[0] for origin in self.origins.values())
        learned = {what: count for what, count in counts.items() if what not in (NEAREST, SEARCHED)}
        wanted = [unit for unit in self.plan.units if unit.index in self.origins and unit.choice.rounding == "learned"]
        if not wanted:
            return
        if learned:
            yield "Learned rounding: " + ", ".join(f"{_layers(count)} by {what}" for what, count in learned.items()) + "."
        if unknown := [unit for unit in wanted if not self.refines(unit)]:
            searched = sum(self.origin(unit) == SEARCHED for unit in unknown)
            some = f"{searched} of them " if searched < len(unknown) else ""
            scales = f", {some}with searched scales" if searched else ""
            yield (
                f"Nothing is known of the inputs of {_layers(len(unknown))}: rounded to nearest{scales}. --calibration FILE "
                f"lowers the error of their outputs."
            )

    def _rotation_note(self) -> Iterator[str]:
        """Rows of INT8 that are rotated without having been asked for."""
        ours = [unit for unit in self.plan.units if unit.choice and unit.quantized and unit.choice.convrot is None]
        ours = [unit for unit in ours if unit.choice.rotation(unit.shape[1])]
        rotated = sum(unit.format.convrot_group_size > 0 for unit in ours)
        if ours and not self.look:
            yield f"The INT8 rows of {_layers(len(ours))} will be rotated (ConvRot) where that lowers their error."
        elif ours and not rotated:
            yield f"The INT8 rows of {_layers(len(ours))} are not rotated (ConvRot), for they are better as they are."
        elif ours:
            rest = f"; {len(ours) - rotated} are better as they are" if rotated < len(ours) else ""
            yield f"The INT8 rows of {_layers(rotated)} are rotated (ConvRot), which lowers their error{rest}."

    def _origin(self, unit: Unit) -> str:
        rounding = unit.choice.rounding
        if rounding == "learned" and (known := self._learned(unit)):
            return known
        geometry = getattr(unit.format, "mode", "block"), getattr(unit.format, "block_size", 0)
        careful = rounding == "learned"
        return SEARCHED if rounding != "rtn" and searches(unit.format.learned_grid, *geometry, careful) else NEAREST

    def _learned(self, unit: Unit) -> str | None:
        if self.plan.recipe.objective == "svd":
            return SVD
        bare = strip_prefix(unit.layer, self.plan.prefix)
        columns = unit.shape[1]
        if self.sweep and self.sweep.sees_only_time(bare) and (not self.look or self.sweep.statistics(bare)):
            return TIME
        if self.calibration and (seen := self.calibration.find(unit.layer)):
            if seen.columns != columns:
                where = printable(str(self.plan.recipe.calibration), 300)
                raise CalibrationError(
                    f"{where}: {printable(unit.layer)} has {seen.columns} inputs in it, and {columns} in the checkpoint: it "
                    f"was made for another model."
                )
            whole = seen.hessian is not None and self.plan.recipe.calibration_mode == "dense"
            form = "whole H" if whole else f"rank {min(self.plan.recipe.calibration_rank, columns)}"
            return f"{CALIBRATION} ({form}, {seen.count:,} inputs)"
        if self.feeds and structure.is_fed(self.feeds, self.weights, bare):
            return STRUCTURE
        return None

    def _check(self) -> None:
        """Refuse a calibration that would silently do nothing."""
        if self.calibration is None:
            return
        where = printable(str(self.plan.recipe.calibration), 300)
        if self.plan.recipe.calibration_mode == "dense" and self.calibration.kind != "dense":
            raise CalibrationError(
                f"{where}: holds sketches, and --calibration-mode dense needs whole H: collect with dense=True, or leave "
                f"the mode out."
            )
        learned = [unit for unit in self.plan.units if unit.index in self.origins and unit.choice.rounding == "learned"]
        if learned and not any(self.calibration.find(unit.layer) for unit in learned):
            ours, theirs = printable(learned[0].layer), printable(next(iter(self.calibration.layers)))
            raise CalibrationError(
                f"{where}: none of its layers is in this checkpoint, whose layers are named like {ours!r} and its own like "
                f"{theirs!r}."
            )


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"
