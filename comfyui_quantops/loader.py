"""Loading a checkpoint as ComfyUI loads one, with the layers that it cannot read made readable on the way."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from streamquant.checkpoint.header import printable
from streamquant.checkpoint.json_text import load_json
from streamquant.checkpoint.reader import open_checkpoint
from streamquant.errors import ShardMissingError

from .errors import ComfyUITooOldError, UnloadableError

OLDEST_COMFYUI = "0.29"
OLDEST_KITCHEN = "0.2.24"
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
HEADER_MARKERS = "_quantization_metadata"


def require_comfyui() -> None:
    """Raise ComfyUITooOldError unless this ComfyUI has what quantized layers are built on."""
    try:
        import comfy.model_patcher
        import comfy.ops
        import comfy.quant_ops
        import comfy.utils
        from comfy_kitchen.tensor import QuantizedTensor, register_layout_class, register_layout_op  # noqa: F401

        new_enough = (
            hasattr(QuantizedTensor, "requantize_from_float")
            and comfy.quant_ops.QuantizedTensor is QuantizedTensor
            and hasattr(comfy.ops, "mixed_precision_ops")
            and hasattr(comfy.model_patcher, "LazyCastingParamPiece")
            and hasattr(comfy.utils, "convert_old_quants")
        )
    except ImportError:
        new_enough = False
    if not new_enough:
        raise ComfyUITooOldError(
            f"Quantized models need ComfyUI {OLDEST_COMFYUI} or newer with comfy-kitchen {OLDEST_KITCHEN} or newer; this "
            f"is ComfyUI {comfyui_version()} with comfy-kitchen {_installed('comfy-kitchen')}: update ComfyUI and its packages."
        )


def comfyui_version() -> str:
    """The version of the ComfyUI this runs in."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "of unknown version"
    return __version__


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def shards_of(path: Path) -> list[Path]:
    """All files of the checkpoint that `path` names: itself, or every shard of the set it belongs to.

    Headers are read strictly: raises a CheckpointError that says what is wrong with a damaged or incomplete checkpoint.
    """
    if path.suffix.lower() not in (".safetensors", ".sft"):
        return [path]  # a pickle, which ComfyUI reads with its own care
    match = SHARD.fullmatch(path.name)
    if match is None:
        return [file.path for file in open_checkpoint(path).files]
    index = path.with_name(f"{match['stem']}.safetensors.index.json")
    if index.is_file():
        return [file.path for file in open_checkpoint(index).files]
    count = int(match["count"])
    shards = [path.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}.safetensors") for n in range(1, count + 1)]
    for shard in shards:
        if not shard.is_file():
            raise ShardMissingError(f"The shard {printable(shard.name)!r} of {printable(path.name)} is not there: download it.")
        open_checkpoint(shard)
    return shards


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (mapped, not read) and metadata of a checkpoint, its quantized layers marked as ComfyUI wants them."""
    import comfy.utils

    state_dict: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    markers: dict[str, Any] = {}
    for shard in shards_of(Path(path)):
        tensors, found = comfy.utils.load_torch_file(str(shard), return_metadata=True)
        state_dict |= tensors
        metadata = {**(found or {}), **metadata}
        if found and HEADER_MARKERS in found:
            markers |= _header_layers(found[HEADER_MARKERS], shard)
    if markers:
        metadata[HEADER_MARKERS] = json.dumps({"format_version": "1.0", "layers": markers})
    return _with_markers(state_dict, metadata)


def _with_markers(
    state_dict: dict[str, torch.Tensor], metadata: dict[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """ComfyUI's own marking of layers that the header describes; markers that say the same keep the file's spelling."""
    import comfy.utils

    from .restore import read_json

    spelt = {key: tensor for key, tensor in state_dict.items() if key.endswith(".comfy_quant")}
    marked, metadata = comfy.utils.convert_old_quants(state_dict, "", metadata=metadata)
    for key, tensor in spelt.items():
        if key in marked and read_json(tensor, key) == read_json(marked[key], key):
            marked[key] = tensor
    return marked, metadata


def _header_layers(text: str, path: Path) -> dict[str, Any]:
    """The layers that a header's `_quantization_metadata` describes. Raises UnloadableError."""
    try:
        layers = load_json(text)["layers"]
    except (ValueError, KeyError, TypeError):
        layers = None
    if not isinstance(layers, dict):
        raise UnloadableError(f"{printable(path.name)}: its header's {HEADER_MARKERS} is malformed: convert the file again.")
    return layers


