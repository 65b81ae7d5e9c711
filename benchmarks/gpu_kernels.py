"""The Triton kernels on a GPU, one layer in its memory: against the device's own copy and against other libraries.

    python -m benchmarks kernels --device cuda --rows 6144 --columns 36864

An operation's bytes are what it must read and write, each once. Beside it runs torch's `copy_` of as many bytes (half
of them read, half written): the bandwidth that the device really has. Times are the device's own, by its events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import click
import numpy as np
import torch
from rich.console import Console

from benchmarks import machine, results
from benchmarks.results import OURS, Result
from benchmarks.turns import take_turns
from streamquant.kernels import gpu
from streamquant.kernels.codebooks import CODE_BOOKS, DYNAMIC_MAP

BENCHMARK = "kernels"
COPY = "torch copy_"
BLOCK_SIZE, BOOK_BLOCK_SIZE, GROUP_SIZE, RANK = 128, 64, 256, 64
BF16, F32 = torch.bfloat16, torch.float32

Run = Callable[[], object]
Entry = tuple[str, Callable[[], Run]]  # a contender's name, and what imports and prepares it


@dataclass(frozen=True)
class Operation:
    """What is timed: its name, the bytes it must move (None: it is bound by something else), and who does it."""

    name: str
    moved_bytes: int | None
    entries: Sequence[Entry]


def run(
    console: Console,
    rows: int,
    columns: int,
    runs: int,
    device: str = "cuda",
    only: str = "",
    record: Callable[[Sequence[Result]], None] = results.append,
) -> list[Result]:
    """Time every operation whose name contains `only` on a weight [rows, columns]; record the rows and return them.

    128 must divide both, 256 the columns. device "cpu" is for Triton's interpreter.
    """
    if device != "cpu" and (reason := gpu.why_not(device)):
        raise click.ClickException(f"The GPU kernels cannot be timed: {reason}.")
    if rows % BLOCK_SIZE or columns % GROUP_SIZE:
        raise click.ClickException(f"{rows} x {columns}: rows must be a multiple of {BLOCK_SIZE}, columns of {GROUP_SIZE}.")
    found = []
    for operation in operations(rows, columns, device):
        if only in operation.name:
            timed = _timed(operation, f"{rows}x{columns}", runs, device, console)
            record(timed)
            found += timed
    console.print(results.table(found))
    return found


def operations(rows: int, columns: int, device: str) -> Iterator[Operation]:
    """Every operation, its data made when it comes to its turn."""
    weight = torch.randn(rows, columns, generator=torch.Generator(device).manual_seed(0), device=device).mul_(0.02).to(BF16)
    yield from _scaled_encoding(weight)
    yield from _book_encoding(weight)
    yield from _rotation(weight)
    yield from _scaled_decoding(weight)
    yield from _book_decoding(weight)
    yield from refinements(weight.float())


def _scaled_encoding(weight: torch.Tensor) -> Iterator[Operation]:
    from streamquant.kernels.gpu import absmax, fp8, int8

    elements, rows = weight.numel(), len(weight)
    encoded, row_scales, block_scales = 3 * elements, 4 * rows, 4 * elements // BLOCK_SIZE**2
    scale = weight.abs().amax().float().view(1) / 448
    flat, name = weight.view(1, -1), f"comfy-kitchen {machine.installed('comfy-kitchen')}"

    def kitchen(operation: str, *arguments: object) -> Callable[[], Run]:
        def load() -> Run:
            import comfy_kitchen

            return partial(getattr(comfy_kitchen, operation), weight, *arguments)

        return load

    def ours(function: Callable[..., object], *arguments: object) -> Entry:
        return OURS, lambda: partial(function, *arguments)

    yield Operation("absmax of rows", 2 * elements + row_scales, [ours(absmax.group_absmax, weight)])
    yield Operation(
        "encode fp8 tensor",
        encoded,
        [ours(fp8.encode, flat, 1 / scale, "e4m3"), (name, kitchen("quantize_per_tensor_fp8", scale))],
    )
    yield Operation("encode fp8 tensor, measured", encoded, [ours(fp8.encode, flat, 1 / scale, "e4m3", scale)])
    yield Operation("encode fp8 rows", encoded + row_scales, [ours(fp8.encode_rows, weight, "e4m3")])
    yield Operation("encode fp8 blocks", encoded + block_scales, [ours(fp8.encode_blocks, weight, BLOCK_SIZE, "e4m3")])
    scale = weight.abs().amax().float() / 127
    yield Operation(
        "encode int8 tensor",
        encoded,
        [ours(int8.encode, flat, scale.view(1)), (name, kitchen("quantize_int8_tensorwise", scale))],
    )
    yield Operation(
        "encode int8 rows",
        encoded + row_scales,
        [ours(int8.encode_rows, weight), (name, kitchen("quantize_int8_rowwise"))],
    )
    yield Operation("encode int8 blocks", encoded + block_scales, [ours(int8.encode_blocks, weight, BLOCK_SIZE)])


def _book_encoding(weight: torch.Tensor) -> Iterator[Operation]:
    from streamquant.kernels.gpu import bnb4

    def theirs(book: str) -> Run:
        from bitsandbytes.functional import quantize_4bit

        return partial(quantize_4bit, weight, blocksize=BOOK_BLOCK_SIZE, quant_type=book)

    flat, elements = weight.view(-1), weight.numel()
    moved, name = 2 * elements + elements // 2 + 4 * elements // BOOK_BLOCK_SIZE, _bitsandbytes()
    for book in ("nf4", "fp4"):
        entries = [(OURS, lambda book=book: partial(bnb4.encode, flat, BOOK_BLOCK_SIZE, book)), (name, partial(theirs, book))]
        yield Operation(f"encode {book}", moved, entries)
        yield Operation(
            f"encode {book}, measured",
            moved,
            [(OURS, lambda book=book: partial(bnb4.encode, flat, BOOK_BLOCK_SIZE, book, measure=True))],
        )


def _rotation(weight: torch.Tensor) -> Iterator[Operation]:
    from streamquant.kernels.gpu import hadamard

    elements = weight.numel()
    yield Operation("rotate", 6 * elements, [(OURS, lambda: partial(hadamard.rotate, weight, GROUP_SIZE))])
    yield Operation(
        "rotate and encode int8 rows",
        3 * elements + 4 * len(weight),
        [(OURS, lambda: partial(hadamard.encode_rows, weight, GROUP_SIZE))],
    )


def _scaled_decoding(weight: torch.Tensor) -> Iterator[Operation]:
    from streamquant.kernels.gpu import dequantize, fp8, int8

    elements, name = weight.numel(), f"comfy-kitchen {machine.installed('comfy-kitchen')}"

    def kitchen(operation: str, *arguments: object) -> Run:
        import comfy_kitchen

        return partial(getattr(comfy_kitchen, operation), *arguments)

    for grid in ("fp8", "int8"):
        by_row = fp8.encode_rows(weight, "e4m3") if grid == "fp8" else int8.encode_rows(weight)
        by_block = fp8.encode_blocks(weight, BLOCK_SIZE, "e4m3") if grid == "fp8" else int8.encode_blocks(weight, BLOCK_SIZE)
        decode_rows = partial(dequantize.decode_groups, *by_row[:2], BF16)
        decode_blocks = partial(dequantize.decode_blocks, *by_block[:2], BLOCK_SIZE, BF16)
        entries: list[Entry] = [(OURS, lambda decode=decode_rows: decode)]
        if grid == "int8":
            entries.append((name, partial(kitchen, "dequantize_int8_simple", by_row[0], by_row[1][:, None])))
        yield Operation(f"decode {grid} rows", 3 * elements + by_row[1].nbytes, entries)
        yield Operation(
            f"decode {grid} blocks", 3 * elements + by_block[1].nbytes, [(OURS, lambda decode=decode_blocks: decode)]
        )
        if grid == "fp8":
            codes, scale = by_row[0], by_row[1][:1].contiguous()
            decode_tensor = partial(dequantize.decode_groups, codes.view(1, -1), scale, BF16)
            theirs = partial(kitchen, "dequantize_per_tensor_fp8", codes, scale)
            yield Operation(
                "decode fp8 tensor", 3 * elements, [(OURS, lambda decode=decode_tensor: decode), (name, theirs)]
            )


def _book_decoding(weight: torch.Tensor) -> Iterator[Operation]:
    from streamquant.kernels.gpu import bnb4, dequantize

    elements, shape, device = weight.numel(), weight.shape, weight.device
    moved, blocks = 2 * elements + elements // 2, elements // BOOK_BLOCK_SIZE
    nested_map, name = torch.from_numpy(DYNAMIC_MAP).to(device), _bitsandbytes()

    def theirs(book: str, packed: torch.Tensor, absmax: torch.Tensor, nested: dequantize.Nested | None) -> Run:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        code, inner = torch.from_numpy(CODE_BOOKS[book]).to(device), {}
        if nested is not None:
            state = QuantState(nested.absmax, code=nested.map, blocksize=nested.block_size, dtype=F32)
            inner = {"offset": torch.tensor(nested.offset, device=device), "state2": state}
        state = QuantState(absmax, shape, code, BOOK_BLOCK_SIZE, book, BF16, **inner)
        return partial(dequantize_4bit, packed.view(-1, 1), state)

    for book in ("nf4", "fp4"):
        packed, absmax = bnb4.encode(weight.view(-1), BOOK_BLOCK_SIZE, book)
        values = torch.from_numpy(CODE_BOOKS[book]).to(device)
        decode = partial(dequantize.decode_4bit, packed, absmax, BOOK_BLOCK_SIZE, values, elements, BF16)
        entries = [(OURS, lambda decode=decode: decode), (name, partial(theirs, book, packed, absmax, None))]
        yield Operation(f"decode {book}", moved + 4 * blocks, entries)
        if book == "nf4":
            # Codes of the middle of the map stand for any: the time does not depend on them.
            codes = torch.full((blocks,), 200, dtype=torch.uint8, device=device)
            nested = dequantize.Nested(torch.ones(-(-blocks // 256), device=device), nested_map, 256, 0.03)
            decode = partial(dequantize.decode_4bit, packed, codes, BOOK_BLOCK_SIZE, values, elements, BF16, nested)
            entries = [(OURS, lambda decode=decode: decode), (name, partial(theirs, book, packed, codes, nested))]
            yield Operation("decode nf4, double quantization", moved + blocks + nested.absmax.nbytes, entries)


def refinements(weight: torch.Tensor) -> Iterator[Operation]:
    """Learned rounding of a float32 layer, H of rank 64 in act-order: bound by columns that wait for one another."""
    from streamquant.kernels.feedback import low_rank_feedback
    from streamquant.kernels.gpu.refine import refine

    columns, random = weight.shape[1], np.random.default_rng(0)
    vectors = random.standard_normal((columns, RANK)) / np.arange(1, RANK + 1)
    diagonal = np.exp(random.standard_normal(columns))
    feedback = low_rank_feedback(diagonal, vectors, np.argsort(-diagonal - np.square(vectors).sum(1), kind="stable"))
    absmax = weight.abs().amax(dim=1, keepdim=True)
    whole = torch.zeros(columns, dtype=torch.int64, device=weight.device)
    for grid, largest in (("int8", 127.0), ("e4m3", 448.0), ("nf4", 1.0)):
        refined = partial(refine, weight, absmax / largest, whole, feedback, grid)
        yield Operation(f"refine {grid} rows, k = {RANK}", None, [(OURS, lambda refined=refined: refined)])
    swept = partial(refine, weight, absmax / 127, whole, feedback, "int8", sweeps=2)
    yield Operation(f"refine int8 rows, k = {RANK}, 2 sweeps", None, [(OURS, lambda: swept)])


def _bitsandbytes() -> str:
    return f"bitsandbytes {machine.installed('bitsandbytes')}"


def _copy(moved_bytes: int, device: str) -> Run:
    source = torch.zeros(moved_bytes // 2, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def _timed(operation: Operation, shape: str, runs: int, device: str, console: Console) -> list[Result]:
    entries = list(operation.entries)
    if operation.moved_bytes is not None:
        entries.insert(0, (COPY, partial(_copy, operation.moved_bytes, device)))
    return take_turns(
        BENCHMARK, f"{operation.name} {shape}", entries, lambda function: function(), partial(_seconds, device=device), runs,
        console, size_bytes=operation.moved_bytes, device="cpu" if device == "cpu" else torch.cuda.get_device_name(device),
    )  # fmt: skip


def _seconds(function: Run, device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        function()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    began.record()
    function()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000
