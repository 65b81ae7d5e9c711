"""Decode a converted file with the libraries that read it, and print each layer's error against the source.

    python examples/decode_with_bitsandbytes.py SOURCE CONVERTED

4-bit layers are decoded by bitsandbytes itself, FP8 layers by their scale. Nothing of streamquant is used, on purpose.
"""

import logging
import sys

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its note on an optional kernel package

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from rich.console import Console
from rich.table import Table
from safetensors import safe_open


def decode(file, layer: str, keys: set[str]) -> tuple[str, torch.Tensor] | None:
    """Format and float32 weight of one layer, or None when it is not quantized."""
    weight = file.get_tensor(f"{layer}.weight")
    state = {key.removeprefix(f"{layer}."): key for key in keys if key.startswith(f"{layer}.weight.")}
    if state:
        tensors = {suffix: file.get_tensor(key) for suffix, key in state.items()}
        quant_state = QuantState.from_dict(tensors, device=torch.device("cpu"))
        return quant_state.quant_type, dequantize_4bit(weight, quant_state).float()
    if f"{layer}.weight_scale" in keys:
        scale = file.get_tensor(f"{layer}.weight_scale")
        return str(weight.dtype).removeprefix("torch."), weight.float() * scale
    return None


def main(source_path: str, converted_path: str) -> None:
    table = Table("layer", "format", "relative error", box=None)
    with safe_open(source_path, "pt") as source, safe_open(converted_path, "pt") as converted:
        keys = set(converted.keys())
        for layer in sorted(key.removesuffix(".weight") for key in keys if key.endswith(".weight")):
            decoded = decode(converted, layer, keys)
            original = source.get_tensor(f"{layer}.weight").float()
            if decoded is None:
                same = torch.equal(converted.get_tensor(f"{layer}.weight").float(), original)
                table.add_row(layer, "copied", "0" if same else "DIFFERS")
                continue
            name, weight = decoded
            table.add_row(layer, name, f"{(weight - original).norm() / original.norm():.4f}")
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
