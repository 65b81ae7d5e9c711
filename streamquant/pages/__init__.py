"""A self-contained HTML page about one output: errors by block, errors against size, histograms, the recipe.

Drawing needs matplotlib (`pip install matplotlib`); nothing else here does, and the page itself needs no network.
"""

from .page import PageLayer, prepare_page, write_conversion_page, write_verdict_page

__all__ = ["PageLayer", "prepare_page", "write_conversion_page", "write_verdict_page"]
