"""A corpus of safetensors files that must be refused, each for exactly one reason.

`CASES` serves the header's tests and fuzzing: the bytes of a whole file, the error it must raise, and whether the
Rust reader refuses it too (`rust_refuses`) or streamquant is the stricter of the two.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from streamquant import errors


class Case(NamedTuple):
    name: str
    file: bytes
    error: type[errors.HeaderError]
    rust_refuses: bool = True


def whole_file(header: str | bytes, data: bytes = b"") -> bytes:
    """A file with this header and this data, right or wrong."""
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]", more: str = "") -> str:
    """The JSON of one tensor's entry; each part is JSON text, so that it can be wrong."""
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def _one(size: int = 4, **parts: str) -> bytes:
    """A file of one tensor "a"."""
    return whole_file(f'{{"a":{entry(**parts)}}}', bytes(size))


def _two(first: str, second: str, size: int) -> bytes:
    """A file of two F32 tensors of one element, with these offsets."""
    return whole_file(f'{{"a":{entry(offsets=first)},"b":{entry(offsets=second)}}}', bytes(size))


GOOD = _one()
_JSON = GOOD[8:-4].decode()
_DATA = bytes(4)
_NAMED = '{"%s":' + entry() + "}"
_META = '{"__metadata__":%s,"a":' + entry() + "}"
_OFFSETS = '"data_offsets":[0,4]'

_LENGTH = [
    Case("empty file", b"", errors.FileTooShortError),
    Case("seven bytes", bytes(7), errors.FileTooShortError),
    Case("length 0", bytes(8), errors.HeaderLengthError),
    Case("length 0, data follows", bytes(64), errors.HeaderLengthError),
    Case("length above the limit", struct.pack("<Q", 100_000_001) + b"{}", errors.HeaderLengthError),
    Case("length 2^64 - 1", b"\xff" * 8 + b"{}", errors.HeaderLengthError),
    Case("a web page", b"<!DOCTYPE html><html></html>", errors.HeaderLengthError),
    Case("header past the end by one byte", struct.pack("<Q", 3) + b"{}", errors.HeaderPastEndError),
    Case("only the length", struct.pack("<Q", 2), errors.HeaderPastEndError),
    Case("at the limit, past the end", struct.pack("<Q", 100_000_000) + b"{}", errors.HeaderPastEndError),
]

_TEXT = [
    Case("not UTF-8", whole_file(b'{"\xff":0}'), errors.HeaderNotUtf8Error),
    Case("a surrogate as UTF-8 bytes", whole_file(b'{"\xed\xa0\x80":0}'), errors.HeaderNotUtf8Error),
    Case("an overlong UTF-8 form", whole_file(b'{"\xc0\x80":0}'), errors.HeaderNotUtf8Error),
    Case("UTF-16", whole_file("{}".encode("utf-16")), errors.HeaderNotUtf8Error),
    Case("byte order mark", whole_file("\ufeff" + _JSON, _DATA), errors.HeaderStartError),
    Case("leading space", whole_file(" " + _JSON, _DATA), errors.HeaderStartError, rust_refuses=False),
    Case("leading newline", whole_file("\n" + _JSON, _DATA), errors.HeaderStartError, rust_refuses=False),
    Case("an array", whole_file("[]"), errors.HeaderStartError),
    Case("a number", whole_file("1"), errors.HeaderStartError),
]

