"""The conversions that are measured, and what each contender calls them on its command line."""

from __future__ import annotations

from dataclasses import dataclass

_HEADLINE_LAYERS = "img_in|txt_in|final_layer"


@dataclass(frozen=True)
class Case:
    """One conversion: our flags, and the flags of convert-to-quant that ask for the same, None where it cannot."""

    name: str
    ours: tuple[str, ...]
    peer: tuple[str, ...] | None = None


def _scaled(kind: str, mode: str) -> Case:
    block = ("--block_size", "128") if mode == "block" else ()
    # FP8 is what the peer writes when nothing else is asked for.
    peer_kind = ("--int8",) if kind == "int8" else ()
    return Case(
        name=f"{kind}-{mode}",
        # The peer is asked for --simple, which is bare absmax: so are we.
        ours=(f"--{kind}", "--scaling-mode", mode, "--rtn"),
        peer=(*peer_kind, "--scaling_mode", mode, *block),
    )


_MIXED = ("--custom-layers", _HEADLINE_LAYERS, "--custom-type", "fp8")
# What this project is for; nobody else writes it, so it has no peer.
_HEADLINE = Case("headline", ours=("--bnb-4bit", *_MIXED, "--comfy-quant"))
_HEADLINE_RTN = Case("headline-rtn", ours=(*_HEADLINE.ours, "--rtn"))
_INT8_FP8 = Case(
    # INT8 rows with the layers at both ends in FP8. The peer needs to be told twice to keep it simple, and to scale
    # the FP8 layers by tensor, or it learns their rounding for hours and writes what ComfyUI cannot load.
    "int8-fp8",
    ours=("--int8", *_MIXED, "--rtn"),
    peer=("--int8", "--scaling_mode", "row", *_MIXED, "--custom-simple", "--custom-scaling-mode", "tensor"),
)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *(_scaled(kind, mode) for kind in ("fp8", "int8") for mode in ("tensor", "row", "block")),
        Case("nf4", ("--bnb-4bit", "--rtn")),
        Case("nf4-double", ("--bnb-4bit", "--bnb-double-quant", "--rtn")),
        # As they come, without --rtn: rows are rotated and scales are searched where that lowers the error.
        Case("int8-default", ("--int8",)),
        Case("nf4-default", ("--bnb-4bit",)),
        _HEADLINE,
        _HEADLINE_RTN,
        _INT8_FP8,
    )
}


def choose(names: str) -> list[Case]:
    """Return the cases of a comma-separated list, in its order."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in CASES]
    if unknown:
        raise ValueError(f"no such case: {', '.join(unknown)}. There are: {', '.join(CASES)}")
    return [CASES[name] for name in chosen]
