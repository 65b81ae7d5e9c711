"""Throughput of decoding alone: a weight in memory back to BF16, as a loader does it every time a layer is used.

Sizes and bytes per second are those of the decoded weight. `streamquant` is what the ComfyUI nodes call: the fastest way
that is right on the device. Beside it stand its plain torch path, bitsandbytes, and comfy-kitchen for the formats it has;
on a CPU also other libraries, in processes of their own (`benchmarks.rivals`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import results
from benchmarks.machine import installed
from benchmarks.results import OURS, Result
from benchmarks.rivals import Crew, Remote
from benchmarks.turns import take_turns
from streamquant.formats import fp8, int8
from streamquant.kernels import bnb4
from streamquant.kernels import fp8 as fp8_kernels
from streamquant.kernels import int8 as int8_kernels
from streamquant.kernels.codebooks import CODE_BOOKS, DYNAMIC_MAP

BENCHMARK = "decode"
BLOCK = 64
FORMATS = ("nf4", "fp4", "nf4-double", "fp8-tensor", "fp8-row", "fp8-block", "int8-row", "int8-block")

Decode = Callable[[], torch.Tensor]
Entry = tuple[str, Callable[[], Decode]]


def contenders(operation: str, weight: torch.Tensor) -> list[Entry]:
    """Who decodes a format, by name, each behind a function that makes its packed weight on the device of `weight`."""
    if operation in ("nf4", "fp4", "nf4-double"):
        return [
            (f"bitsandbytes {installed('bitsandbytes')}", lambda: _bitsandbytes(operation, weight)),
            ("plain torch", lambda: _four_bit(operation, weight, plain=True)),
            (OURS, lambda: _four_bit(operation, weight, plain=False)),
        ]
    entries: list[Entry] = [
        ("plain torch", lambda: _scaled(operation, weight, plain=True)),
        (OURS, lambda: _scaled(operation, weight, plain=False)),
    ]
    if operation in ("fp8-tensor", "int8-row"):
        # The nodes leave these to comfy-kitchen.
        entries = [(f"comfy-kitchen {installed('comfy-kitchen')}", lambda: _kitchen(operation, weight)), entries[0]]
    return entries


def _bitsandbytes(operation: str, weight: torch.Tensor) -> Decode:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    book, _, nested = operation.partition("-")
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type=book, compress_statistics=bool(nested))
    return lambda: dequantize_4bit(packed, state)


def _four_bit(operation: str, weight: torch.Tensor, plain: bool) -> Decode:
    from comfyui_quantops import decode
    from comfyui_quantops.layouts import Bnb4bitLayout

    book, _, nested = operation.partition("-")
    device = weight.device
    packed, absmax = bnb4.encode(weight.reshape(-1), BLOCK, book)
    fields = {}
    if nested:
        from streamquant.formats.bnb4 import NESTED_BLOCK_SIZE, encode_dynamic

        offset = absmax.mean().item()
        codes, nested_absmax = encode_dynamic((absmax - offset).cpu().numpy())
        fields = {
            "nested_scale": torch.from_numpy(nested_absmax).to(device),
            "nested_code": torch.from_numpy(DYNAMIC_MAP).to(device),
            "nested_offset": offset,
            "nested_block_size": NESTED_BLOCK_SIZE,
        }
        absmax = torch.from_numpy(codes).to(device)
    params = Bnb4bitLayout.Params(
        scale=absmax, orig_dtype=weight.dtype, orig_shape=tuple(weight.shape),
        code=torch.from_numpy(CODE_BOOKS[book]).to(device), block_size=BLOCK, book=book, **fields,
    )  # fmt: skip
    if plain:
        return lambda: decode.decode_4bit_in_torch(packed, params, weight.numel()).view(weight.shape)
    return lambda: decode.decode_4bit(packed, params)


def _layout(operation: str) -> tuple[fp8.Float8TensorWise | int8.Int8TensorWise, int]:
    """The format and the edge of its blocks, 0 where it has none."""
    return {
        "fp8-tensor": (fp8.Float8TensorWise(), 0),
        "fp8-row": (fp8.Float8RowWise(), 0),
        "fp8-block": (fp8.Float8BlockWise(), 128),
        "int8-row": (int8.Int8TensorWise(), 0),
        "int8-block": (int8.Int8BlockWise(), 128),
    }[operation]


def _packed(operation: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales in the shapes of the format."""
    layout, size = _layout(operation)
    shape = tuple(weight.shape)
    group = layout.geometry(shape).group or weight.numel()
    groups = weight.float().view(-1, group)
    absmax = groups.abs().amax(1)
    if size:
        across = shape[1] // size
        absmax = absmax.view(-1, size, across).amax(1)
        scale = absmax / (448 if operation.startswith("fp8") else 127)
        spread = scale.unsqueeze(1).expand(-1, size, -1).reshape(-1)
    else:
        scale = spread = absmax / (448 if operation.startswith("fp8") else 127)
    if operation.startswith("fp8"):
        codes = fp8_kernels.encode(groups, 1 / spread, "e4m3")
    else:
        codes = int8_kernels.encode(groups, spread)
    return codes.view(shape), scale.view(layout.scale_shape(shape))


