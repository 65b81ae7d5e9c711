"""What the fuzzers start from: small inputs of every kind, right and malformed, made here rather than committed.

    python tests/fuzz/corpus.py FOLDER        writes them, a folder for each target (PYTHONPATH as `campaign.py` sets it)
"""

from __future__ import annotations

import json
import math
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from malformed import CASES, ODD_BUT_GOOD
from small_checkpoints import EVERY_FORMAT, Tensor, floats, of_values, save

LARGEST = 1 << 15  # bytes of a seed: what is larger is mutated slowly and teaches nothing more


def _json(value: object) -> Tensor:
    data = json.dumps(value).encode()
    return Tensor("U8", (len(data),), data)


def _codes(dtype: str, *shape: int) -> Tensor:
    count = math.prod(shape)
    return Tensor(dtype, shape, np.random.default_rng(count).integers(0, 120, count, dtype=np.uint8).tobytes())


def _numbers(*shape: int) -> Tensor:
    return of_values(np.random.default_rng(1).random(shape) + 0.5, "F32")


def header() -> list[bytes]:
    """Every malformed kind, and what looks odd and is right."""
    return [case.file for case in CASES if len(case.file) <= LARGEST] + [file for _, file, _ in ODD_BUT_GOOD if len(file) <= LARGEST]


def index() -> list[bytes]:
    """Shard indexes for the two shards that the target has: right, wrong, hostile."""
    right = {"a.weight": "1.safetensors", "b.weight": "2.safetensors"}
    maps: list[object] = [right, {}, [], None, {"a.weight": 1}, {"a.weight": "1.safetensors"}]
    for name in ("../1.safetensors", "/etc/passwd", "C:\\x", "NUL", "", ".", "..", "link.safetensors", "pipe", "sub/1.safetensors",
                 "1.safetensors\0", "\x1b[31m", "\ud800", "n" * 300, "./1.safetensors", "1.safetensors/", "1.safetensors."):  # fmt: skip
        maps.append(right | {"b.weight": name})
    documents = [json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}) for weight_map in maps]
    documents += ["{}", "[]", "null", "", "{", '{"weight_map":{},"weight_map":{}}', "[" * 2000, '{"weight_map":' + "9" * 5000 + "}"]
    return [document.encode() for document in documents] + [b"\xff\xfe{", b"\xef\xbb\xbf{}"]


def layer_config() -> list[bytes]:
    """Layer configs; the first byte says whether the rest is TOML or JSON."""
    toml = ["['blocks\\.0']\nformat = 'int8'\nscaling_mode = 'row'\n", "[a]\nformat='nf4'\nblock_size=64\ndouble_quant=true\n",
            "a = 'keep'\n", "[x", "a.b.c = 1", "a = 9223372036854775808", "a = inf", "a = 1979-05-27T07:32:00Z", "['(']\nformat='fp8'",
            "a = " + "[" * 1500, "['(a+)+$']\nformat='fp8'"]  # fmt: skip
    documents = [{"a": "fp8"}, {"a": {"format": "int8", "scaling_mode": "block", "block_size": 64}}, {"(": "keep"}, {}, [], None,
                 {"a": {"format": "int8", "convrot": True, "convrot_group_size": 10**30}}, {"\ud800": "fp8"}]  # fmt: skip
    texts = [json.dumps(document) for document in documents] + ['{"a":"fp8","a":"fp8"}', "[" * 5000, '{"a":' + "1" * 5000 + "}", "NaN"]
    return [b"\0" + text.encode() for text in toml] + [b"\1" + text.encode() for text in texts]


def pattern() -> list[bytes]:
    """Regular expressions: sane, odd, catastrophic, invalid."""
    texts = ["blocks", r"^(double|single)_blocks\.\d+\.", r"(?i)IMG", r"(?<=a)b", r"(a)\1", "(a+)+$", r"^(\w|a|aa)+\.x", "", "(",
             "a**", "[z-a]", r"\p{Foo}", r"\L<x>", "(?V0)(?V1)a", "(?P<x>a)(?&x)", "(?:ab){e<=2}", "a{1000000000}", "(?R)", "(?r)ab",
             r"\N{GREEK}", "((((((((((a))))))))))", "(?L)a", "a{1000}{1000}", "(?b)(?e)x{i<=3}", r"\X+\R", "(?(1)a|b)", "[[a]--[b]]"]  # fmt: skip
    return [text.encode() for text in texts]


def calibration() -> list[bytes]:
    """A sketch and a dense calibration file, and what is wrong with others."""
    meta = {"format": "streamquant-calibration", "version": "1", "kind": "sketch", "seed": "0", "keys": "module"}
    count = Tensor("I64", (), (7).to_bytes(8, "little"))
    sketch = {"a.count": count, "a.mean": _numbers(16), "a.diagonal": _numbers(16), "a.sketch": _numbers(16, 4)}
    dense = {"a.count": count, "a.mean": _numbers(6), "a.diagonal": _numbers(6), "a.hessian": of_values(np.eye(6), "F32")}
    wide = dense | {"a.diagonal": Tensor("F32", (1,) * 70, bytes(4))}
    huge = sketch | {"a.sketch": of_values(np.full((16, 4), 3e38), "F32"), "a.diagonal": of_values(np.full(16, 3e38), "F32")}
    files = [(sketch, meta), (dense, meta | {"kind": "dense"}), (sketch | {"b.count": count}, meta), (sketch, {}), (wide, meta),
             (huge, meta), ({}, meta), (dense, meta), (sketch | {"a.hessian": _numbers(16, 16)}, meta)]  # fmt: skip
    return [_bytes(tensors, metadata) for tensors, metadata in files]


