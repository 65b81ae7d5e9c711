"""Layers in the layouts of other tools, which are named but not decoded."""

from __future__ import annotations

from collections.abc import Iterable

NUNCHAKU = "nunchaku SVDQuant"  # whose codes have the name of GPTQ's
# Last part of a key -> whose it is. Only names that no plain model uses.
ENDINGS = {
    "qweight": "GPTQ or AWQ",
    "wscales": NUNCHAKU,
    "weight_packed": "compressed-tensors",
    "_data": "optimum-quanto",
    "_weight_qdata": "torchao",
    "_weight_int_data": "torchao",
    "weight_s_rel": "ComfyUI's asym_w4a8_int8",
    "weight_zeros": "ComfyUI's awq_w4a16",
}


def layer_of(name: str) -> str:
    """The layer that a tensor of such a layout belongs to, by its name."""
    return name.rpartition(".")[0].removesuffix("._data").removesuffix(".weight")


def foreign_layers(names: Iterable[str]) -> dict[str, str]:
    """Tensor name -> the tool in whose layout it is."""
    found = {}
    for name in names:
        # optimum-quanto's 4-bit codes lie one level deeper: a.weight._data._data
        ending = name.rsplit(".", 1)[-1].rsplit(":", 1)[-1]
        if ending in ENDINGS:
            found[name] = ENDINGS[ending]
    nunchaku = {layer_of(name) for name, tool in found.items() if tool == NUNCHAKU}
    return {name: NUNCHAKU if layer_of(name) in nunchaku else tool for name, tool in found.items()}
