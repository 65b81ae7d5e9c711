"""What the commands beside `convert` show: tables and sentences made of their results, printed by a `Screen`."""

from .common import Progress, report_line, show, watching
from .compare import comparison_view
from .dequantize import dequantized_view
from .doctor import doctor_view
from .inspect import gguf_view, inspection_view, layers_view, tree_view
from .verify import checked_layers_view, verdict_view

__all__ = [
    "Progress", "checked_layers_view", "comparison_view", "dequantized_view", "doctor_view", "gguf_view", "inspection_view",
    "layers_view", "report_line", "show", "tree_view", "verdict_view", "watching",
]  # fmt: skip
