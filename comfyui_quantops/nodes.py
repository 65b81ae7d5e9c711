"""The nodes by name, for ComfyUI's V1 interface. Each imports what it needs when it runs."""

from __future__ import annotations

from .nodes_calibrate import CollectCalibration
from .nodes_convert import InspectQuantizedFile, QuantizeModelFile
from .nodes_load import LoadQuantizedDiffusionModel, LoadQuantizedTextEncoder

NODES = (
    LoadQuantizedDiffusionModel,
    LoadQuantizedTextEncoder,
    QuantizeModelFile,
    InspectQuantizedFile,
    CollectCalibration,
)

NODE_CLASS_MAPPINGS = {node.NODE_ID: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.NODE_ID: node.DISPLAY_NAME for node in NODES}
