"""Other quantization libraries, at work on the same weights in processes of their own (`rival_worker.py`).

Each library is asked for the formats in which it does our job: a weight made small and decoded again, without looking at data.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers import Peer, PeerError

PROGRAM = Path(__file__).with_name("rival_worker.py")


@dataclass(frozen=True)
class Library(Peer):
    """A library. formats: its own, each with ours that does the same job in about as many bytes, "" where there is none."""

    formats: dict[str, str] = field(default_factory=dict)

    @property
    def package(self) -> str:
        return self.name.partition(" ")[0]


def _library(package: str, version: str, formats: dict[str, str], *undeclared: str) -> Library:
    requirements = (f"{package}=={version}", "safetensors", "numpy", *undeclared)
    return Library(f"{package} {version}", requirements, formats=formats)


LIBRARIES = {
    library.package: library
    for library in (
        _library("bitsandbytes", "0.50.2", {"nf4": "nf4", "nf4-double": "nf4-double", "fp4": "fp4", "int8-row": "int8-row"}),
        _library(
            "comfy-kitchen", "0.2.40",
            {
                "fp8-tensor": "fp8-tensor", "mxfp8": "fp8-block64", "int8-tensor": "int8-row", "int8-row": "int8-row",
                "int8-row-convrot": "int8-row-convrot", "nvfp4": "nf4", "w4a8": "nf4",
            },
            "packaging",
        ),
        _library(
            "torchao", "0.18.0",
            {
                "fp8-tensor": "fp8-tensor", "fp8-row": "fp8-row", "int8-row": "int8-row", "int4-group64": "nf4",
                "nf4-double": "nf4-double",
            },
        ),
        _library("optimum-quanto", "0.2.7", {"int8-row": "int8-row", "fp8-row": "fp8-row", "int4-group128": "nf4-double"}),
        _library(
            "sdnq", "0.2.8",
            {
                "int8": "int8-row", "int8-row-hadamard": "int8-row-convrot", "fp8": "fp8-row", "uint4": "nf4",
                "uint4-codebook": "nf4", "uint4-svd": "",
            },
        ),
    )
}  # fmt: skip


class Worker:
    """A library's process. Raises PeerError when the library cannot be installed, or fails at what it is asked."""

    def __init__(self, library: Library, workdir: Path) -> None:
        self.library = library
        python = library.install(workdir)
        self.log = workdir / "peers" / f"{library.package}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-I", str(PROGRAM), library.package], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True,
            )  # fmt: skip

    def _ask(self, **request: object) -> dict[str, float]:
        process = self._process
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise PeerError(f"ended with exit code {process.wait()} (see {self.log})")
        answer = json.loads(reply)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def load(self, source: Path, threads: int) -> None:
        """Read the weights of a safetensors file, to work on with so many threads."""
        self._ask(do="load", source=str(source), threads=threads)

    def quantize(self, format: str) -> tuple[float, int]:
        """Quantize what was loaded; the seconds it took and the bytes that the format stores."""
        answer = self._ask(do="quantize", format=format)
        return answer["seconds"], int(answer["bytes"])

    def decode(self, format: str) -> float:
        """Decode what `quantize` made of it; the seconds it took."""
        return self._ask(do="decode", format=format)["seconds"]

    def decoded(self, format: str) -> dict[str, torch.Tensor]:
        """Decode it, and bring the weights here, in float32."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "decoded.safetensors"
            self._ask(do="decode", format=format, destination=str(path))
            # Read, not mapped: the file goes.
            return {name: weight.clone() for name, weight in load_file(path).items()}

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextmanager
def working(library: Library, weights: dict[str, torch.Tensor], workdir: Path, threads: int) -> Iterator[Worker]:
    """A worker that has loaded `weights`. Raises PeerError."""
    with ExitStack() as stack:
        worker = Worker(library, workdir)
        stack.callback(worker.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "weights.safetensors")
        worker.load(folder / "weights.safetensors", threads)
        yield worker


# Which of their formats stand beside one of ours when it is timed: the same job, whatever the format is called.
BESIDE = {
    "nf4": (
        ("bitsandbytes", "nf4"), ("comfy-kitchen", "nvfp4"), ("comfy-kitchen", "w4a8"), ("torchao", "int4-group64"),
        ("optimum-quanto", "int4-group128"), ("sdnq", "uint4"),
    ),
    "fp4": (("bitsandbytes", "fp4"),),
    "nf4-double": (("bitsandbytes", "nf4-double"), ("torchao", "nf4-double")),
    "fp8-tensor": (("comfy-kitchen", "fp8-tensor"), ("torchao", "fp8-tensor")),
    "fp8-row": (("torchao", "fp8-row"), ("optimum-quanto", "fp8-row"), ("sdnq", "fp8")),
    "int8-row": (
        ("bitsandbytes", "int8-row"), ("comfy-kitchen", "int8-row"), ("torchao", "int8-row"), ("optimum-quanto", "int8-row"),
        ("sdnq", "int8"),
    ),
}  # fmt: skip


class Crew:
    """Workers that hold the same weight, each started when it is first asked for."""

    def __init__(self, weight: torch.Tensor, workdir: Path, threads: int) -> None:
        self._weights, self._workdir, self._threads = {"weight": weight}, workdir, threads
        self._stack = ExitStack()
        self._workers: dict[str, Worker | PeerError] = {}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def entries(self, operation: str, decodes: bool) -> list[tuple[str, Callable[[], Remote]]]:
        """Who stands beside us in an operation, by name, each behind a function that starts it. That raises PeerError."""

        def entry(package: str, format: str) -> tuple[str, Callable[[], Remote]]:
            name = LIBRARIES[package].name
            named = name if format == operation else f"{name} {format}"
            return named, lambda: Remote(self._worker(package), format, decodes)

        return [entry(package, format) for package, format in BESIDE.get(operation, ())]

    def _worker(self, package: str) -> Worker:
        if package not in self._workers:
            try:
                context = working(LIBRARIES[package], self._weights, self._workdir, self._threads)
                self._workers[package] = self._stack.enter_context(context)
            except PeerError as error:
                self._workers[package] = error
        found = self._workers[package]
        if isinstance(found, PeerError):
            raise found
        return found


class Remote:
    """One format of a library on one weight, as a contender that is timed where it runs. Raises PeerError."""

    def __init__(self, worker: Worker, format: str, decodes: bool) -> None:
        self.worker, self.format, self.decodes = worker, format, decodes

    def __call__(self, *_: object) -> torch.Tensor:
        """Quantize, and return the decoded weight, float32."""
        self.worker.quantize(self.format)
        return next(iter(self.worker.decoded(self.format).values()))

    def seconds(self) -> float:
        """What one go takes."""
        return self.worker.decode(self.format) if self.decodes else self.worker.quantize(self.format)[0]
