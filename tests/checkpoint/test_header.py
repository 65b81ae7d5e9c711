"""The header against the format's own reader and writer, `safetensors`, which is the oracle throughout."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import time

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import CASES, GOOD, ODD_BUT_GOOD, Case, entry, whole_file

from streamquant import errors
from streamquant.checkpoint import header as h

PATH = "models/flux dev.safetensors"
# What safetensors' writer calls a type; the two F6 types exist for its reader only.
WRITER_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2", "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensor_lists = st.dictionaries(
    texts.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(list(h.DTYPE_BITS)), shapes),
    max_size=6,
).map(lambda found: [(name, dtype, _whole(dtype, shape)) for name, (dtype, shape) in found.items()])


def _whole(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with a last dimension of 4 where the type does not fill bytes by itself."""
    return (*shape, 4) if h.DTYPE_BITS[dtype] < 8 else shape


def parse(file: bytes) -> h.Header:
    """What read_header does, without a file."""
    length = h.parse_length(file[:8], len(file), PATH)
    return h.parse_header(file[8 : 8 + length], len(file), PATH)


def rust_accepts(file: bytes) -> bool:
    try:
        safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return False
    return True


def build(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    placed = h.layout(tensors)
    return h.build_header(placed, metadata) + bytes(placed[-1].end if placed else 0)


def written_by_safetensors(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    data = ctypes.create_string_buffer(1 << 16)
    specs = {}
    for name, dtype, shape in tensors:
        # The writer counts an F4 tensor in bytes of two elements.
        spec_shape = [*shape[:-1], shape[-1] // 2] if dtype == "F4" else list(shape)
        size = h.TensorInfo(name, dtype, shape, 0, 0).elements * h.DTYPE_BITS[dtype] // 8
        specs[name] = safetensors.TensorSpec(
            dtype=WRITER_DTYPES[dtype], shape=spec_shape, data_ptr=ctypes.addressof(data), data_len=size
        )
    return safetensors.serialize(specs, metadata or None)


@pytest.mark.parametrize("case", CASES, ids=[case.name[:60] for case in CASES])
def test_malformed_file_raises_its_own_error(case: Case, tmp_path):
    path = tmp_path / "odd name.safetensors"
    path.write_bytes(case.file)
    with pytest.raises(errors.HeaderError) as caught:
        h.read_header(path)
    message = str(caught.value)
    assert caught.type is case.error, message
    assert message.startswith(f"{path}: ") and message.endswith("."), message
    assert message.isprintable() and len(message) < len(str(path)) + 500, message
    assert not re.search(r"\.\s+[A-Z]", message[len(str(path)) :]), f"more than one sentence: {message}"
    assert rust_accepts(case.file) is not case.rust_refuses


def test_corpus_covers_every_header_error():
    assert {case.error for case in CASES} == set(errors.HeaderError.__subclasses__())
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(("name", "file", "names"), ODD_BUT_GOOD, ids=[name for name, _, _ in ODD_BUT_GOOD])
def test_odd_but_good_file_is_accepted(name, file, names):
    assert list(parse(file).tensors) == names
    assert rust_accepts(file)


def test_header_fields(tmp_path):
    tensors = [("b", "BF16", (2, 3)), ("a", "F32", ()), ("c", "U8", (0,))]
    path = tmp_path / "x.safetensors"
    path.write_bytes(build(tensors, {"format": "pt"}))
    header = h.read_header(path)
    assert list(header.tensors.values()) == [
        h.TensorInfo("a", "F32", (), 0, 4),
        h.TensorInfo("b", "BF16", (2, 3), 4, 16),
        h.TensorInfo("c", "U8", (0,), 16, 16),
    ]
    assert [(t.elements, t.nbytes) for t in header.tensors.values()] == [(1, 4), (6, 12), (0, 0)]
    raw = path.read_bytes()
    assert header.metadata == {"format": "pt"} and header.size == len(raw) == header.data_start + 16
    assert header.data_start % 8 == 0 and header.sha256 == hashlib.sha256(raw[8 : header.data_start]).hexdigest()
    assert h.read_header(str(path)) == header


@pytest.mark.parametrize("dtype", [*h.DTYPE_BITS, "F6", "F8_E4M3FN", "C32", "I4"])
def test_dtypes_and_their_sizes_are_those_of_safetensors(dtype):
    sizes = [n for n in range(1, 100) if rust_accepts(
        whole_file(f'{{"a":{entry(f"{chr(34)}{dtype}{chr(34)}", "[8]", f"[0,{n}]")}}}', bytes(n)))]  # fmt: skip
    assert sizes == ([h.DTYPE_BITS[dtype]] if dtype in h.DTYPE_BITS else [])


def test_dtypes_are_complete():
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(whole_file(f'{{"a":{entry(chr(34) + "?" + chr(34))}}}', bytes(4)))
    known = re.findall("`(\\w+)`", str(caught.value).split("expected one of")[1])
    assert list(h.DTYPE_BITS) == known[::-1], "the table's order is that of the writer's Dtype enum, from its end"


@settings(max_examples=200)
@given(tensor_lists, texts, texts)
def test_build_is_byte_for_byte_what_safetensors_writes(tensors, key, value):
    tensors = [tensor for tensor in tensors if tensor[1] in WRITER_DTYPES]
    assert build(tensors, {key: value}) == written_by_safetensors(tensors, {key: value})
    if tensors:
        assert build(tensors, {}) == written_by_safetensors(tensors, {})


def test_build_orders_every_dtype_like_safetensors():
    tensors = [(f"{name}.{dtype}", dtype, (4, 4)) for dtype in sorted(WRITER_DTYPES) for name in ("b", "\u00e9", "a")]
    assert build(tensors, {}) == written_by_safetensors(tensors, {})


@settings(max_examples=200)
@given(tensor_lists, st.dictionaries(texts, texts, max_size=3))
def test_what_is_built_reads_back_the_same(tensors, metadata):
    file = build(tensors, metadata)
    header = parse(file)
    assert list(header.tensors.values()) == h.layout(tensors) and header.metadata == metadata
    assert header.data_start % 8 == 0
    seen = {name: (view["dtype"], tuple(view["shape"])) for name, view in safetensors.deserialize(file)}
    assert seen == {name: (dtype, shape) for name, dtype, shape in tensors}


_MUTANTS = [file for _, file, _ in ODD_BUT_GOOD if len(file) < 300] + [
    build([("w", "BF16", (2, 2)), ("b", "F4", (2,)), ("\u00e9", "I64", ()), ("z", "F32", (0,))], {"format": "pt"})
]
_SNIPPETS = [
    b"0", b"-", b".", b"e", b"9" * 20, b'"', b"\\", b"\\ud800", b",", b"[", b"]", b"{", b"}", b" ", b"\n", b"null",
    b"true", b"NaN", b'"a":', b'"dtype":"F32",', b"\x00", b"\xff",
]  # fmt: skip


@st.composite
def mutated_files(draw) -> bytes:
    """A good file with a few bytes replaced, dropped or put in; half of them with the length set right again."""
    file = draw(st.sampled_from(_MUTANTS))
    length = int.from_bytes(file[:8], "little")
    raw, data = bytearray(file[8 : 8 + length]), file[8 + length :]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw)))
        dropped = draw(st.integers(0, 3))
        raw[at : at + dropped] = draw(st.one_of(st.sampled_from(_SNIPPETS), st.binary(max_size=2)))
    if draw(st.booleans()):
        return whole_file(bytes(raw), data)
    return file[:8] + bytes(raw) + data