def journal() -> list[bytes]:
    """Journals: the lines without their checksums, which the target puts before them."""
    lines = [
        {"journal": 1, "fingerprint": {"source": [{"name": "a"}], "recipe": {"base": {"format": "fp8"}}}},
        {"unit": 0, "learned": 1.5}, {"unit": 0, "end": 4, "state": None, "hashes": ["0" * 16]}, {"unit": 0, "hashes": []},
        {"durable": 3}, {"published": 0},
    ]  # fmt: skip
    texts = [json.dumps(line) for line in lines]
    odd = ['{"unit":[]}', '{"durable":"x"}', '{"published":{}}', '{"learned":1}', "[" * 2000, "9" * 5000, "{}", "null", '"\\ud800"', "{"]
    whole = "\n".join(texts)
    return [whole.encode(), b"", *(f"{texts[0]}\n{line}".encode() for line in odd), *(line.encode() for line in odd),
            b'{"journal":1}', b'{"journal":true,"fingerprint":[]}', b"\xff\xfe"]  # fmt: skip


def gguf() -> list[bytes]:
    """GGUF headers: of every kind of value and some types of tensors, in both byte orders; cut short, and with counts of what is not there."""
    return [seed for order in "<>" for seed in _gguf(order)] + [b"GGUF", b"GGUF\3\0\0\0", b"GGML" + bytes(40)]


