"""A whole tensor through a format, tile by tile, as the pour does it but in memory."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field

import numpy as np
import torch
from tiles import TORCH_DTYPES, raw_bytes

from streamquant.formats import Fill, Format, Output
from streamquant.kernels import ErrorSums

TAGS = {dtype: tag for tag, dtype in TORCH_DTYPES.items()}
STORED = TORCH_DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


@dataclass
class Layer:
    """What came of one weight. tensors: by suffix. finite: whether no tile held a NaN or an infinity."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: ErrorSums = field(default_factory=ErrorSums)
    finite: bool = True

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.sums.error / self.sums.weight)

    def raw(self) -> dict[str, bytes]:
        return {suffix: bytes(raw_bytes(tensor)) for suffix, tensor in self.tensors.items()}


def nbytes(output: Output) -> int:
    return math.prod(output.shape) * STORED[output.dtype].itemsize


def encode_whole(
    layout: Format,
    source: torch.Tensor,
    backend,
    tile_elements: int | None = None,
    shuffle: int | None = None,
    interrupt_at: int | None = None,
) -> Layer:
    """Every byte `layout` writes for `source`.

    tile_elements: elements per tile, a multiple of the granularity; None makes one tile. shuffle: a seed, to encode the
    tiles of a pass in any order (they are absorbed and committed in theirs). interrupt_at: before committing this tile,
    go on with a new encoder that knows only what a journal would have kept.
    """
    shape = tuple(source.shape)
    tag = TAGS.get(source.dtype) or next(tag for tag, dtype in STORED.items() if dtype == source.dtype)
    raw = memoryview(raw_bytes(source))
    encoder = layout.encoder(shape, tag)
    itemsize = 1 if layout.name == "copy" else source.dtype.itemsize  # a copy's elements are its bytes
    elements = len(raw) // itemsize
    size = tile_elements or max(elements, 1)
    assert size % layout.granularity(shape, tag) == 0 or size >= elements
    spans = [(begin, min(begin + size, elements)) for begin in range(0, elements, size)]

    def tile(begin: int, end: int):
        part = raw[begin * itemsize : end * itemsize]
        return np.frombuffer(part, dtype=np.uint8) if encoder.wants_bytes else backend.load(part, tag)

    def each(work):
        order = list(range(len(spans)))
        if shuffle is not None:
            random.Random(shuffle).shuffle(order)
        done = {index: work(backend, tile(*spans[index])) for index in order}
        return [done[index] for index in range(len(spans))]

    layer = Layer()
    if encoder.passes == 2:
        for learned, finite in each(encoder.observe):
            encoder.absorb(json.loads(json.dumps(learned)))
            layer.finite &= finite
    outputs = layout.outputs(shape, tag)
    data = {output.suffix: bytearray(output.constant or nbytes(output)) for output in outputs}
    for index, encoded in enumerate(each(encoder.encode)):
        if index == interrupt_at:
            state, encoder = json.loads(json.dumps(encoder.state())), layout.encoder(shape, tag)
            encoder.restore(state)
        for output, payload in zip([output for output in outputs if output.streamed], encoded.payloads, strict=True):
            begin, end = output.extent(*spans[index])
            assert payload.nbytes == end - begin
            data[output.suffix][begin:end] = np.ascontiguousarray(payload).tobytes()
        encoder.commit(encoded)
        layer.sums.add(encoded.sums.error, encoded.sums.weight)
        layer.finite &= encoded.finite
    for suffix, final in encoder.finish().items():
        whole = len(data[suffix])
        data[suffix][:] = final.item * (whole // len(final.item)) if isinstance(final, Fill) else final
        assert len(data[suffix]) == whole
    for output in outputs:
        flat = torch.from_numpy(np.frombuffer(data[output.suffix], dtype=np.uint8))
        layer.tensors[output.suffix] = flat.view(STORED[output.dtype]).reshape(output.shape)
    return layer
