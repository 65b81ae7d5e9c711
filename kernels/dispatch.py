"""Which implementation runs an operation here: compiled (numba) or plain torch, and why not the other.

A backend takes a tile as raw host bytes and gives back numpy arrays, so that whoever calls it knows nothing of
devices. `JitBackend` never imports torch; `TorchBackend` is the references themselves, on the CPU or a CUDA device.
"""

from __future__ import annotations

import functools
import importlib.util

from .jit_backend import JitBackend
from .torch_backend import TorchBackend

# Families of operations that have Triton kernels.
GPU_FAMILIES = ("FP8 and INT8 encoding", "NF4 and FP4 encoding", "scale search", "decoding", "rotation", "refinement")


@functools.cache
def why_no_jit() -> str | None:
    """None when the compiled path can run, else the reason in words."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'streamquant[fast]')"
    try:
        from numba import config

        if config.DISABLE_JIT:
            return "numba is switched off by NUMBA_DISABLE_JIT"
        from .jit import absmax  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: no folder to keep compiled code in
        return f"numba does not work here: {error}"
    return None


def select(device: str = "cpu"):
    """The backend for a device ("cpu" or "cuda[:N]"): numba on the CPU and Triton on a GPU where they run, else torch.

    One object per worker thread: a TorchBackend owns its staging buffer and CUDA stream.
    """
    if device == "cpu":
        return JitBackend() if why_no_jit() is None else TorchBackend(device)
    from . import gpu

    if gpu.why_not(device) is not None:
        return TorchBackend(device)
    from .gpu.backend import GpuBackend

    return GpuBackend(device)


def available() -> dict[str, str]:
    """What runs here: implementation and device, then each family of operations on a GPU -> "yes", or what instead and
    why."""
    from . import gpu

    report = {"numba (CPU)": why_no_jit() or "yes"}
    if importlib.util.find_spec("torch") is None:
        return report | dict.fromkeys(("torch (CPU)", "torch (CUDA)", "Triton (CUDA)"), "torch is not installed")
    import torch

    has_device, no_triton = torch.cuda.is_available(), gpu.why_not()
    report["torch (CPU)"] = "yes"
    report["torch (CUDA)"] = "yes" if has_device else "torch sees no CUDA device"
    report["Triton (CUDA)"] = no_triton or "yes"
    if has_device:
        ours = "Triton" if no_triton is None else f"plain torch: {no_triton}"
        report |= {f"{family} (CUDA)": ours for family in GPU_FAMILIES}
    return report
