"""Lets the whole repository be cloned into ComfyUI's custom_nodes: the nodes are in `comfyui_quantops/`.

ComfyUI imports a folder by its path. Everything else that imports this file (a test runner, a build) gets nothing.
"""

import sys
from pathlib import Path

if Path(__file__).parent.parent.name == "custom_nodes" and "comfy" in sys.modules:
    from .comfyui_quantops import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, comfy_entrypoint

    WEB_DIRECTORY = "./comfyui_quantops/web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "comfy_entrypoint"]