def _without_orphans(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Less the markers that a header gave to layers of another name, before or after its prefix was taken off."""
    return {
        key: tensor
        for key, tensor in state_dict.items()
        if not key.endswith(".comfy_quant") or f"{key.removesuffix('.comfy_quant')}.weight" in state_dict
    }


def _known_formats() -> dict[str, Any]:
    import comfy.quant_ops

    return comfy.quant_ops.QUANT_ALGOS


def load_diffusion_model(path: str, model_options: dict[str, Any] | None = None, disable_dynamic: bool = False) -> Any:
    """A `ModelPatcher` for the diffusion model in a file, as `comfy.sd.load_diffusion_model` makes one.

    path: a safetensors file, any shard of a set, or whatever ComfyUI itself reads. Unquantized files go ComfyUI's own
    way. Raises a StreamquantError that says in a sentence why a file cannot be loaded.
    """
    require_comfyui()
    import comfy.model_detection
    import comfy.model_management
    import comfy.ops
    import comfy.sd
    import comfy.utils

    from . import layouts, lora
    from .bnb4bit_ops import hybrid_operations
    from .restore import restore

    layouts.register(_known_formats())
    options = dict(model_options or {})
    state_dict, metadata = read_checkpoint(path)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state_dict)
    inner = comfy.utils.state_dict_prefix_replace(state_dict, {prefix: ""}, filter_keys=True)
    if inner:
        state_dict, metadata = _with_markers(inner, metadata)
    state_dict = _without_orphans(state_dict)
    restore(state_dict, _known_formats())
    if any(key.endswith(".comfy_quant") for key in state_dict):
        config = comfy.model_detection.model_config_from_unet(state_dict, "", metadata=metadata)
        if config is None:
            raise UnloadableError(_unrecognised(path, state_dict))
        device = options.get("load_device", comfy.model_management.get_torch_device())
        compute_dtype = comfy.model_management.unet_manual_cast(None, device, config.supported_inference_dtypes)
        base = comfy.ops.pick_operations(None, compute_dtype, load_device=device, model_config=config)
        options["custom_operations"] = hybrid_operations(base)
    model = comfy.sd.load_diffusion_model_state_dict(
        state_dict, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
    )
    if model is None:
        raise UnloadableError(_unrecognised(path, state_dict))
    model.cached_patcher_init = (load_diffusion_model, (path, model_options))
    if "custom_operations" in options:
        lora.attach(model)
    return model


def _unrecognised(path: str, state_dict: dict[str, Any]) -> str:
    name = printable(Path(path).name)
    if any(key.startswith(("transformer_blocks.0.attn.to_q", "single_transformer_blocks.")) for key in state_dict):
        return (
            f"{name} names its layers as diffusers does, and ComfyUI cannot rename quantized layers: convert the model from a "
            "file in ComfyUI's own naming."
        )
    return f"ComfyUI {comfyui_version()} does not recognise the model in {name}: update ComfyUI, or choose a diffusion model."


def load_text_encoder(
    paths: Sequence[str], embedding_directory: Any, clip_type: Any, model_options: dict[str, Any] | None = None,
    disable_dynamic: bool = False,
) -> Any:  # fmt: skip
    """A `CLIP` from the text encoders in one or more files, as `comfy.sd.load_clip` makes one; see `load_diffusion_model`."""
    require_comfyui()
    import comfy.ops
    import comfy.sd

    from . import layouts, lora
    from .bnb4bit_ops import hybrid_operations
    from .restore import restore

    layouts.register(_known_formats())
    options = dict(model_options or {})
    state_dicts = []
    for path in paths:
        state_dict = _without_orphans(read_checkpoint(path)[0])
        restore(state_dict, _known_formats())
        state_dicts.append(state_dict)
    if any(key.endswith(".comfy_quant") for state_dict in state_dicts for key in state_dict):
        # Text encoders multiply in full precision in ComfyUI, whatever their weights are kept in.
        base = comfy.ops.mixed_precision_ops({}, None, full_precision_mm=True)
        options["custom_operations"] = hybrid_operations(base)
    clip = comfy.sd.load_text_encoder_state_dicts(
        state_dicts, embedding_directory=embedding_directory, clip_type=clip_type, model_options=options,
        disable_dynamic=disable_dynamic,
    )  # fmt: skip
    clip.patcher.cached_patcher_init = (
        load_text_encoder_patcher, (list(paths), embedding_directory, clip_type, model_options),
    )  # fmt: skip
    if "custom_operations" in options:
        lora.attach(clip.patcher)
    return clip


def load_text_encoder_patcher(*arguments: Any, disable_dynamic: bool = False) -> Any:
    """The `ModelPatcher` of a text encoder loaded anew: what ComfyUI asks for when it clones one."""
    return load_text_encoder(*arguments, disable_dynamic=disable_dynamic).patcher
