"""What a checkpoint holds, whoever wrote it: which layers are quantized, how, and their weights again, by tiles."""

from .contents import Contents, StoredLayer, read_contents
from .layouts import TILE_ELEMENTS, Layout, Plain, Read, ScaledCodes, Tile, elements, tiles

__all__ = [
    "TILE_ELEMENTS",
    "Contents",
    "Layout",
    "Plain",
    "Read",
    "ScaledCodes",
    "StoredLayer",
    "Tile",
    "elements",
    "read_contents",
    "tiles",
]
