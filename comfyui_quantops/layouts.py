"""Tensor layouts for what ComfyUI cannot read itself: bitsandbytes 4-bit, and FP8 and INT8 with row and block scales.

A layer becomes one `QuantizedTensor` of comfy-kitchen. It has the weight's logical shape and dtype, moves between
devices with all its parts, gives the file's tensors back, and dequantizes for every operation without a path of its own.
Names begin with "streamquant", so that neither ComfyUI's layouts nor other packs' are touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_kitchen.tensor import BaseLayoutParams, QuantizedLayout, QuantizedTensor, register_layout_class

from streamquant.formats import Format

from . import decode, requantize

BNB_LAYOUT = "StreamquantBnb4bitLayout"
SCALED_LAYOUT = "StreamquantScaledLayout"


class Bnb4bitLayout(QuantizedLayout):
    """NF4 and FP4 as `bitsandbytes.nn.Linear4bit` stores them, with plain or double-quantized absmax."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale: absmax [blocks], float32, or uint8 with double quantization. code: the file's quant_map, float32 [16].

        nested_scale: float32 [ceil(blocks / nested_block_size)], nested_code: float32 [256], both None without double
        quantization. book: "nf4" or "fp4". standard_book: whether `code` is bitsandbytes' own. quant_state: the file's
        JSON, kept as it is.
        """

        code: torch.Tensor
        nested_scale: torch.Tensor | None = None
        nested_code: torch.Tensor | None = None
        nested_offset: float = 0.0
        nested_block_size: int = 256
        block_size: int = 64
        book: str = "nf4"
        standard_book: bool = True
        quant_state: bytes = b""

        def _tensor_fields(self) -> list[str]:
            return ["scale", "code"] if self.nested_scale is None else ["scale", "code", "nested_scale", "nested_code"]

    @classmethod
    def quantize(
        cls, tensor: torch.Tensor, scale: Any = None, stochastic_rounding: int | None = 0, inplace_ops: bool = False,
        *, like: Params, storage: torch.Tensor,
    ) -> tuple[torch.Tensor, Params]:  # fmt: skip
        """`tensor` [out_features, in_features] on the grid of `like`, packed in the shape and dtype of `storage`.

        stochastic_rounding: a seed; 0 or None rounds to nearest. `scale` and `inplace_ops` are ComfyUI's and change
        nothing: the scales follow from `like`.
        """
        exact, device = requantize.tolerance(tensor.dtype), tensor.device
        flat, size = tensor.reshape(-1), like.block_size
        like = like.to_device(device)
        old = decode.decode_absmax(like)
        needed = torch.cat([_absmax(flat[part], size) for part in requantize.pieces(flat.numel(), size)])
        absmax = requantize.grow(old, needed, exact)
        fields: dict[str, Any] = {"scale": absmax, "orig_dtype": tensor.dtype, "orig_shape": tuple(tensor.shape)}
        if like.nested_scale is not None:
            fields["scale"], fields["nested_scale"] = requantize.encode_absmax_above(
                absmax, old, like.scale, like.nested_scale, like.nested_block_size, like.nested_offset
            )
        params = replace(like, **fields)
        absmax = decode.decode_absmax(params)
        grid, codes = torch.sort(like.code)
        codes = codes.to(torch.uint8)
        generator = requantize.make_generator(stochastic_rounding, device)
        # `storage` may hold more bytes than codes: some files keep them in wider words.
        packed = torch.zeros(storage.nbytes, dtype=torch.uint8, device=device)
        for part in requantize.pieces(flat.numel(), size):
            scales = absmax[part.start // size : -(-part.stop // size)].repeat_interleave(size)[: part.stop - part.start]
            values = (flat[part].float() / requantize.divisor(scales)).clamp_(grid[0].item(), grid[-1].item())
            nibbles = codes[requantize.round_to_grid(values, grid, generator, exact)]
            nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.numel() % 2))
            packed[part.start // 2 : (part.stop + 1) // 2] = (nibbles[::2] << 4) | nibbles[1::2]
        return packed.view(storage.dtype).view(storage.shape), params

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"like": qtensor._params, "storage": qtensor._qdata}

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        return decode.decode_4bit(qdata, params)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """The tensors of the file, by what follows the name of the weight."""
        tensors = {"": qdata, ".absmax": params.scale, ".quant_map": params.code}
        if params.nested_scale is not None:
            tensors |= {".nested_absmax": params.nested_scale, ".nested_quant_map": params.nested_code}
        quant_state = torch.frombuffer(bytearray(params.quant_state), dtype=torch.uint8)
        return tensors | {f".quant_state.bitsandbytes__{params.book}": quant_state}


class ScaledLayout(QuantizedLayout):
    """FP8 and INT8 codes with scales per row, per run of a row or per 2-D block."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale: float32, of the shape that `format` gives it. format: how codes and scales make the weight."""

        format: Format = None

    @classmethod
    def quantize(
        cls, tensor: torch.Tensor, scale: Any = None, stochastic_rounding: int | None = 0, inplace_ops: bool = False,
        *, like: Params, dtype: torch.dtype,
    ) -> tuple[torch.Tensor, Params]:  # fmt: skip
        """`tensor` [out_features, in_features] in codes of `dtype` on the grid of `like`; see `Bnb4bitLayout.quantize`."""
        exact, device = requantize.tolerance(tensor.dtype), tensor.device
        like = like.to_device(device)
        geometry = like.format.geometry(tuple(tensor.shape))
        grid, codes = (part.to(device) for part in requantize.grid_values(dtype))
        rows, size = tensor.shape[0], geometry.block_size if geometry.mode == "block" else 1
        generator = requantize.make_generator(stochastic_rounding, device)
        old = like.scale.float().reshape(-1, tensor.shape[1] // geometry.group)  # a row of scales per `size` rows
        new = torch.empty_like(old)
        qdata = torch.empty(tensor.shape, dtype=torch.uint8, device=device)
        step = max(requantize.CHUNK // max(tensor.shape[1], 1) // size, 1) * size
        for begin in range(0, rows, step):
            part = tensor[begin : begin + step].float()
            scales = slice(begin // size, (begin + len(part)) // size)
            absmax = part.view(-1, size, old.shape[1], geometry.group).abs().amax(dim=(1, 3))
            new[scales] = requantize.grow(old[scales], absmax / grid[-1], exact)
            spread = requantize.divisor(new[scales].repeat_interleave(size, 0).unsqueeze(2))
            values = (part.view(len(part), -1, geometry.group) / spread).clamp_(grid[0].item(), grid[-1].item())
            index = requantize.round_to_grid(values.view(-1), grid, generator, exact)
            qdata[begin : begin + step] = codes[index].view(part.shape)
        shaped = new.view(like.scale.shape).to(like.scale.dtype)
        params = replace(like, scale=shaped, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))
        return qdata.view(dtype), params

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"like": qtensor._params, "dtype": qtensor._qdata.dtype}

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        return decode.decode_scaled(qdata, params.scale, params.format, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        return {"": qdata, "_scale": params.scale}


def _absmax(flat: torch.Tensor, size: int) -> torch.Tensor:
    """float32: largest magnitude of each run of `size` elements, the last may be short."""
    padded = torch.nn.functional.pad(flat.float().abs(), (0, -flat.numel() % size))
    return padded.view(-1, size).amax(1)


LAYOUTS = {BNB_LAYOUT: Bnb4bitLayout, SCALED_LAYOUT: ScaledLayout}


def is_ours(weight: Any) -> bool:
    """Whether a weight is a tensor of one of this module's layouts."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls in LAYOUTS


def moved(weight: QuantizedTensor, device: Any, dtype: torch.dtype | None) -> QuantizedTensor:
    """The same packed weight on another device, counting as another dtype.

    Not by `Tensor.to`, which in inference mode takes a way that comfy-kitchen answers by decoding.
    """
    params, qdata = weight._params, weight._qdata
    if device is not None:
        params, qdata = params.to_device(device), qdata.to(device=device)
    return QuantizedTensor(qdata, weight._layout_cls, replace(params, orig_dtype=dtype or params.orig_dtype))


def register(quant_algorithms: dict[str, dict[str, Any]]) -> None:
    """Make the layouts known to comfy-kitchen and, under the same names, to ComfyUI (`comfy.quant_ops.QUANT_ALGOS`)."""
    from . import fused

    for name, layout in LAYOUTS.items():
        register_layout_class(name, layout)
        # With `quantize_input` ComfyUI would quantize the activations too; these formats are for weights alone.
        quant_algorithms.setdefault(
            name,
            {"storage_t": torch.uint8, "parameters": set(), "comfy_tensor_layout": name, "quantize_input": False},
        )
    fused.register(Bnb4bitLayout)