_NOT_JSON = [
    Case("brace only", whole_file("{"), errors.HeaderNotJsonError),
    Case("cut in the middle", whole_file(_JSON[:-9], _DATA), errors.HeaderNotJsonError),
    Case("trailing comma", whole_file(_JSON[:-1] + ",}", _DATA), errors.HeaderNotJsonError),
    Case("a comment", whole_file("{/**/" + _JSON[1:], _DATA), errors.HeaderNotJsonError),
    Case("single quotes", whole_file(_JSON.replace('"', "'"), _DATA), errors.HeaderNotJsonError),
    Case("a number for a key", whole_file("{1:2}"), errors.HeaderNotJsonError),
    Case("raw newline in a name", whole_file(_NAMED % "\n", _DATA), errors.HeaderNotJsonError),
    Case("raw NUL in a name", whole_file(_NAMED % "\0", _DATA), errors.HeaderNotJsonError),
    Case("unknown escape", whole_file(_NAMED % r"\x41", _DATA), errors.HeaderNotJsonError),
    Case("half an escape", whole_file(_NAMED % r"\u12", _DATA), errors.HeaderNotJsonError),
    Case("escape with a sign", whole_file(_NAMED % r"\u+041", _DATA), errors.HeaderNotJsonError),
    Case("lone leading surrogate", whole_file(_NAMED % r"\ud800", _DATA), errors.HeaderNotJsonError),
    Case("lone trailing surrogate", whole_file(_NAMED % r"\uDC00", _DATA), errors.HeaderNotJsonError),
    Case("surrogates reversed", whole_file(_NAMED % r"\udc00\ud800", _DATA), errors.HeaderNotJsonError),
    Case("lone surrogate in metadata", whole_file(_META % r'{"k":"\udbff"}', _DATA), errors.HeaderNotJsonError),
    Case("nested 200,000 deep", whole_file('{"a":' + "[" * 200_000 + "]" * 200_000 + "}"), errors.HeaderNotJsonError),
    *(
        Case(f"dimension {literal}", _one(shape=f"[{literal}]"), errors.HeaderNotJsonError)
        for literal in ("NaN", "Infinity", "-Infinity", "01", "+1", "0x1", "1.", ".5", "1_0", "--1", "True", "")
        if literal  # [] is a scalar's shape
    ),
    *(
        Case(f"followed by {after!r}", whole_file(_JSON + after, _DATA), errors.HeaderNotJsonError, rust)
        for after, rust in [
            ("\n", False), ("\t", False), (" \r ", False), ("\0", True), ("\u00a0", True), ("x", True), ("}", True),
            ("{}", True), (",", True),
        ]
    ),
]  # fmt: skip

_KEYS = [
    Case("tensor twice", whole_file(f'{{"a":{entry()},"a":{entry()}}}', _DATA), errors.DuplicateKeyError, False),
    Case(
        "twice, escaped", whole_file(rf'{{"a":{entry()},"\u0061":{entry()}}}', _DATA), errors.DuplicateKeyError, False
    ),
    Case("dtype twice", _one(more=',"dtype":"F32"'), errors.DuplicateKeyError),
    Case("key twice in metadata", whole_file(_META % '{"k":"1","k":"1"}', _DATA), errors.DuplicateKeyError, False),
    Case("metadata twice", whole_file('{"__metadata__":{},"__metadata__":{}}'), errors.DuplicateKeyError),
    Case("key twice, deep inside", _one(more=',"x":[{"y":1,"y":1}]'), errors.DuplicateKeyError, False),
    Case("metadata null", whole_file(_META % "null", _DATA), errors.MetadataError, False),
    *(
        Case(f"metadata {value}", whole_file(_META % value, _DATA), errors.MetadataError)
        for value in ("[]", '"x"', "1", "true", '{"k":1}', '{"k":null}', '{"k":["v"]}', '{"k":{}}', '{"k":true}')
    ),
    Case("tensor named __metadata__", whole_file(_NAMED % "__metadata__", _DATA), errors.MetadataError),
]

