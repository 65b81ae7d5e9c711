"""What the config.json beside a diffusers or transformers checkpoint says of its quantization, and whether it is so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamquant.checkpoint.header import printable
from streamquant.checkpoint.json_text import load_json
from streamquant.checkpoint.reader import Checkpoint

from .contents import StoredLayer

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 10_000_000
# Names that these libraries give to a checkpoint: a config.json beside any other file is not about it.
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
# Layers that bitsandbytes writes.
BNB_4BIT, BNB_8BIT = ("bnb_nf4", "bnb_fp4", "bnb_4bit"), ("bnb_int8",)


@dataclass(frozen=True)
class QuantizationConfig:
    """said: in words, "" where it says nothing. faults: where the tensors are not what it says, each a clause."""

    said: str
    faults: tuple[str, ...]


def quantization_config(checkpoint: Checkpoint, layers: Iterable[StoredLayer]) -> QuantizationConfig | None:
    """Read and check the config.json of a checkpoint; None where it has none."""
    first = checkpoint.files[0].path
    path = first.parent / CONFIG_NAME
    if not first.name.startswith(STEMS) or not path.is_file():
        return None
    layers = list(layers)
    try:
        document = load_json(_text(path))
    except (OSError, ValueError):
        return QuantizationConfig("", ("its config.json cannot be read as JSON",))
    if not isinstance(document, dict):
        return QuantizationConfig("", ("its config.json is no JSON object",))
    config = document.get("quantization_config")
    written = [layer for layer in layers if layer.format in (*BNB_4BIT, *BNB_8BIT)]
    if not isinstance(config, dict):
        fault = "its config.json has no quantization_config, so that diffusers and transformers load its codes as weights"
        return QuantizationConfig("", (fault,)) if written else None
    return QuantizationConfig(_said(config), tuple(_faults(config, layers)))


def _text(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_CONFIG_BYTES)


def _said(config: dict[str, Any]) -> str:
    method = printable(str(config.get("quant_method", "?")), 40)
    if method != "bitsandbytes":
        return method
    if config.get("load_in_8bit"):
        return "bitsandbytes 8-bit"
    if not config.get("load_in_4bit"):
        return "bitsandbytes, neither 4-bit nor 8-bit"
    words = [f"bitsandbytes 4-bit {printable(str(config.get('bnb_4bit_quant_type', 'fp4')), 20)}"]
    words += ["absmax in 8 bits"] if config.get("bnb_4bit_use_double_quant") else []
    if dtype := config.get("bnb_4bit_compute_dtype"):
        words.append(f"computes in {printable(str(dtype), 20)}")
    return ", ".join(words)


def _faults(config: dict[str, Any], layers: list[StoredLayer]) -> Iterable[str]:
    if config.get("quant_method") != "bitsandbytes":
        return
    four, eight = ([layer for layer in layers if layer.format in formats] for formats in (BNB_4BIT, BNB_8BIT))
    if config.get("load_in_8bit"):
        if not eight:
            yield "its config.json says bitsandbytes 8-bit, and no layer of it is"
        if four:
            yield f"its config.json says bitsandbytes 8-bit, and {len(four):,} of its layers are 4-bit"
    elif config.get("load_in_4bit"):
        book = str(config.get("bnb_4bit_quant_type", "fp4"))  # bitsandbytes' own default
        if not four:
            yield "its config.json says bitsandbytes 4-bit, and no layer of it is"
        if other := [layer for layer in four if layer.format not in (f"bnb_{book}", "bnb_4bit")]:
            yield f"its config.json says {printable(book, 20)}, and {len(other):,} of its layers are {other[0].format}"
        if eight:
            yield f"its config.json says bitsandbytes 4-bit, and {len(eight):,} of its layers are 8-bit"
        double = bool(config.get("bnb_4bit_use_double_quant"))
        nested = [layer for layer in four if "weight.nested_absmax" in layer.tensors]
        if double and four and len(nested) < len(four):
            yield f"its config.json says absmax in 8 bits, and {len(four) - len(nested):,} of its layers have it in F32"
        if not double and nested:
            yield f"its config.json says nothing of absmax in 8 bits, and {len(nested):,} of its layers have it so"
