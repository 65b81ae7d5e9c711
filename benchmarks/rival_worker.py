"""One other library at work, in that library's own environment: it quantizes weights and decodes them again.

    python -I rival_worker.py LIBRARY

Imports torch, safetensors and that library, nothing of ours. Requests are lines of JSON on the standard input, each answered
by one on the standard output (`benchmarks.rivals` is at the other end):

    {"do": "load", "source": PATH, "threads": N}              the weights of a safetensors file
    {"do": "quantize", "format": F}                           all of them; the seconds and the bytes that F stores
    {"do": "decode", "format": F, "destination": PATH or ""}  what quantize made in F; the seconds; as float32 to PATH

What goes wrong is answered too, as {"error": TEXT}. Every format is used as the library's own documentation shows it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file


class Packed(NamedTuple):
    """A quantized weight: how to decode it, and the bytes that are kept of it."""

    decode: Callable[[], torch.Tensor]
    bytes: int


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a tensor subclass is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def linear(weight: torch.Tensor) -> torch.nn.Sequential:
    """A model of one linear layer, as most libraries want to be given a weight."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return torch.nn.Sequential(layer)


def bitsandbytes(format: str) -> Callable[[torch.Tensor], Packed]:
    from bitsandbytes import functional

    if format == "int8-row":

        def rows(weight: torch.Tensor) -> Packed:
            codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
            return Packed(
                lambda: functional.int8_vectorwise_dequant(codes, absmax).to(weight.dtype), codes.nbytes + absmax.nbytes
            )

        return rows
    book, _, nested = format.partition("-")

    def blocks(weight: torch.Tensor) -> Packed:
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=book, compress_statistics=bool(nested))
        stored = packed.nbytes + sum(tensor.nbytes for tensor in state.as_dict(packed=True).values())
        return Packed(lambda: functional.dequantize_4bit(packed, state), stored)

    return blocks


def comfy_kitchen(format: str) -> Callable[[torch.Tensor], Packed]:
    from comfy_kitchen import tensor as layouts

    layout, arguments = {
        "fp8-tensor": ("TensorCoreFP8Layout", {}),
        "mxfp8": ("TensorCoreMXFP8Layout", {}),
        "int8-tensor": ("TensorWiseINT8Layout", {}),
        "int8-row": ("TensorWiseINT8Layout", {"per_channel": True}),
        "int8-row-convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
        "nvfp4": ("TensorCoreNVFP4Layout", {}),
        "w4a8": ("AsymW4A8Int8Layout", {}),
    }[format]
    layout = getattr(layouts, layout)

    def quantize(weight: torch.Tensor) -> Packed:
        extra = dict(arguments)
        if "convrot" in format or format == "w4a8":
            # Columns that are rotated together must divide the row.
            extra["convrot_groupsize"] = next(size for size in (256, 64, 16) if weight.shape[1] % size == 0)
        codes, params = layout.quantize(weight, **extra)
        fields = [getattr(params, name) for name in params._tensor_fields()]
        stored = codes.nbytes + sum(field.nbytes for field in fields if isinstance(field, torch.Tensor))
        return Packed(lambda: layout.dequantize(codes, params)[: weight.shape[0], : weight.shape[1]], stored)

    return quantize


def torchao(format: str) -> Callable[[torch.Tensor], Packed]:
    from torchao import quantization

    if format == "nf4-double":
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        def book(weight: torch.Tensor) -> Packed:
            packed = to_nf4(weight)
            return Packed(packed.get_original_weight, stored_bytes(packed))

        return book
    config = {
        "fp8-tensor": lambda: quantization.Float8WeightOnlyConfig(granularity=quantization.PerTensor()),
        "fp8-row": lambda: quantization.Float8WeightOnlyConfig(),
        "int8-row": lambda: quantization.Int8WeightOnlyConfig(),
        "int4-group64": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(64)
        ),
    }[format]()

    def quantize(weight: torch.Tensor) -> Packed:
        model = linear(weight)
        quantization.quantize_(model, config)
        quantized = model[0].weight
        # Four bits are kept in eight here; they are counted as the four that a file would need.
        unused = quantized.qdata.nbytes // 2 if format.startswith("int4") else 0
        return Packed(quantized.dequantize, stored_bytes(quantized) - unused)

    return quantize


def optimum_quanto(format: str) -> Callable[[torch.Tensor], Packed]:
    from optimum import quanto

    kind = {"int8-row": quanto.qint8, "fp8-row": quanto.qfloat8, "int4-group128": quanto.qint4}[format]

    def quantize(weight: torch.Tensor) -> Packed:
        model = linear(weight)
        quanto.quantize(model, weights=kind)
        quanto.freeze(model)
        quantized = model[0].weight
        return Packed(quantized.dequantize, stored_bytes(quantized))

    return quantize


def sdnq(format: str) -> Callable[[torch.Tensor], Packed]:
    from sdnq import sdnq_post_load_quant
    from sdnq.layers import get_sdnq_params

    arguments = {
        "int8": {"weights_dtype": "int8"},
        "int8-row-hadamard": {"weights_dtype": "int8", "group_size": -1, "use_hadamard": True},
        "fp8": {"weights_dtype": "float8_e4m3fn"},
        "uint4": {"weights_dtype": "uint4"},
        "uint4-svd": {"weights_dtype": "uint4", "use_svd": True},
        "uint4-codebook": {"weights_dtype": "uint4", "use_codebook": True},
    }[format]

    def quantize(weight: torch.Tensor) -> Packed:
        model = sdnq_post_load_quant(
            linear(weight), **arguments, add_skip_keys=False, minimum_allowed_numel=0, minimum_allowed_channel_size=0,
            torch_dtype=weight.dtype,
        )  # fmt: skip
        layer = model[0]
        if type(layer) is torch.nn.Linear:
            raise RuntimeError("left the layer as it was")
        stored = sum(tensor.nbytes for tensor in layer.state_dict().values())

        dequantizer = layer.sdnq_dequantizer
        # As the layer itself does.
        return Packed(
            lambda: dequantizer(**get_sdnq_params(layer), skip_quantized_matmul=dequantizer.use_quantized_matmul), stored
        )

    return quantize


LIBRARIES = {
    "bitsandbytes": bitsandbytes,
    "comfy-kitchen": comfy_kitchen,
    "torchao": torchao,
    "optimum-quanto": optimum_quanto,
    "sdnq": sdnq,
}


class Worker:
    """What was loaded, and what was made of it in each format."""

    def __init__(self, library: str) -> None:
        self.library = LIBRARIES[library]
        self.weights: dict[str, torch.Tensor] = {}
        self.quantized: dict[str, dict[str, Packed]] = {}

    def load(self, source: str, threads: int) -> dict[str, object]:
        torch.set_num_threads(threads)
        self.weights, self.quantized = load_file(source), {}
        return {}

    def quantize(self, format: str) -> dict[str, object]:
        quantize = self.library(format)
        began = time.perf_counter()
        packed = {name: quantize(weight) for name, weight in self.weights.items()}
        seconds = time.perf_counter() - began
        self.quantized[format] = packed
        return {"seconds": seconds, "bytes": sum(one.bytes for one in packed.values())}

    def decode(self, format: str, destination: str = "") -> dict[str, object]:
        packed = self.quantized[format]
        began = time.perf_counter()
        weights = {name: one.decode() for name, one in packed.items()}
        seconds = time.perf_counter() - began
        if destination:
            save_file({name: weight.float().contiguous() for name, weight in weights.items()}, destination)
        return {"seconds": seconds}


def main(library: str) -> None:
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(library)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with torch.inference_mode(library != "sdnq"):
                answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
