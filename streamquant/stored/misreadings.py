"""Other readings of a layer's bytes: each is a way in which files go wrong, and mends the layer if that is what happened.

A reading is a layout and a way to read its tensors, both lazy: nothing is decoded until somebody asks for a range.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from streamquant.checkpoint.reader import SourceTensor

from .four_bit import Blocks4bit, RotatedInt4
from .layouts import Layout, Read, ScaledCodes
from .microscaled import NvFp4

Reading = tuple[str, Layout, Read]  # what would be wrong with the file, and how it is read all the same

GROUPS = (256, 64, 16, 1024, 4096)  # of a Hadamard rotation, the usual first
NAMES = {"F8_E4M3": "E4M3", "F8_E5M2": "E5M2", "I8": "INT8"}
MOST_SCALES = 1 << 24  # scales that are taken into memory at once
MOST_BYTES = 1 << 20  # of transposed codes that are read at once
SWAPPED = "the two codes of every byte are swapped (the first belongs in the {} nibble)"


def misreadings(layout: Layout, read: Read) -> Iterator[Reading]:
    """Every other reading of this layer alone, the likeliest first."""
    yield from _scale_readings(layout, read)
    if isinstance(layout, ScaledCodes):
        yield from _of_scaled(layout, read)
    elif isinstance(layout, Blocks4bit):
        yield SWAPPED.format("high"), replace(layout, high_first=not layout.high_first), read
        other = "fp4" if layout.book_name == "nf4" else "nf4"
        marked = layout.book_name.upper()
        if layout.book is not None:
            yield f"its quant_map is not that of {marked}", replace(layout, book=None), read
        text = f"its codes are {other.upper()}, but it is marked {marked}"
        yield text, replace(layout, book=None, book_name=other), read
    elif isinstance(layout, NvFp4 | RotatedInt4):
        word = "low" if isinstance(layout, RotatedInt4) else "high"
        yield SWAPPED.format(word), replace(layout, high_first=not layout.high_first), read


def _of_scaled(layout: ScaledCodes, read: Read) -> Iterator[Reading]:
    dtype, columns = layout.codes.info.dtype, layout.columns
    groups = [group for group in GROUPS if len(layout.shape) == 2 and columns % group == 0]
    if layout.rotation:
        yield "it is marked as rotated, but its codes are not", replace(layout, rotation=0), read
        for group in groups:
            if group != layout.rotation:
                text = f"its codes are rotated in groups of {group}, but it is marked with groups of {layout.rotation}"
                yield text, replace(layout, rotation=group), read
    else:
        for group in groups:
            text = f"its codes are rotated in groups of {group}, but it is not marked so"
            yield text, replace(layout, rotation=group), read
    for other, word in NAMES.items():
        if other != dtype:
            codes = replace(layout.codes, info=replace(layout.codes.info, dtype=other))
            yield f"its codes are {word}, but they are stored as {NAMES[dtype]}", replace(layout, codes=codes), read
    if dtype == "I8":
        yield "its codes are unsigned (128 stands for 0)", layout, _unsigned(layout.codes, read)
    if len(layout.shape) == 2:
        yield "it is stored transposed", layout, _transposed(layout.codes, layout.shape, read)


def _scale_readings(layout: Layout, read: Read) -> Iterator[Reading]:
    tensor = layout.scale_tensor
    if tensor is None or tensor.info.dtype != "F32" or not 0 < tensor.info.elements <= MOST_SCALES:
        return
    scales = np.frombuffer(read(tensor, 0, tensor.info.nbytes), dtype=np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        yield _plural(scales.size, "stored as the reciprocal"), layout, _altered(read, tensor, np.float32(1) / scales)
    if scales.size == 1:
        return
    for shift in (1, -1):
        word = "ahead" if shift < 0 else "behind"
        yield f"its scales are shifted by one, each is one {word}", layout, _altered(read, tensor, np.roll(scales, -shift))
    across = layout.scales_in_row if isinstance(layout, ScaledCodes) else 1
    if 1 < across < scales.size and scales.size % across == 0:
        turned = scales.reshape(across, -1).T
        yield "its scales are stored transposed", layout, _altered(read, tensor, turned)
    yield "its scales are stored in reverse order", layout, _altered(read, tensor, scales[::-1])


def _plural(count: int, text: str) -> str:
    return f"its scale is {text}" if count == 1 else f"its scales are {text}"


def with_scales_of(layout: Layout, other: Layout, read: Read) -> Reading | None:
    """This layer with the scales of another of its shape; None where they do not fit."""
    mine, theirs = layout.scale_tensor, other.scale_tensor
    if mine is None or theirs is None or mine.info.elements < 2:
        return None
    if (mine.info.dtype, mine.info.elements) != (theirs.info.dtype, theirs.info.elements):
        return None
    return "", layout, lambda tensor, begin, end: read(theirs if tensor is mine else tensor, begin, end)


def same_scales(layout: Layout, other: Layout, read: Read) -> bool:
    """Whether two layers have the same scales to the bit, as none have by chance."""
    mine, theirs = layout.scale_tensor, other.scale_tensor
    if mine is None or theirs is None or mine.info.nbytes != theirs.info.nbytes or mine.info.nbytes > 4 * MOST_SCALES:
        return False
    return bytes(read(mine, 0, mine.info.nbytes)) == bytes(read(theirs, 0, theirs.info.nbytes))


def _altered(read: Read, tensor: SourceTensor, values: np.ndarray) -> Read:
    """`read`, but for one tensor, which has these values."""
    data = memoryview(np.ascontiguousarray(values, dtype=np.float32).reshape(-1)).cast("B")
    return lambda asked, begin, end: data[begin:end] if asked is tensor else read(asked, begin, end)


def _unsigned(codes: SourceTensor, read: Read) -> Read:
    def reading(tensor: SourceTensor, begin: int, end: int) -> memoryview:
        raw = read(tensor, begin, end)
        return memoryview(np.frombuffer(raw, dtype=np.uint8) ^ np.uint8(0x80)) if tensor is codes else raw

    return reading


def _transposed(codes: SourceTensor, shape: tuple[int, ...], read: Read) -> Read:
    """Codes [columns, rows] read as [rows, columns]."""

    def reading(tensor: SourceTensor, begin: int, end: int) -> memoryview:
        if tensor is not codes:
            return read(tensor, begin, end)
        rows, columns = shape
        first, last = begin // columns, (end - 1) // columns + 1
        turned = np.empty((last - first, columns), dtype=np.uint8)
        step = max(MOST_BYTES // rows, 1)
        for column in range(0, columns, step):
            stop = min(column + step, columns)
            # From the first byte that is wanted to the last: of one stored row, if it is a long one, no more than that.
            raw = np.frombuffer(read(tensor, column * rows + first, (stop - 1) * rows + last), dtype=np.uint8)
            stored = np.lib.stride_tricks.as_strided(raw, (stop - column, last - first), (rows, 1), writeable=False)
            turned[:, column:stop] = stored.T
        return memoryview(turned.reshape(-1)[begin - first * columns : end - first * columns])

    return reading
