"""Checkpoint files: their header, their tensors read by tiles, and the output written at planned offsets."""
