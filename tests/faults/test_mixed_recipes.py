"""Any checkpoint, any recipe: a refusal that leaves nothing behind, or a file that is right in every weight."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import safetensors
import torch
from error_bounds import violations
from faults.record import record
from hypothesis import HealthCheck, event, given, note, settings
from random_sources import FLOAT8, FLOATS, Case, cases, empty, made, numbers
from small_checkpoints import Tensor, load, save

from streamquant import budget, errors
from streamquant.formats import FORMATS
from streamquant.report import LayerResult, Report
from streamquant.transcode import convert
from streamquant.verify import verify

LONG_EXAMPLES = 5000
REFUSALS = (
    errors.UsageError, errors.PatternError, errors.NothingToConvertError, errors.BudgetError, errors.NonFiniteError,
    errors.CheckpointError,
)  # fmt: skip
QUANTIZED_BY = {"F8_E4M3", "F8_E5M2", "I8", "nf4", "fp4"}
NEAR_THE_END = 3e37  # of float32: what is rotated, or whose absmax takes 8 bits, may not be held from here on
ROUNDED = ("nearest", "searched scales", "")


def outcome(case: Case, folder: Path) -> str:
    """Convert and check everything; says what became of it."""
    tensors = {name: kind.made() for name, kind in case.tensors.items()}
    source = save(folder / "source" / "m.safetensors", tensors)
    out = folder / "out"
    out.mkdir()
    try:
        recipe = made(case.recipe)
        report = convert(source, out / "o.safetensors", recipe, **case.options)
    except errors.StreamquantError as error:
        assert isinstance(error, REFUSALS), f"{type(error).__name__}: {error}"
        assert empty(out), f"left behind: {list(out.iterdir())}"
        if isinstance(error, errors.NonFiniteError):
            _expect_something_not_finite(case, tensors, str(error))
        return type(error).__name__
    note(f"converted: {[(layer.key, layer.format, layer.parameters) for layer in report.layers]}")
    damaged = _damaged(tensors) if recipe.allow_nonfinite else set()
    _check_layers(tensors, report, damaged)
    verdict = verify(source, report.outputs[-1])
    assert not [finding for finding in verdict.findings if finding.tensor not in damaged], verdict.findings
    return "converted"


def _damaged(tensors: dict[str, Tensor]) -> set[str]:
    """What is converted only because it was asked for all the same: verify calls it unsound, and should."""
    floating = {name: numbers(tensor) for name, tensor in tensors.items() if tensor.dtype in (*FLOATS, *FLOAT8)}
    return {name for name, values in floating.items() if not (np.abs(values) < NEAR_THE_END).all()}


def _expect_something_not_finite(case: Case, tensors: dict[str, Tensor], message: str) -> None:
    """A NaN, an infinity, or what float32 or the dtype of the cast cannot hold; rotated it may be that from half on."""
    assert not case.recipe["allow_nonfinite"]
    named = next(tensor for name, tensor in sorted(tensors.items(), key=lambda item: -len(item[0])) if name in message)
    limit = 65504 if case.recipe["cast"] == "F16" else NEAR_THE_END
    values = numbers(named)
    assert not np.isfinite(values).all() or np.abs(values).max() > limit, message


def _read(report: Report) -> dict[str, Tensor]:
    """Every tensor, by the official parser as well as by our own means."""
    found: dict[str, Tensor] = {}
    for path in report.outputs:
        if path.name.endswith(".json"):
            continue
        official = dict(safetensors.deserialize(path.read_bytes()))
        ours = load(path)
        assert official.keys() == ours.keys()
        for name, tensor in ours.items():
            theirs = official[name]
            assert (theirs["dtype"], tuple(theirs["shape"]), bytes(theirs["data"])) == tensor
        found |= ours
    return found


def _check_layers(tensors: dict[str, Tensor], report: Report, damaged: set[str]) -> None:
    found = _read(report)
    assert {layer.key for layer in report.layers} | report.removed.keys() == tensors.keys()
    for layer in report.layers:
        before = tensors[layer.key]
        if layer.format == "copy":
            assert found[layer.key] == before, layer.key
        elif layer.format == "cast":
            _check_cast(before, found[layer.key], layer.key)
        else:
            _check_quantized(before, found, layer, layer.key in damaged)


def _check_cast(before: Tensor, after: Tensor, key: str) -> None:
    with np.errstate(over="ignore"):
        exact, cast = numbers(before).astype(np.float32).astype(np.float64), numbers(after)
    bits, smallest = {"BF16": (8, 2.0**-134), "F16": (11, 2.0**-25)}[after.dtype]
    there = np.isfinite(exact) & np.isfinite(cast)
    off = np.abs(cast[there] - exact[there])
    assert (off <= np.maximum(np.abs(exact[there]) * 2.0**-bits, smallest)).all(), key


def _check_quantized(before: Tensor, found: dict[str, Tensor], layer: LayerResult, damaged: bool) -> None:
    name = layer.key.removesuffix(".weight")
    own = {key.removeprefix(f"{name}."): _torch(tensor) for key, tensor in found.items() if key.startswith(f"{name}.")}
    layout = FORMATS[layer.format](**layer.parameters)
    decoded = layout.decode(own, torch.float32).double().numpy()
    with np.errstate(over="ignore"):
        exact = numbers(before).astype(np.float32).astype(np.float64).reshape(before.shape)
    if layer.knowledge not in ROUNDED:
        return  # learned codes are not the nearest ones: verify judges them
    facts = {"rotation": layer.parameters.get("convrot_group_size", 0)}
    kind = found[layer.key].dtype
    if hasattr(layout, "book"):
        kind = layout.book
        facts |= {"block_size": layout.block_size, "absmax": _absmax(own), "nested": None}
        if layout.double_quant and damaged:
            return  # as in bitsandbytes, one NaN spoils the scales of 256 blocks
        if layout.double_quant:
            facts["nested"] = own["weight.nested_absmax"].numpy()
    assert kind in QUANTIZED_BY
    # Beside a 4-bit layer a tensor of this name is the source's own.
    scales = {} if hasattr(layout, "book") else {"weight_scale": own["weight_scale"].numpy()}
    wrong = violations(exact, decoded, scales, kind, **facts)
    assert not wrong.size, (layer, wrong[:5], exact.reshape(-1)[wrong[:5]], decoded.reshape(-1)[wrong[:5]])


def _absmax(own: dict[str, torch.Tensor]) -> np.ndarray:
    """What a reader makes of absmax."""
    if "weight.nested_absmax" not in own:
        return own["weight.absmax"].numpy()
    state = json.loads(bytes(next(part for suffix, part in own.items() if "quant_state" in suffix).tolist()))
    codes = own["weight.absmax"].long()
    nested = own["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: codes.numel()]
    return (own["weight.nested_quant_map"][codes] * nested + state["nested_offset"]).numpy()


def _torch(tensor: Tensor) -> torch.Tensor:
    dtypes = {
        "BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F64": torch.float64, "I8": torch.int8,
        "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }  # fmt: skip
    if tensor.dtype not in dtypes:
        return torch.empty(0)  # a tensor of the source beside the layer
    return torch.frombuffer(bytearray(tensor.data), dtype=dtypes[tensor.dtype]).reshape(tensor.shape) if tensor.data else torch.empty(tensor.shape)


def attempt(case: Case) -> str:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "TARGET_TILE_BYTES", case.tile_bytes)
        return outcome(case, Path(folder))


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(cases())
def test_a_refusal_or_a_sound_file(case):
    event(attempt(case))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_thousands_of_mixed_recipes():
    outcomes: Counter[str] = Counter()
    began = time.monotonic()

    @settings(max_examples=LONG_EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
    @given(cases())
    def run(case: Case) -> None:
        outcomes[attempt(case)] += 1

    run()
    detail = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    record("mixed recipes", sum(outcomes.values()), f"{detail}; {time.monotonic() - began:.0f} s")
