"""The nodes that make quantized files and look into them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from streamquant.errors import InterruptedRunError, OutputExistsError
from streamquant.options import Silent
from streamquant.recipe import FormatChoice, Recipe

from .nodes_calibrate import calibration_files, calibration_path

CATEGORY = "streamquant"
NONE = "none"
FOLDERS = ("diffusion_models", "text_encoders")
FORMATS = {
    "NF4": FormatChoice("nf4"),
    "NF4, absmax in 8 bits": FormatChoice("nf4", double_quant=True),
    "FP4": FormatChoice("fp4"),
    "FP8": FormatChoice("fp8"),
    "FP8, a scale per row": FormatChoice("fp8", "row"),
    "FP8, blocks of 128 x 128": FormatChoice("fp8", "block"),
    "INT8": FormatChoice("int8"),
    "INT8, blocks of 128 x 128": FormatChoice("int8", "block"),
    "keep": FormatChoice("keep"),
}


def file_choices() -> list[str]:
    """Every file of the folders that conversion is for, as "folder/name"."""
    import folder_paths

    return [f"{folder}/{name}" for folder in FOLDERS for name in folder_paths.get_filename_list(folder)]


def chosen_file(choice: str) -> Path:
    """The path of one of `file_choices`."""
    import folder_paths

    folder, _, name = choice.partition("/")
    return Path(folder_paths.get_full_path_or_raise(folder, name))


class QuantizeModelFile:
    """A file of the models folder becomes a smaller one beside it."""

    NODE_ID = "StreamquantQuantizeModelFile"
    DISPLAY_NAME = "Quantize Model File"
    DESCRIPTION = (
        "Converts a checkpoint of the models folder to 4 or 8 bits and writes the result beside it, in constant memory "
        "whatever the file's size. Cancel stops it; run it again to go on where it stopped."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING",)
    FUNCTION = "quantize"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from streamquant import presets

        kinds = list(FORMATS)
        return {
            "required": {
                "source": (file_choices(), {"tooltip": "The checkpoint to convert, best in BF16 or F16."}),
                "format": (kinds[:-1], {"default": "NF4", "tooltip": "What linear layers become."}),
                "preset": (
                    ["auto", "none", *sorted(presets.load_presets())],
                    {"default": "auto", "tooltip": "Which layers stay in high precision; auto recognises the model."},
                ),
            },
            "optional": {
                "other_layers": (
                    "STRING",
                    {"default": "", "tooltip": "A regular expression: layers whose names it finds get the other format."},
                ),
                "other_format": (kinds, {"default": "FP8"}),
                "calibration": (
                    [NONE, *calibration_files()],
                    {"default": NONE, "tooltip": "What Collect Calibration recorded: weights are rounded by it."},
                ),
                "file_name": ("STRING", {"default": "", "tooltip": "Name of the new file; empty: made from the format's."}),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a file that has this name already."}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **given: Any) -> float:
        """Always: the file may have changed, and what is complete already costs nothing."""
        return float("nan")

    def quantize(
        self, source: str, format: str, preset: str, other_layers: str = "", other_format: str = "FP8",
        calibration: str = NONE, file_name: str = "", overwrite: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        import comfy.model_management

        import streamquant

        path = chosen_file(source)
        custom = FORMATS[other_format] if other_layers else None
        # Marked for ComfyUI, so that its own loader refuses 4-bit layers in words instead of failing in the sampler.
        recipe = Recipe(
            FORMATS[format], custom_layers=other_layers or None, custom=custom, preset=(preset,), comfy_quant=True,
            calibration=None if calibration == NONE else calibration_path(calibration),
        )  # fmt: skip
        target = path.with_name(self.output_name(path, recipe, file_name))
        stop = threading.Event()
        try:
            report = streamquant.convert(
                path, target, recipe, observer=ProgressInComfyUI(stop), stop=stop, resume=True, force=overwrite
            )
        except InterruptedRunError:
            comfy.model_management.throw_exception_if_processing_interrupted()
            raise
        except OutputExistsError as error:
            raise OutputExistsError(f"The file {target.name} exists: choose another name, or switch overwrite on.") from error
        lines = [f"{target.name}: {report.output_bytes:,} bytes from {report.source_bytes:,}", *report.notes]
        for summary in report.by_format():
            measured = summary.mean_relative_error
            error = f", mean relative error {measured:.2%}" if measured is not None and summary.format != "copy" else ""
            lines.append(f"{summary.format}: {summary.layers:,} tensors, {summary.output_bytes:,} bytes{error}")
        text = "\n".join(lines)
        return {"ui": {"text": [text]}, "result": (text,)}

    @staticmethod
    def output_name(source: Path, recipe: Recipe, file_name: str) -> str:
        """The new file's name: as given, or the source's with the formats in it."""
        if file_name:
            name = Path(file_name).name
            return name if name.endswith(".safetensors") else f"{name}.safetensors"
        choices = [recipe.base, *([recipe.custom] if recipe.custom else [])]
        words = dict.fromkeys(word for choice in choices for word in (choice.kind.replace("_", "-"), choice.mode_word) if word)
        return f"{source.stem}-{'-'.join(words)}.safetensors"


class ProgressInComfyUI(Silent):
    """Moves ComfyUI's progress bar, and sets `stop` when its Cancel button is pressed."""

    def __init__(self, stop: threading.Event):
        self.stop = stop
        self.done = 0
        self.bar: Any = None

    def started(self, plan: Any, tiles: Any, done_bytes: int) -> None:
        import comfy.utils

        self.done = done_bytes
        self.bar = comfy.utils.ProgressBar(max(plan.checkpoint.data_bytes, 1))
        self.bar.update_absolute(done_bytes)

    def progress(self, unit: Any, source_bytes: int) -> None:
        import comfy.model_management

        self.done += source_bytes
        self.bar.update_absolute(self.done)
        if comfy.model_management.processing_interrupted():
            self.stop.set()


class InspectQuantizedFile:
    """Which layer of a file is in which format, as text."""

    NODE_ID = "StreamquantInspectFile"
    DISPLAY_NAME = "Inspect Quantized File"
    DESCRIPTION = "Lists the layers of a checkpoint with their formats and sizes, from its header: nothing is loaded."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING",)
    FUNCTION = "inspect"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": (file_choices(), {"tooltip": "The checkpoint to look into."})}}

    @classmethod
    def IS_CHANGED(cls, file: str) -> float:
        return chosen_file(file).stat().st_mtime

    def inspect(self, file: str) -> dict[str, Any]:
        from .inspection import inspect

        text = inspect(chosen_file(file))
        return {"ui": {"text": [text]}, "result": (text,)}
