"""The loader nodes."""

from __future__ import annotations

from typing import Any

CATEGORY = "streamquant"
NONE = "none"


class LoadQuantizedDiffusionModel:
    """Any diffusion model: NF4, FP4, FP8, INT8, mixed in one file, or not quantized at all."""

    NODE_ID = "StreamquantLoadDiffusionModel"
    DISPLAY_NAME = "Load Quantized Diffusion Model"
    DESCRIPTION = (
        "Loads a diffusion model in bitsandbytes NF4 or FP4, FP8, INT8, or a mixture of them, as well as everything that "
        "ComfyUI's own loader takes. Offloading, LoRA and saving work as with any other model. Of a sharded checkpoint, "
        "choose any shard."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import folder_paths

        names = folder_paths.get_filename_list("diffusion_models")
        return {"required": {"unet_name": (names, {"tooltip": "A file of the diffusion_models folder."})}}

    def load(self, unet_name: str) -> tuple[Any]:
        import folder_paths

        from .loader import load_diffusion_model

        return (load_diffusion_model(folder_paths.get_full_path_or_raise("diffusion_models", unet_name)),)


class LoadQuantizedTextEncoder:
    """One or two text encoders, quantized or not."""

    NODE_ID = "StreamquantLoadTextEncoder"
    DISPLAY_NAME = "Load Quantized Text Encoder"
    DESCRIPTION = (
        "Loads a text encoder in bitsandbytes NF4 or FP4, FP8, INT8, or a mixture of them, as well as everything that "
        "ComfyUI's own loader takes. Some models use two: the second file is for them."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import folder_paths

        names = folder_paths.get_filename_list("text_encoders")
        return {
            "required": {
                "clip_name": (names, {"tooltip": "A file of the text_encoders folder."}),
                "type": (_clip_types(), {"tooltip": "The kind of model that will use the text encoder."}),
            },
            "optional": {
                "clip_name2": ([NONE, *names], {"default": NONE, "tooltip": "The second text encoder, if the model uses two."}),
                "device": (["default", "cpu"], {"advanced": True, "tooltip": "cpu: never use the GPU for text."}),
            },
        }

    def load(self, clip_name: str, type: str, clip_name2: str = NONE, device: str = "default") -> tuple[Any]:
        import comfy.sd
        import folder_paths
        import torch

        from .loader import load_text_encoder

        options = {}
        if device == "cpu":
            options["load_device"] = options["offload_device"] = torch.device("cpu")
        names = [clip_name, *([clip_name2] if clip_name2 != NONE else [])]
        paths = [folder_paths.get_full_path_or_raise("text_encoders", name) for name in names]
        kind = comfy.sd.CLIPType[type.upper()]
        return (load_text_encoder(paths, folder_paths.get_folder_paths("embeddings"), kind, options),)


def _clip_types() -> list[str]:
    """The kinds of text encoder that this ComfyUI knows."""
    import comfy.sd

    return [kind.name.lower() for kind in comfy.sd.CLIPType]
