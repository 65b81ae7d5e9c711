"""What can keep a file from being loaded in ComfyUI."""

from __future__ import annotations

from streamquant.errors import CheckpointError, PreflightError


class UnloadableError(CheckpointError):
    """A checkpoint that is sound as a file, but holds a layer that cannot be loaded, or no model that ComfyUI knows."""


class ComfyUITooOldError(PreflightError):
    """This ComfyUI lacks what quantized layers are built on."""