_ENTRIES = [
    *(
        Case(f"entry {value}", whole_file(f'{{"a":{value}}}'), errors.TensorEntryError)
        for value in ("null", "1", '"F32"', "[]", "{}", "true", "-0")
    ),
    Case("entry as an array", whole_file('{"a":["F32",[1],[0,4]]}', _DATA), errors.TensorEntryError, False),
    Case("extra field", _one(more=',"x":1'), errors.TensorEntryError, False),
    Case("extra field, nested 100 deep", _one(more=f',"x":{"[" * 100}{"]" * 100}'), errors.TensorEntryError, False),
    Case("no dtype", whole_file(_JSON.replace('"dtype":"F32",', ""), _DATA), errors.TensorEntryError),
    Case("no shape", whole_file(_JSON.replace('"shape":[1],', ""), _DATA), errors.TensorEntryError),
    Case("no data_offsets", whole_file(_JSON.replace("," + _OFFSETS, ""), _DATA), errors.TensorEntryError),
    Case("field misspelt", whole_file(_JSON.replace("dtype", "Dtype"), _DATA), errors.TensorEntryError),
    Case("dtype as an object", _one(dtype='{"F32":null}'), errors.TensorEntryError, False),
    *(Case(f"dtype {v}", _one(dtype=v), errors.TensorEntryError) for v in ("1", "null", "[]", '["F32"]')),
    *(Case(f"shape {v}", _one(shape=v), errors.TensorEntryError) for v in ("1", "null", '"1"', "{}", "true")),
    *(
        Case(f"offsets {value}", _one(offsets=value), errors.TensorEntryError)
        for value in (
            "null", "4", "{}", '"04"', "[]", "[4]", "[0,4,4]", "[0.0,4]", "[0,4.0]", "[0,4e0]", "[-0,4]", "[-0.0,4]",
            "[false,4]", "[-4,0]", "[0,null]", '["0","4"]', "[[0],4]", "[0,18446744073709551616]",
            "[18446744073709551616,18446744073709551620]", "[0,1" + "0" * 5000 + "]",
        )
    ),
    *(
        Case(f"dtype {tag}", _one(dtype=f'"{tag}"'), errors.UnknownDtypeError)
        for tag in ("", "f32", "F32 ", "F8", "I4", "C32", "C128", "F8_E4M3FN", "F32\\u0000", "\\u001b[31m", "x" * 5000)
    ),
]  # fmt: skip

_SHAPES = [
    *(
        Case(f"dimension {literal[:22]} of {len(literal)} characters", _one(shape=f"[{literal}]"), errors.ShapeError)
        for literal in (
            "1.0", "1e0", "-0", "-1", "true", "false", "null", '"1"', "[1]", "{}", "1e999", "18446744073709551616",
            "1" * 5000, "-" + "1" * 5000, "1" * 40 + ".0", "18446744073709551615",
        )
    ),
    Case("product overflows", _one(shape="[9223372036854775808,2]"), errors.ShapeError),
    Case("product overflows, then 0", _one(0, shape="[9223372036854775808,2,0]", offsets="[0,0]"), errors.ShapeError),
    Case("bits overflow", _one(0, shape="[576460752303423488]", offsets="[0,2305843009213693952]"), errors.ShapeError),
    Case("100,000 huge dimensions", _one(shape=f"[{','.join(['9223372036854775807'] * 100_000)}]"), errors.ShapeError),
    Case("bad dimension after a 0", _one(0, shape="[0,-1]", offsets="[0,0]"), errors.ShapeError),
]  # fmt: skip

