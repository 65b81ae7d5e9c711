"""The other converter's rounding in the same study: convert-to-quant on the same layers, its files decoded here.

It has two ways: nearest, and the learned rounding that it takes when nothing is asked for, which takes from seconds to minutes
a layer.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.peers import CONVERT_TO_QUANT, PeerError
from benchmarks.quality_methods import Quantized

METHODS = {"--simple": ("--simple",), "learned": ()}
SECONDS = 3 * 3600  # that a conversion may take
FLAGS: dict[str, tuple[str, ...]] = {
    "fp8-tensor": ("--scaling_mode", "tensor"),
    "fp8-row": ("--scaling_mode", "row"),
    "fp8-block64": ("--scaling_mode", "block", "--block_size", "64"),
    "int8-row": ("--int8", "--scaling_mode", "row"),
    "int8-row-convrot": ("--int8", "--scaling_mode", "row", "--convrot"),
    "int8-block128": ("--int8", "--scaling_mode", "block", "--block_size", "128"),
}
MARKER = ".comfy_quant"


def quantize(
    source: Path, destination: Path, format: str, method: str, layers: Sequence[str], workdir: Path
) -> Quantized:
    """Convert the weights `layers` of `source`, with their biases, which it corrects; all else stays as it is.

    Raises PeerError when it has no such format, cannot be installed, fails or takes longer than SECONDS.
    """
    if format not in FLAGS:
        raise PeerError(f"has no format {format}")
    program = CONVERT_TO_QUANT.install(workdir)
    with safe_open(source, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}
    part = destination.with_suffix(".source.safetensors")
    biases = [f"{key.removesuffix('.weight')}.bias" for key in layers]
    save_file({key: weights[key].contiguous() for key in (*layers, *biases) if key in weights}, part)
    command = [str(program), "-i", str(part), "-o", str(destination), "--comfy_quant", "--device", "cpu", "--manual_seed", "0"]
    destination.unlink(missing_ok=True)  # what another conversion left is not this one's
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *METHODS[method], *FLAGS[format]], capture_output=True, text=True, check=False, timeout=SECONDS,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # as everyone has in this study
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"was not done within {SECONDS} s") from error
    finally:
        part.unlink()
    seconds = time.perf_counter() - begin
    if done.returncode or not destination.exists():
        raise PeerError(f"failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    weights = {key: weight.float() for key, weight in weights.items()}
    size = 0
    with safe_open(destination, "pt") as file:
        names = set(file.keys())
        if missing := [key for key in layers if f"{key.removesuffix('.weight')}{MARKER}" not in names]:
            raise PeerError(f"left {len(missing)} layers as they were, such as {missing[0]}")
        for key in layers:
            layer = key.removesuffix(".weight")
            tensors = {name.removeprefix(f"{layer}."): file.get_tensor(name) for name in names if name.startswith(f"{layer}.")}
            if "bias" in tensors:
                weights[f"{layer}.bias"] = tensors.pop("bias").float()
            size += sum(tensor.nbytes for tensor in tensors.values())
            weights[key] = decode(tensors)
    return Quantized(weights, list(layers), size, seconds)


def decode(tensors: dict[str, Tensor]) -> Tensor:
    """A weight float32 from codes [M, N] and a scale [], [M], [M, 1] or one per block [M/b, N/b], rotated back if rotated."""
    codes, scale = tensors["weight"].float(), tensors["weight_scale"].float()
    marker = json.loads(bytes(tensors["comfy_quant"].tolist()))
    if scale.numel() == codes.shape[0]:
        scale = scale.reshape(-1, 1)
    elif scale.dim() == 2:
        scale = scale.repeat_interleave(codes.shape[0] // scale.shape[0], 0)
        scale = scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    weight = codes * scale
    if marker.get("convrot"):
        from streamquant.kernels.hadamard import rotate

        weight = rotate(weight, marker.get("convrot_groupsize", 256))
    return weight