def _scaled(operation: str, weight: torch.Tensor, plain: bool) -> Decode:
    from comfyui_quantops import decode

    layout, _ = _layout(operation)
    codes, scale = _packed(operation, weight)
    if plain:
        return lambda: layout.decode({"weight": codes, "weight_scale": scale}, weight.dtype)
    return lambda: decode.decode_scaled(codes, scale, layout, weight.dtype)


def _kitchen(operation: str, weight: torch.Tensor) -> Decode:
    from comfy_kitchen.tensor import TensorCoreFP8Layout, TensorWiseINT8Layout

    codes, scale = _packed(operation, weight)
    layout = TensorCoreFP8Layout if operation == "fp8-tensor" else TensorWiseINT8Layout
    params = layout.Params(scale=scale, orig_dtype=weight.dtype, orig_shape=tuple(weight.shape))
    return lambda: layout.dequantize(codes, params)


def devices() -> list[str]:
    """Where decoding can be measured here."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def run(
    console: Console,
    shape: tuple[int, int] = (6144, 6144),
    runs: int = 5,
    threads: int | None = None,
    operations: Sequence[str] = FORMATS,
    find: Callable[[str, torch.Tensor], Sequence[Entry]] = contenders,
    record: Callable[[Sequence[Result]], None] = results.append,
    workdir: Path | None = None,
) -> list[Result]:
    """Time every contender of every format on a BF16 weight of `shape`, on each device; record the rows and return them.

    threads: of the CPU; None takes torch's own number. workdir: where the other libraries' environments are; None leaves
    them out.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    rows: list[Result] = []
    with Crew(weight, workdir or Path(), torch.get_num_threads()) as crew:
        for device in devices():
            there = weight.to(device)
            for operation in operations:
                entries = list(find(operation, there))
                if workdir is not None and device == "cpu":
                    known = {name for name, _ in entries}
                    entries += [entry for entry in crew.entries(operation, decodes=True) if entry[0] not in known]
                where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
                case = f"{operation} {shape[0]}x{shape[1]} to bf16, {where}"
                with torch.inference_mode():
                    found = take_turns(
                        BENCHMARK, case, entries, partial(_try_out, weight=there), partial(_seconds, device=device), runs,
                        console, size_bytes=there.nbytes, device=device,
                    )  # fmt: skip
                record(found)
                rows += found
    console.print(results.table(rows))
    return rows


def _try_out(decode: Decode, weight: torch.Tensor) -> None:
    """A wrong decoder takes no part."""
    error = ((decode().float() - weight.float()).norm() / weight.float().norm()).item()
    if error > 0.2:
        raise RuntimeError(f"decodes with a relative error of {error:.2f}")


def _seconds(decode: Decode | Remote, device: str) -> float:
    if isinstance(decode, Remote):
        return decode.seconds()
    _finish(device)
    began = time.perf_counter()
    decode()
    _finish(device)
    return time.perf_counter() - began


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
