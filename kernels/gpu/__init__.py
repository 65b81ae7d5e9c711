"""The GPU's path: the same operations as the torch references, as Triton kernels.

Codes and scales are bit-identical to the references. FP8 is encoded and decoded by integer arithmetic, so that it runs
where Triton has no FP8 type (NVIDIA below sm_89); nothing here is CUDA's alone. Importing this package needs no triton;
importing any module of it but `launch` does.
"""

from __future__ import annotations

import functools
import importlib.util

OLDEST_CAPABILITY = (7, 5)


@functools.cache
def why_not(device: str = "cuda") -> str | None:
    """None when the kernels can run on a device ("cuda[:N]"), else the reason in words."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return f"the device is sm_{capability[0]}{capability[1]}, and the kernels need sm_75 or newer"
    try:
        from . import scaled  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"triton does not work here: {error}"
    return None
