"""What this machine has for streamquant, and what it lacks: versions, processors, devices, what is compiled."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from streamquant import __version__
from streamquant.checkpoint.mapping import why_no_mapping
from streamquant.kernels import available
from streamquant.options import Options

# package -> (whether it must be there, what it is for)
PACKAGES = {
    "torch": (True, "the GPU, learned rounding, the fallback on the CPU"),
    "numpy": (True, "reading and writing weights"),
    "numba": (False, "the compiled CPU path, several times faster: pip install numba"),
    "triton": (False, "kernels on NVIDIA GPUs (Linux)"),
    "bitsandbytes": (False, "NF4 and FP4 on GPUs"),
    "safetensors": (False, "tests and other programs; streamquant reads files itself"),
    "comfy-kitchen": (False, "ComfyUI's tensors, in its own environment"),
    "gguf": (False, "names of what is in GGUF files: pip install gguf"),
    "matplotlib": (False, "the pictures of --report: pip install matplotlib"),
}
GIGABYTE = 10**9
LEAST_FREE_MEMORY = 10**9


@dataclass(frozen=True)
class Check:
    """One line. state: "ok", "missing" (better to have) or "problem" (something will not work)."""

    topic: str
    state: str
    text: str


def examine(folder: Path | None = None) -> list[Check]:
    """Look at everything. folder: where outputs would go; the current one by default."""
    return [*_versions(), *_machine(folder or Path.cwd()), *_kernels(), *_devices()]


def sound(checks: list[Check]) -> bool:
    """Whether nothing is a problem."""
    return all(check.state != "problem" for check in checks)


def _versions() -> Iterator[Check]:
    yield Check(
        "streamquant", "ok", f"{__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    for package, (needed, purpose) in PACKAGES.items():
        try:
            yield Check(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, "problem" if needed else "missing", f"not installed; for {purpose}")


def _machine(folder: Path) -> Iterator[Check]:
    threads = Options().effective_threads
    yield Check("processors", "ok", f"{threads} usable of {os.cpu_count()}, {_processor_name()}")
    memory = psutil.virtual_memory()
    state = "ok" if memory.available >= LEAST_FREE_MEMORY else "problem"
    text = (
        f"{memory.available / GIGABYTE:.1f} GB available of {memory.total / GIGABYTE:.1f} GB; a conversion needs about 0.3 GB"
    )
    yield Check("memory", state, text)
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    text = f"{free / GIGABYTE:.1f} GB free in {folder}" + ("" if writable else ", which cannot be written to")
    yield Check("disk", "ok" if writable else "problem", text)
    why = why_no_mapping()
    yield Check("reading", "ok", f"files are read by calls; --io mmap {f'does so too, for {why}' if why else 'maps them'}")


def _processor_name() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _kernels() -> Iterator[Check]:
    for name, verdict in available().items():
        works = verdict.startswith("yes")
        yield Check(name, "ok" if works else "missing", f"works{verdict.removeprefix('yes')}" if works else verdict)


def _devices() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        built = (
            "torch is built without CUDA" if torch.version.cuda is None and torch.version.hip is None else "no driver or GPU"
        )
        yield Check("GPU", "missing", f"none ({built}); conversions run on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        fp8 = "FP8 in hardware" if (found.major, found.minor) >= (8, 9) else "FP8 by integer arithmetic"
        memory = found.total_memory / GIGABYTE
        yield Check(f"cuda:{number}", "ok", f"{found.name}, {memory:.1f} GB, sm_{found.major}{found.minor}, {fp8}")