@settings(max_examples=3000)
@given(mutated_files())
def test_what_is_accepted_safetensors_accepts(file):
    try:
        header = parse(file)
    except errors.HeaderError as fault:
        assert type(fault) is not errors.HeaderError and str(fault).startswith(PATH)
        return
    seen = {name: (view["dtype"], tuple(view["shape"])) for name, view in safetensors.deserialize(file)}
    assert seen == {tensor.name: (tensor.dtype, tensor.shape) for tensor in header.tensors.values()}


@pytest.mark.parametrize("cut", range(len(GOOD)))
def test_every_truncation_is_refused(cut):
    with pytest.raises(errors.HeaderError):
        parse(GOOD[:cut])


def test_bad_build_requests():
    one = h.layout([("a", "F32", (1,))])
    for error, tensors, metadata in [
        (errors.DuplicateKeyError, one * 2, {}),
        (errors.DuplicateKeyError, h.layout([("__metadata__", "F32", (1,))]), {}),
        (errors.MetadataError, one, {"k": 1}),
        (errors.MetadataError, one, {1: "v"}),
        (errors.HeaderNotUtf8Error, h.layout([("\ud800", "F32", (1,))]), {}),
        (errors.HeaderNotUtf8Error, one, {"k": "\udfff"}),
        (errors.HeaderLengthError, one, {"k": "v" * h.MAX_HEADER_LENGTH}),
    ]:
        with pytest.raises(error, match=r"^the header to write: .*\.$") as caught:
            h.build_header(tensors, metadata)
        assert caught.type is error and str(caught.value).isprintable()


