"""Compiled runs of what other folders check without a device: their helpers are on the path."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / folder) for folder in ("kernels_gpu", "rounding")]
