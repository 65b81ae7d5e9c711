"""Streamquant Loader: a ComfyUI node pack that loads, makes, inspects and calibrates quantized models.

Importing it registers nothing, patches nothing and needs neither triton, bitsandbytes nor a GPU: what a node needs is
imported when it runs.
"""

from __future__ import annotations

from . import library

library.find()

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402
from .schema import comfy_entrypoint  # noqa: E402

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "comfy_entrypoint"]
