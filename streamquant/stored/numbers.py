"""The numbers that codes stand for, as tables: a look-up is the fastest way from codes to float32 without a compiler.

Codes are looked up two at a time where the table of pairs still fits the processor's second cache (65,536 pairs for codes
of a byte, 256 for codes of four bits).
"""

from __future__ import annotations

import functools

import numpy as np

from streamquant.formats.plain import to_float32

# E2M1, the 4-bit float of NVFP4: bit 3 is the sign (OCP Microscaling Formats v1.0, section 5.3.3).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
# Two's complement in four bits.
INT4 = np.array([0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1], dtype=np.float32)

BYTE_CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8")


@functools.cache
def byte_values(dtype: str) -> np.ndarray:
    """float32 [256]: what each byte means under a one-byte dtype (OCP 8-bit floats; E8M0 is a power of two)."""
    codes = np.arange(256, dtype=np.uint32)
    if dtype == "I8":
        return codes.astype(np.uint8).view(np.int8).astype(np.float32)
    if dtype == "F8_E8M0":
        powers = np.ldexp(np.float32(1), codes[:255].astype(np.int32) - 127)
        return np.append(powers, np.float32(np.nan))
    mantissa_bits, bias = {"F8_E4M3": (3, 7), "F8_E5M2": (2, 15)}[dtype]
    # The code's bits at the top of a float32's: right but for the exponent's bias, which a power of two makes good.
    magnitude = ((codes & 0x7F) << (23 - mantissa_bits)).view(np.float32) * np.float32(2.0 ** (127 - bias))
    values = np.where(codes & 0x80, -magnitude, magnitude)
    if dtype == "F8_E4M3":
        values[[0x7F, 0xFF]] = np.nan  # no infinity: all other codes are numbers
    else:
        values[[0x7C, 0xFC]] = np.inf, -np.inf
        values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return values


@functools.cache
def _byte_pairs(dtype: str) -> np.ndarray:
    """uint64 [65536]: the two float32 of each two neighbouring bytes (little-endian), side by side."""
    values = byte_values(dtype)
    pairs = np.empty((256, 256, 2), dtype=np.float32)
    pairs[:, :, 0], pairs[:, :, 1] = values[None, :], values[:, None]
    return pairs.reshape(-1).view(np.uint64)


def decode_bytes(codes: np.ndarray, dtype: str) -> np.ndarray:
    """float32 [n] of one-byte codes, uint8 [n]."""
    if dtype == "I8":
        return codes.view(np.int8).astype(np.float32)
    values = np.empty(codes.size, dtype=np.float32)
    even = codes.size // 2 * 2
    np.take(_byte_pairs(dtype), _pairs_of(codes[:even]), out=values[:even].view(np.uint64), mode="clip")
    values[even:] = byte_values(dtype)[codes[even:]]
    return values


def _pairs_of(codes: np.ndarray) -> np.ndarray:
    """Bytes as uint16; a tile that starts at an odd address in the file has to be copied for that."""
    if codes.ctypes.data % 2:
        codes = codes.copy()
    return codes.view("<u2")


@functools.lru_cache(maxsize=64)
def _nibble_pairs(book: bytes, high_first: bool) -> np.ndarray:
    """uint64 [256]: the two float32 of each byte of two 4-bit codes, side by side."""
    values = np.frombuffer(book, dtype=np.float32)
    codes = np.arange(256)
    first, second = values[codes >> 4], values[codes & 15]
    return np.stack([first, second] if high_first else [second, first], axis=1).reshape(-1).view(np.uint64)


def decode_nibbles(packed: np.ndarray, book: np.ndarray, high_first: bool = True) -> np.ndarray:
    """float32 [2 n] of packed 4-bit codes, uint8 [n]; book: float32 [16]."""
    values = np.empty(2 * packed.size, dtype=np.float32)
    np.take(_nibble_pairs(book.tobytes(), high_first), packed, out=values.view(np.uint64), mode="clip")
    return values


def floats(raw: memoryview, dtype: str) -> np.ndarray:
    """float32 [n] of a tensor's bytes: a floating dtype, or one-byte codes (E8M0 scales, for instance)."""
    codes = np.frombuffer(raw, dtype=np.uint8)
    return decode_bytes(codes, dtype) if dtype in BYTE_CODES else to_float32(codes, dtype)