def test_bad_layouts():
    for error, dtype, shape in [
        (errors.UnknownDtypeError, "F31", (1,)),
        (errors.ShapeError, "F32", (-1,)),
        (errors.ShapeError, "F32", (2.0,)),
        (errors.ShapeError, "U8", (2**61,)),
        (errors.SizeMismatchError, "F4", (3,)),
    ]:
        with pytest.raises(error, match=r'^the header to write: tensor "a" .*\.$'):
            h.layout([("a", dtype, shape)])


def test_element_bytes():
    assert [h.element_bytes(dtype, 8) for dtype in ("C64", "BF16", "BOOL", "F6_E2M3", "F4")] == [64, 16, 8, 6, 4]
    assert h.element_bytes("F4", 0) == 0
    with pytest.raises(errors.SizeMismatchError):
        h.element_bytes("F6_E3M2", 2)
    with pytest.raises(errors.UnknownDtypeError):
        h.element_bytes("F5", 8)


def test_unreadable_files(tmp_path):
    (tmp_path / "file").write_bytes(GOOD)
    for missing in ("none.safetensors", "file/none.safetensors", "none/none.safetensors"):
        with pytest.raises(errors.SourceMissingError, match=re.escape(str(tmp_path / missing))):
            h.read_header(tmp_path / missing)
    with pytest.raises(errors.SourceReadError, match="not a regular file"):
        h.read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(errors.SourceReadError, match="not a regular file"):
        h.read_header(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(errors.SourceReadError):
        h.read_header(tmp_path / "loop")


@pytest.mark.parametrize(("name", "shown"), [
    ("blocks.0.weight", "blocks.0.weight"), ("caf\u00e9 \U0001f600", "caf\u00e9 \U0001f600"),
    ("a\n\x1b[31m\0", r"a\n\x1b[31m\x00"), ("\ud800\u202e\u2028", r"\ud800\u202e\u2028"),
    ("x" * 5000, "x" * 120 + "... (5,000 characters)"),
])  # fmt: skip
def test_printable(name, shown):
    assert h.printable(name) == shown
    assert shown.isprintable()


def test_hostile_name_is_shown_safely():
    file = whole_file('{"\\n\\u001b[2J' + "x" * 10_000 + f'":{entry(shape="[2]")}}}', bytes(4))
    with pytest.raises(errors.SizeMismatchError) as caught:
        parse(file)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_parsing_grows_linearly():
    def seconds(count: int) -> float:
        placed = h.layout((f"blocks.{i}.weight", "BF16", (64, 32)) for i in range(count))
        raw = h.build_header(placed, {})[8:]
        started = time.process_time()
        h.parse_header(raw, 8 + len(raw) + placed[-1].end, PATH)
        return time.process_time() - started

    assert seconds(40_000) < 20 * max(seconds(10_000), 0.02)