_OFFSET_ORDER = [
    Case("reversed", _one(offsets="[4,0]"), errors.OffsetsReversedError),
    Case("overlap", _two("[0,4]", "[2,6]", 6), errors.OffsetsOverlapError),
    Case("the same bytes twice", _two("[0,4]", "[0,4]", 4), errors.OffsetsOverlapError),
    Case("gap", _two("[0,4]", "[5,9]", 9), errors.OffsetsGapError),
    Case("gap at the start", _one(8, offsets="[4,8]"), errors.OffsetsGapError),
    Case("empty tensor inside another", whole_file(
        f'{{"a":{entry()},"z":{entry(shape="[0]", offsets="[2,2]")}}}', _DATA), errors.OffsetsOverlapError),
    Case("empty tensor after a gap", whole_file(
        f'{{"a":{entry()},"z":{entry(shape="[0]", offsets="[5,5]")}}}', bytes(5)), errors.OffsetsGapError),
    Case("too many bytes for the shape", _one(8, offsets="[0,8]"), errors.SizeMismatchError),
    Case("too few bytes for the shape", _one(shape="[2]"), errors.SizeMismatchError),
    Case("no bytes for a scalar", _one(0, shape="[]", offsets="[0,0]"), errors.SizeMismatchError),
    Case("bytes for an empty tensor", _one(shape="[0]"), errors.SizeMismatchError),
    Case("F4 ends in half a byte", _one(1, dtype='"F4"', shape="[3]", offsets="[0,1]"), errors.SizeMismatchError),
    Case("F4 rounded up", _one(2, dtype='"F4"', shape="[3]", offsets="[0,2]"), errors.SizeMismatchError),
    Case("F6 ends inside a byte", _one(2, dtype='"F6_E2M3"', shape="[2]", offsets="[0,2]"), errors.SizeMismatchError),
    Case("one byte short", GOOD[:-1], errors.TruncatedFileError),
    Case("no data at all", GOOD[:-4], errors.TruncatedFileError),
    Case("far past the end", _one(
        0, dtype='"U8"', shape="[1152921504606846976]", offsets="[0,1152921504606846976]"), errors.TruncatedFileError),
    Case("one byte too many", GOOD + b"\0", errors.TrailingBytesError),
    Case("data without a tensor", whole_file("{}", b"\0"), errors.TrailingBytesError),
    Case("two files in one", GOOD + GOOD, errors.TrailingBytesError),
]  # fmt: skip

CASES = [*_LENGTH, *_TEXT, *_NOT_JSON, *_KEYS, *_ENTRIES, *_SHAPES, *_OFFSET_ORDER]

# What looks odd and is right: (name, bytes of a whole file, names of the tensors in order).
ODD_BUT_GOOD: list[tuple[str, bytes, list[str]]] = [
    ("no tensors", whole_file("{}"), []),
    ("no tensors, padded", whole_file("{}      "), []),
    ("empty metadata", whole_file(_META % "{}", _DATA), ["a"]),
    ("white space inside", whole_file('{\n\t"a" : ' + entry() + "\r}", _DATA), ["a"]),
    ("empty name", whole_file(_NAMED % "", _DATA), [""]),
    ("escaped NUL", whole_file(_NAMED % r"\u0000", _DATA), ["\0"]),
    ("DEL and U+2028", whole_file(_NAMED % "\x7f\u2028", _DATA), ["\x7f\u2028"]),
    ("surrogate pair", whole_file(_NAMED % r"\ud83d\ude00", _DATA), ["\U0001f600"]),
    ("a backslash before ud800", whole_file(_NAMED % r"\\ud800", _DATA), ["\\ud800"]),
    ("name with -0 and NaN", whole_file(_NAMED % "-0 NaN", _DATA), ["-0 NaN"]),
    ("long name", whole_file(_NAMED % ("n" * 100_000), _DATA), ["n" * 100_000]),
    ("scalar", _one(shape="[]"), ["a"]),
    ("0 before an overflow", _one(0, shape="[0,9223372036854775808,4]", offsets="[0,0]"), ["a"]),
    ("largest dimension", _one(0, shape="[0,18446744073709551615]", offsets="[0,0]"), ["a"]),
    ("entries out of order", _two("[4,8]", "[0,4]", 8), ["b", "a"]),
    ("fields out of order", whole_file('{"a":{"shape":[1],"data_offsets":[0,4],"dtype":"F32"}}', _DATA), ["a"]),
    ("four F6", _one(3, dtype='"F6_E3M2"', shape="[4]", offsets="[0,3]"), ["a"]),
    (
        "empty tensors share an offset",
        whole_file(
            f'{{"z":{entry(shape="[0]", offsets="[0,0]")},"y":{entry(shape="[0,3]", offsets="[0,0]")},'
            f'"x":{entry(shape="[0]", offsets="[4,4]")},"a":{entry()}}}',
            _DATA,
        ),
        ["z", "y", "a", "x"],
    ),
]
