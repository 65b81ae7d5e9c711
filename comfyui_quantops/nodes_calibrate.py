"""The node that records what a model's layers see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CATEGORY = "streamquant"
SUFFIX = ".calibration.safetensors"


def calibration_folder() -> Path:
    """Where calibrations are kept: a folder of ComfyUI's output folder."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / "calibration"


def calibration_files() -> list[str]:
    """The names of all calibrations."""
    return sorted(path.name for path in calibration_folder().glob(f"*{SUFFIX}"))


def calibration_path(file_name: str) -> Path:
    """Where the calibration of this name is, or will be; folders in the name are ignored."""
    name = Path(file_name or "model").name
    return calibration_folder() / (name if name.endswith(SUFFIX) else name.removesuffix(".safetensors") + SUFFIX)


class CollectCalibration:
    """Passes a model through, and records the inputs of its linear layers while it is sampled with."""

    NODE_ID = "StreamquantCollectCalibration"
    DISPLAY_NAME = "Collect Calibration"
    DESCRIPTION = (
        "Put it between the loader of the unquantized model and the sampler, and sample a dozen different prompts: a few "
        "steps of each picture are recorded, and every run adds to the file. `streamquant convert --calibration` then "
        "rounds weights by it. Self-calibrate does it at once, from noise, without prompts."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "calibrate"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The unquantized model."}),
                "file_name": (
                    "STRING",
                    {"default": "model", "tooltip": "The file in the output folder's calibration folder; runs add to it."},
                ),
            },
            "optional": {
                "steps_per_picture": (
                    "INT",
                    {"default": 3, "min": 1, "max": 100, "tooltip": "Spread from early to late. More prompts beat more steps."},
                ),
                "self_calibrate": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Run the model on noise and random context now, without any prompt."},
                ),
                "trajectories": ("INT", {"default": 16, "min": 1, "max": 1000, "tooltip": "Pictures of a self-calibration."}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1, "tooltip": "Of the noise of a self-calibration."}),
                "size": ("INT", {"default": 512, "min": 64, "max": 4096, "tooltip": "Edge of its pictures in pixels."}),
                "rank": ("INT", {"default": 64, "min": 1, "max": 512, "advanced": True, "tooltip": "Directions kept a layer."}),
            },
        }

    def calibrate(
        self, model: Any, file_name: str, steps_per_picture: int = 3, self_calibrate: bool = False, trajectories: int = 16,
        seed: int = 0, size: int = 512, rank: int = 64,
    ) -> tuple[Any]:  # fmt: skip
        from . import calibration

        path = calibration_path(file_name)
        if not self_calibrate:
            return (calibration.Recorder(path, steps_per_picture, rank).attach(model),)
        found = calibration.calibrate_itself(model, trajectories, 12, size, 256, seed, rank)
        calibration.add_to_file(path, found)
        return (model,)