def _gguf(order: str) -> list[bytes]:
    def packed(code: str, *values: object) -> bytes:
        return struct.pack(order + code, *values)

    def text(value: str) -> bytes:
        return packed("Q", len(value.encode())) + value.encode()

    def file(entries: dict[str, bytes], tensors: dict[str, bytes], data: int = 0, version: int = 3) -> bytes:
        head = b"GGUF" + packed("IQQ", version, len(tensors), len(entries))
        head += b"".join(text(name) + part for part_of in (entries, tensors) for name, part in part_of.items())
        return head + bytes(-len(head) % 32 + data)

    def tensor(kind: int, offset: int, *shape: int) -> bytes:
        return packed(f"I{len(shape)}QIQ", len(shape), *shape, kind, offset)

    largest = (255, -2, 65535, -2, (1 << 32) - 1, -2, 0.1, True, (1 << 64) - 1, -2, 0.1)
    numbers = {f"n.{kind}": packed(f"I{code}", kind, value)
               for kind, code, value in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", largest, strict=True)}  # fmt: skip
    texts = {"general.architecture": packed("I", 8) + text("flux"), "general.name": packed("I", 8) + text("ü" * 400),
             "general.file_type": packed("II", 4, 15), "general.alignment": packed("II", 4, 32)}  # fmt: skip
    lists = {"l.i": packed("IIQ3i", 9, 5, 3, 1, 2, 3), "l.t": packed("IIQ", 9, 8, 2) + text("a") + text("b"), "l.none": packed("IIQ", 9, 8, 0),
             "l.l": packed("IIQ", 9, 9, 2) + packed("IQB", 0, 1, 7) * 2}  # fmt: skip
    tensors = {"a": tensor(0, 0, 8, 2), "b": tensor(8, 64, 32), "c": tensor(12, 128, 256), "d": tensor(30, 288, 4, 1), "e": tensor(1, 0)}
    whole = file({**texts, **numbers, **lists}, tensors, 320)
    endless = [packed("IIQ", 9, kind, 1 << 60) for kind in (0, 7, 8, 9)] + [packed("IQ", 8, (1 << 64) - 1), packed("I", 13), packed("I", 99)]
    odd = [tensor(0, 1 << 63, 1), tensor(0, 0, 1 << 63, 1 << 63), tensor(0, 0, 0, 1 << 63), tensor(2, 0, 33), tensor(77, 0, 1),
           packed("I", (1 << 32) - 1), tensor(0, 0, *[1] * 33), tensor(8, 0)]  # fmt: skip
    return [
        whole, file(texts, {}), file(numbers, {}), file(lists, {}), file({}, tensors, 320), file({}, {}), file({}, tensors, 320, version=2),
        *(file({}, {}, version=version) for version in (0, 1, 4, 1 << 31)), *(whole[:end] for end in (20, 24, 60, 300, len(whole) - 8)),
        *(file({"a": value}, {}) for value in endless), *(file({}, {"t": value}, 64) for value in odd),
        *(file({"general.alignment": packed(f"I{code}", kind, value)}, {"a": tensor(0, 0, 1)}, 64)
          for code, kind, value in (("I", 4, 0), ("I", 4, 24), ("I", 4, 1 << 31), ("Q", 10, 32))),
        b"GGUF" + packed("IQQ", 3, 1 << 60, 1 << 60), b"GGUF" + packed("IQQ", 3, 2, 0) + (text("t") + tensor(0, 0, 1)) * 2 + bytes(64),
        b"GGUF" + packed("IQQ", 3, 0, 1) + text("a") + packed("I", 9) + packed("IQ", 9, 1) * 2000,
        file({}, {"\x1b[2J\u202e": tensor(77, 0, 1)}, 64),
        file({"\x1b[2J": packed("I", 8) + text("\u202e[red]\0"), "GGUF.version": packed("IB", 0, 1)}, {"\x1b": tensor(0, 0, 1)}, 64),
    ]  # fmt: skip


def stored() -> list[bytes]:
    """Small files in every layout that is read: those our converter writes, and others' with codes of any value."""
    return [*_written(), *(_bytes({f"l.{suffix}": tensor for suffix, tensor in found.items()}, metadata) for found, metadata in _others())]


def _written() -> list[bytes]:
    import streamquant

    files = []
    tensors = {"a.weight": floats(32, 64, seed=1), "b.0.weight": floats(16, 16, seed=2), "n.bias": floats(8, dtype="F32")}
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "source.safetensors", Path(folder) / "output.safetensors"
        files.append(save(source, tensors, {"modelspec.title": "seed"}).read_bytes())
        for recipe in EVERY_FORMAT.values():
            streamquant.convert(source, output, replace(recipe, preset=("none",)), force=True)
            files.append(output.read_bytes())
    return files


def _others() -> list[tuple[dict[str, Tensor], dict[str, str]]]:
    state = {"shape": [8, 64], "blocksize": 64, "quant_type": "nf4", "dtype": "bfloat16"}
    nested = state | {"nested_blocksize": 256, "nested_offset": 0.1, "nested_dtype": "float32"}
    blocks = {"weight": _codes("U8", 256, 1), "weight.absmax": _numbers(8), "weight.quant_map": _numbers(16)}
    named = "weight.quant_state.bitsandbytes__nf4"
    listed = json.dumps({"format_version": "1.0", "layers": {"l": {"format": "float8_e4m3fn"}}})
    scaled = {"weight": _codes("F8_E4M3", 16, 32), "weight_scale": _numbers()}
    return [
        ({"weight": _codes("U8", 16, 16), "weight_scale": _codes("U8", 128, 4), "weight_scale_2": _numbers(),
          "comfy_quant": _json({"format": "nvfp4", "orig_shape": [15, 31]})}, {}),
        ({"weight": _codes("F8_E4M3", 32, 64), "weight_scale": _codes("U8", 128, 4),
          "comfy_quant": _json({"format": "mxfp8", "orig_shape": [31, 60]})}, {}),
        ({"weight": _codes("I8", 16, 64), "weight_scale": _numbers(16, 1),
          "comfy_quant": _json({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64})}, {}),
        ({"weight": _codes("I8", 16, 32), "weight_scale": _numbers(16),
          "comfy_quant": _json({"format": "convrot_w4a4", "convrot_groupsize": 64})}, {}),
        ({"weight": _codes("I8", 16, 32), "SCB": _numbers(16), "weight_format": _codes("U8")}, {}),
        ({"weight": _codes("F8_E4M3", 16, 32), "weight_scale_inv": _numbers(2, 1)}, {}),
        ({"weight": _codes("F8_E5M2", 16, 32), "scale_weight": _numbers(), "scaled_fp8": _codes("F8_E5M2", 2)}, {}),
        (scaled, {"_quantization_metadata": listed}),
        (scaled | {"comfy_quant": _json({"format": "int8_blockwise", "group_size": 7})}, {"_quantization_metadata": listed}),
        ({**blocks, named: _json(state)}, {}),
        ({**blocks, "weight.absmax": _codes("U8", 8), "weight.nested_absmax": _numbers(1),
          "weight.nested_quant_map": _numbers(256), named: _json(nested)}, {}),
        ({"weight": _codes("U8", 256), "weight_scale": _numbers(8), "weight_code": _numbers(16),
          "comfy_quant": _json({"format": "nf4", "shape": [8, 64], "blocksize": 64})}, {}),
        ({"qweight": _codes("I8", 4, 4), "weight": _codes("F8_E4M3", 4, 4)}, {"streamquant": '{"tensor_xxh3_64":"00"}'}),
    ]  # fmt: skip


def _bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return save(Path(folder) / "seed", tensors, metadata).read_bytes()


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "header": header, "index": index, "layer_config": layer_config, "pattern": pattern, "stored": stored, "plan": stored,
    "calibration": calibration, "journal": journal, "write": header, "gguf": gguf,
}  # fmt: skip


def write(folder: Path) -> None:
    """All seeds as files, a folder for each target."""
    for target, make in SEEDS.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(make()):
            (folder / target / f"seed-{number:03d}").write_bytes(seed)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
