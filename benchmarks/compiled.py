"""What the GPU kernels compile to, without a GPU: registers, spills and shared memory for every architecture.

    python -m benchmarks.compiled [--architecture 90] [--only fp8]

Every launcher is called with tensors that have a shape and no memory (torch's meta device), at the sizes of a Flux.2
layer; what it would have started is compiled for each architecture instead, by Triton and the ptxas that comes with it.
Nothing may spill. Results go to results/compiled.csv, which is written anew each time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from rich.table import Table

from benchmarks import records
from streamquant.kernels.feedback import BLOCK, Feedback
from streamquant.kernels.refined import GRIDS

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
PATH = Path(__file__).resolve().parent / "results" / "compiled.csv"
ROWS, COLUMNS = 6144, 36864  # the largest layer of Flux.2-dev
TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class SpillError(Exception):
    """A kernel needs more registers than there are."""


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher would have started it."""

    kernel: Any
    arguments: tuple[Any, ...]
    num_warps: int
    constants: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """One row: `spilled_bytes` is the stack frame of a thread, where ptxas puts what it has no register for."""

    kernel: str
    variant: str
    architecture: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    triton: str


def variants() -> dict[str, Callable[[], Any]]:
    """Calls of launchers by name: every kernel, with every branch that compiles to something else."""
    from streamquant.kernels.gpu import absmax, bnb4, book_search, dequantize, fp8, hadamard, int8, launch, scale_search
    from streamquant.kernels.gpu.refine import refine

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    bf16 = empty(torch.bfloat16, ROWS, COLUMNS)
    f16, f32 = empty(torch.float16, ROWS, COLUMNS), empty(torch.float32, ROWS, COLUMNS)
    narrow = empty(torch.bfloat16, ROWS, 6144)
    row_scales, one = empty(torch.float32, ROWS), empty(torch.float32, 1)
    groups, group_scales = bf16.view(-1, 128), empty(torch.float32, ROWS * COLUMNS // 128)
    calls: dict[str, Callable[[], Any]] = {}
    for grid in ("e4m3", "e5m2"):
        calls[f"fp8 {grid} tensor bf16"] = partial(fp8.encode, bf16.view(1, -1), one, grid)
        calls[f"fp8 {grid} rows bf16, fused"] = partial(fp8.encode_rows, narrow, grid)
    calls |= {
        "fp8 e4m3 tensor bf16, measured": partial(fp8.encode, bf16.view(1, -1), one, "e4m3", one),
        "fp8 e4m3 groups of 128 f16": partial(fp8.encode, f16.view(-1, 128), group_scales, "e4m3"),
        "fp8 e4m3 groups of 128 bf16, fused": partial(fp8.encode_rows, groups, "e4m3"),
        "fp8 e4m3 rows bf16, fused, measured": partial(fp8.encode_rows, narrow, "e4m3", True),
        "fp8 e4m3 rows f32, fused, wide": partial(fp8.encode_rows, f32, "e4m3"),
        "fp8 e4m3 rows bf16, fused, wide, measured": partial(fp8.encode_rows, bf16, "e4m3", True),
        "fp8 e4m3 blocks of 64 bf16, fused": partial(fp8.encode_blocks, bf16, 64, "e4m3"),
        "fp8 e4m3 blocks of 128 bf16, fused, measured": partial(fp8.encode_blocks, bf16, 128, "e4m3", True),
        "fp8 e4m3 blocks of 256 bf16, fused": partial(fp8.encode_blocks, bf16, 256, "e4m3"),
        "int8 tensor bf16": partial(int8.encode, bf16.view(1, -1), one),
        "int8 rows f32": partial(int8.encode, f32, row_scales),
        "int8 rows bf16, fused": partial(int8.encode_rows, narrow),
        "int8 rows f16, fused, wide": partial(int8.encode_rows, f16),
        "int8 rows bf16, fused, wide, measured": partial(int8.encode_rows, bf16, measure=True),
        "int8 blocks of 128 bf16, fused": partial(int8.encode_blocks, bf16, 128),
        "int8 blocks of 128 bf16, fused, measured": partial(int8.encode_blocks, bf16, 128, measure=True),
    }
    for book in ("nf4", "fp4"):
        calls[f"{book} blocks of 64 bf16"] = partial(bnb4.encode, bf16.view(-1), 64, book)
    calls |= {
        "nf4 blocks of 64 bf16, measured": partial(bnb4.encode, bf16.view(-1), 64, "nf4", True),
        "nf4 blocks of 64 bf16, given scales, measured": partial(
            bnb4.encode, bf16.view(-1), 64, "nf4", True, empty(torch.float32, ROWS * COLUMNS // 64)
        ),
        "nf4 blocks of 4096 f32, short last block": partial(bnb4.encode, f32.view(-1)[:-1], 4096, "nf4"),
    }
    for codes, name in ((torch.float8_e4m3fn, "fp8 e4m3"), (torch.float8_e5m2, "fp8 e5m2"), (torch.int8, "int8")):
        layer = empty(codes, ROWS, COLUMNS)
        calls |= {
            f"decode {name} rows to bf16": partial(dequantize.decode_groups, layer, row_scales, torch.bfloat16),
            f"decode {name} blocks of 128 to f16": partial(
                dequantize.decode_blocks, layer, empty(torch.float32, ROWS // 128, COLUMNS // 128), 128, torch.float16
            ),
        }
    elements = ROWS * COLUMNS
    packed, book = empty(torch.uint8, elements // 2), empty(torch.float32, 16)
    block_absmax = empty(torch.float32, elements // 64)
    nested = dequantize.Nested(empty(torch.float32, elements // 64 // 256), empty(torch.float32, 256), 256, 0.1)
    codes = empty(torch.uint8, elements // 64)
    calls |= {
        "decode nf4 to bf16": partial(dequantize.decode_4bit, packed, block_absmax, 64, book, elements, torch.bfloat16),
        "decode nf4 to f32": partial(dequantize.decode_4bit, packed, block_absmax, 64, book, elements, torch.float32),
        "decode nf4 double-quantized to f16": partial(
            dequantize.decode_4bit, packed, codes, 64, book, elements, torch.float16, nested
        ),
    }
    odd = empty(torch.bfloat16, ROWS - 1, COLUMNS - 1)
    longest = empty(torch.float32, ROWS, launch.RESIDENT_ELEMENTS)
    calls |= {
        "int8 rows bf16, fused, odd, measured": partial(int8.encode_rows, odd, measure=True),
        "fp8 e4m3 rows bf16, fused, odd, resident, measured": partial(
            fp8.encode_rows, odd[:, :4095].contiguous(), "e4m3", True
        ),
        "fp8 e4m3 rows f32, fused, longest resident, measured": partial(fp8.encode_rows, longest, "e4m3", True),
        "int8 rows f32, fused, longest resident, measured": partial(int8.encode_rows, longest, measure=True),
        "int8 blocks of 100 f32, fused, measured": partial(
            int8.encode_blocks, empty(torch.float32, 6100, 36800), 100, measure=True
        ),
        "fp8 e4m3 odd tensor bf16": partial(fp8.encode, odd.view(1, -1), one, "e4m3"),
        "decode int8 odd rows to bf16": partial(
            dequantize.decode_groups, empty(torch.int8, 101, 4095), empty(torch.float32, 101), torch.bfloat16
        ),
    }
    calls |= {
        "rotate groups of 256 bf16": partial(hadamard.rotate, bf16, 256),
        "rotate groups of 64 f32": partial(hadamard.rotate, f32, 64),
        "rotated int8 rows, groups of 256 bf16": partial(hadamard.encode_rows, narrow, 256, measure=True),
        "rotated int8 rows, groups of 256 bf16, wide": partial(hadamard.encode_rows, bf16, 256),
        "rotated int8 rows, groups of 256 f32, longest resident, measured": partial(
            hadamard.encode_rows, longest[:, : launch.RESIDENT_ELEMENTS // 2].contiguous(), 256, measure=True
        ),
        "rotated int8 rows, groups of 64 bf16": partial(hadamard.encode_rows, narrow[:, :3072].contiguous(), 64),
    }
    calls |= {
        "absmax of rows bf16": partial(absmax.group_absmax, bf16),
        "absmax of groups of 64 f32": partial(absmax.group_absmax, f32.view(-1, 64)),
        "absmax of a tensor, odd, bf16": partial(absmax.group_absmax, odd.view(1, -1)),
    }
    few, wide = _feedback(COLUMNS, 64, dense=False), _feedback(4096, 0, dense=True)
    for grid in GRIDS:
        # 4-bit scales change along a row; the others here do not.
        groups = COLUMNS // 64 if grid in ("nf4", "fp4") else 1
        scale, column_group = empty(torch.float32, ROWS, groups), empty(torch.int64, COLUMNS)
        calls[f"refined {grid} f32"] = partial(refine, f32, scale, column_group, few, grid, sweeps=1)
        scale, column_group = empty(torch.float32, ROWS, 1), empty(torch.int64, 4096)
        calls[f"refined {grid} f32, dense"] = partial(
            refine, f32[:, :4096].contiguous(), scale, column_group, wide, grid, sweeps=1
        )
    scale, column_group = empty(torch.float32, ROWS, 1), empty(torch.int64, COLUMNS)
    calls["refined int8 bf16, no sweeps"] = partial(refine, bf16, scale, column_group, few, "int8")
    odd_columns = empty(torch.int64, COLUMNS - 1)
    calls["refined nf4 bf16, odd"] = partial(
        refine, odd, empty(torch.float32, ROWS - 1, 577), odd_columns, _feedback(COLUMNS - 1, 72, dense=False), "nf4"
    )
    diagonal, cycle = empty(torch.float32, 1, COLUMNS), empty(torch.float32, COLUMNS // 64, 64)
    calls |= {
        "searched fp8 rows bf16": partial(scale_search.encode_rows, narrow),
        "searched fp8 rows f32, weighted, measured": partial(scale_search.encode_rows, f32, diagonal, True),
        "searched fp8 rows bf16, odd, weighted, measured": partial(
            scale_search.encode_rows, odd, empty(torch.float32, 1, COLUMNS - 1), True
        ),
        "searched fp8 groups of 64 bf16, weighted": partial(scale_search.encode_rows, bf16.view(-1, 64), cycle),
        "searched fp8 blocks of 64 bf16": partial(scale_search.encode_blocks, bf16, 64),
        "searched fp8 blocks of 64 f32, weighted, measured": partial(
            scale_search.encode_blocks, f32, 64, diagonal.view(-1), True
        ),
        "errors of fp8 runs of 64 bf16, weighted": partial(
            scale_search.e4m3_errors, bf16.view(-1), 64, empty(torch.float32, ROWS * COLUMNS // 64), cycle
        ),
        "errors of fp8 rows f32": partial(scale_search.e4m3_errors, f32.view(-1), COLUMNS, row_scales),
        "searched nf4 absmax of 64 bf16, weighted": partial(book_search.book_absmax, bf16.view(-1), 64, cycle, "nf4"),
        "searched nf4 blocks of 64 bf16": partial(book_search.pack, bf16.view(-1), 64, "nf4"),
        "searched nf4 blocks of 64 f32, weighted, measured": partial(book_search.pack, f32.view(-1), 64, "nf4", cycle, True),
        "searched fp4 blocks of 4096 f32, short last block": partial(book_search.pack, f32.view(-1)[:-1], 4096, "fp4"),
    }
    return calls


def _feedback(columns: int, rank: int, dense: bool) -> Feedback:
    """A feedback of the right shapes; what it says is nobody's concern."""
    padded = -(-columns // BLOCK) * BLOCK
    width = padded if dense else rank
    blocks = padded // BLOCK, BLOCK, BLOCK
    matrices = (np.ones(shape, np.float32) for shape in ((padded, width), (padded, width), blocks, blocks))
    return Feedback(dense, np.arange(columns), *matrices, *(np.ones(padded, np.float32) for _ in range(3)))


def launches(call: Callable[[], Any]) -> list[Launch]:
    """What a launcher would have started."""
    from streamquant.kernels.gpu import launch

    seen: list[Launch] = []

    def record(kernel: Any, programs: int, *arguments: Any, num_warps: int, **constants: Any) -> None:
        assert programs < 1 << 31, f"{programs} programs do not fit a grid"
        if programs:
            seen.append(Launch(kernel, arguments, num_warps, constants))

    with mock.patch.object(launch, "start", record):
        call()
    return seen


def compile_for(launch: Launch, variant: str, architecture: int) -> Compiled:
    """Compile one launch for sm_`architecture`, specialised as Triton would at run time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    signature = dict.fromkeys(launch.constants, "constexpr")
    constants: dict[Any, Any] = dict(launch.constants)
    attributes = {}
    for name, argument in zip(names, launch.arguments, strict=True):
        index = (launch.kernel.arg_names.index(name),)
        signature[name], is_aligned = _type_of(argument)
        if signature[name] == "constexpr":
            constants[name] = argument
        if is_aligned:
            attributes[index] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in launch.kernel.arg_names}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    name = launch.kernel.__name__
    shared = compiled.metadata.shared
    return Compiled(name, variant, f"sm_{architecture}", launch.num_warps, registers, stack, shared, triton.__version__)


def _type_of(argument: Any) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it may be taken for a multiple of 16."""
    if isinstance(argument, torch.Tensor):
        return "*" + TYPE_NAMES[argument.dtype], True  # torch's allocator aligns to far more
    if isinstance(argument, float):
        return "fp32", False
    if argument == 1:
        return "constexpr", False
    return ("i32" if argument < 1 << 31 else "i64"), argument % 16 == 0


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert usage, f"cuobjdump says nothing of registers: {text}"
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def read(path: Path = PATH) -> list[Compiled]:
    """The recorded rows."""
    return records.read(path, Compiled)


def table(rows: Sequence[Compiled]) -> Table:
    """Return `rows` as a table for a terminal."""
    grid = Table(*records.columns(Compiled), box=None)
    for row in rows:
        grid.add_row(*map(str, astuple(row)))
    return grid


def compile_variant(variant: str, call: Callable[[], Any], architectures: tuple[int, ...]) -> Iterator[Compiled]:
    """Compile all that one call starts; a spill is an error."""
    for launch in launches(call):
        for architecture in architectures:
            row = compile_for(launch, variant, architecture)
            if row.spilled_bytes:
                raise SpillError(f"{row.kernel} ({variant}) spills {row.spilled_bytes} bytes on {row.architecture}")
            yield row


@click.command(help=__doc__)
@click.option("--architecture", "architectures", type=int, multiple=True, default=ARCHITECTURES)
@click.option("--only", default="", help="Only variants whose name contains this; then nothing is written.")
def main(architectures: tuple[int, ...], only: str) -> None:
    rows = []
    for variant, call in variants().items():
        if only in variant:
            for row in compile_variant(variant, call, architectures):
                rows.append(row)
                click.echo(
                    f"{row.kernel:24} {variant:48} {row.architecture:6} {row.warps:2} warps  "
                    f"{row.registers:3} registers  {row.shared_bytes:6} B shared"
                )
    if not only:
        PATH.unlink(missing_ok=True)
        records.append(PATH, Compiled, rows)


if __name__ == "__main__":
    main()
