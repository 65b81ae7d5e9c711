"""The screen of `streamquant compare`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal
from rich.text import Text

from streamquant.checkpoint.header import printable
from streamquant.compare import Compared, Comparison, Side
from streamquant.folding import fold_all, spell
from streamquant.terminal import Rows

from .common import count, name_of, path_of, ratio, sentences


def comparison_view(found: Comparison, every_layer: bool = False) -> list[Rows | Text]:
    """Both files, then layer by layer (blocks folded, unless `every_layer`), then who is better for how many bytes."""
    formats_a, formats_b = _formats([layer.a for layer in found.layers]), _formats([layer.b for layer in found.layers])
    parts: list[Rows | Text] = [_file("A", found.a, found.bytes_a, formats_a), _file("B", found.b, found.bytes_b, formats_b)]
    if found.source is not None:
        parts.append(Text.assemble(("source  ", "bold"), path_of(found.source), no_wrap=True))
    parts += [Text(""), *_tables(found, every_layer)]
    for side, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            parts += sentences(f"Only in {side} ({len(names):,})", [name_of(name).plain for name in names])
    if found.unreadable:
        lines = [f"{printable(key)} {reason}" for key, reason in found.unreadable.items()]
        parts += sentences(f"Not compared ({len(lines):,})", lines)
    parts.append(Text(f"\n{_summary(found)}"))
    return parts


def _file(word: str, path: Path, nbytes: int, formats: list[str]) -> Text:
    return Text.assemble((f"{word:<8}", "bold"), f"{path_of(path)}  {decimal(nbytes)}, {printable(' and '.join(formats))}")


def _formats(sides: list[Side]) -> list[str]:
    return list(dict.fromkeys(side.format for side in sides))


def _tables(found: Comparison, every_layer: bool) -> Iterator[Rows | Text]:
    """A table for each pair of formats, headed by the pair where there are several."""
    pairs: dict[tuple[str, str], list[Compared]] = {}
    for layer in found.layers:
        pairs.setdefault((layer.a.format, layer.b.format), []).append(layer)
    for number, ((format_a, format_b), layers) in enumerate(pairs.items()):
        if len(pairs) > 1:
            space = "\n" if number else ""
            yield Text(f"{space}{printable(format_a, 40)} in A, {printable(format_b, 40)} in B:", style="bold")
        yield _layers(layers, every_layer, found.source is not None)


def _layers(layers: list[Compared], every_layer: bool, with_source: bool) -> Rows:
    """Errors against the source where there is one, else the difference of the two."""
    numbers = ("size A", "size B", *(("error A", "error B") if with_source else ("difference",)))
    listed = []
    by_key = {layer.key: layer for layer in layers}
    for keys in [[key] for key in by_key] if every_layer else fold_all(by_key):
        members = [by_key[key] for key in keys]
        name = spell(keys).removesuffix(".weight")
        row = [printable(f"{len(keys)} x {name}" if len(keys) > 1 else name)]
        row += [decimal(sum(_side(layer, side).nbytes for layer in members)) for side in "AB"]
        if with_source:
            row += [ratio(_mean([_side(layer, side).relative_error for layer in members])) for side in "AB"]
            row.append(_better(members))
        else:
            row.append(ratio(_mean([layer.difference for layer in members])))
        listed.append(row)
    return Rows(("weight", *numbers, *(("better",) if with_source else ())), numbers, listed)


def _side(layer: Compared, side: str) -> Side:
    return layer.a if side == "A" else layer.b


def _mean(errors: list[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    if not known:
        return None
    return math.fsum(known) / len(known) if all(map(math.isfinite, known)) else math.inf


def _better(layers: list[Compared]) -> str:
    won = {side: sum(layer.better == side for layer in layers) for side in "ab="}
    if won["a"] == len(layers) or won["b"] == len(layers):
        return "A" if won["a"] else "B"
    if won["="] == len(layers):
        return "="
    return " ".join(f"{name} {won[side]}" for side, name in (("a", "A"), ("b", "B"), ("=", "=")) if won[side])


def _summary(found: Comparison) -> str:
    smaller, larger = sorted((found.bytes_a, found.bytes_b))
    if smaller == larger:
        size = "Both are of one size."
    else:
        name = "A" if found.bytes_a < found.bytes_b else "B"
        size = f"{name} is smaller by {decimal(larger - smaller)} ({1 - smaller / larger:.1%})."
    alike = f" {count(found.alike, 'other tensor')} are in both." if found.alike else ""
    if found.source is None:
        return f"{size}{alike} Which is nearer to the original? --source tells."
    a, b, draw = found.count("a"), found.count("b"), found.count("=")
    equal = f", {draw:,} equal within 1 %" if draw else ""
    return f"A is nearer to the source in {count(a, 'layer')}, B in {b:,}{equal}. {size}{alike}"
