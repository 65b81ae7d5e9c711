"""The screens of `streamquant inspect`."""

from __future__ import annotations

from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from streamquant.checkpoint.header import printable
from streamquant.folding import fold_all, spell
from streamquant.inspect import SCALES_PER_LAYER, Group, Inspection
from streamquant.stored import StoredLayer
from streamquant.stored.gguf import GgufSummary
from streamquant.terminal import Part, Phrase, Rows

from .common import count, name_of, path_line, path_of, sentences, shape_of, table

METADATA_SHOWN = 8
MAX_LEVELS = 24  # of a tree; what is left of a name stays in one piece
VALUE_LENGTH = 60
WHOLE_FORMAT = 24  # characters of a format's name, all of ours and more, that a narrow terminal leaves whole


def inspection_view(found: Inspection) -> list[Part]:
    """One checkpoint on one screen."""
    parts = [*_heading(found), _formats(found)]
    if any(group.sampled for group in found.groups):
        parts.append(Text(f"≈ from the first {SCALES_PER_LAYER:,} scales of each layer at the most", style="dim"))
    parts.append(Text.assemble("\n", ("loads in  ", "bold"), found.loaders))
    if found.config:
        parts.append(_line("config", f"{found.config} (config.json)"))
    parts += [_line("made by", text) for text in _provenance(found)]
    if found.hashed:
        parts.append(_line("hashes", f"{count(found.hashed, 'tensor')}: streamquant verify checks them"))
    if found.metadata:
        parts.append(_line("metadata", _metadata(found.metadata)))
    if found.foreign:
        parts += sentences("In layouts of other tools", [f"{tool}: {count(n, 'tensor')}" for tool, n in found.foreign.items()])
    if found.faults:
        faults = [f"{printable(name)}: {fault}" if name else fault for name, fault in found.faults]
        parts += sentences(f"Wrong as it stands ({len(faults)})", faults)
    return parts


def _heading(found: Inspection) -> list[Text]:
    files = f" in {found.files} shards" if found.files > 1 else ""
    size = f"{decimal(found.nbytes)}{files}, {count(found.tensors, 'tensor')}, {_large(found.weights)} weights"
    prefix = f", prefix {printable(found.prefix)}" if found.prefix else ""
    # A preset whose name starts with an underscore stands for no architecture.
    preset = "" if found.preset.startswith("_") else f" (preset {found.preset})"
    if found.adapter is not None:
        what = [f"a {found.adapter.kind} of {count(found.adapter.layers, 'layer')}", found.adapter.rank_in_words]
        what.append(f"alpha {' to '.join(f'{alpha:g}' for alpha in dict.fromkeys((found.alphas[0], found.alphas[-1])))}"
                    if found.alphas else "")  # fmt: skip
        words = f"{', '.join(filter(None, what))}: not a checkpoint to convert\n"
        return [path_line(found.path), Text(size), Text(words)]
    architecture = "architecture not recognised" if found.preset.startswith("_") else found.architecture
    return [path_line(found.path), Text(size), Text(f"{architecture}{preset}{prefix}\n")]


def _large(number: int) -> str:
    """A count as people say it: 32.2 billion."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,}"


def _formats(found: Inspection) -> Table:
    whole = ("scale range", *(["format"] if all(len(group.format) <= WHOLE_FORMAT for group in found.groups) else []))
    made = table("format", "scales", "layers", "size", "bits", "scale range", right=("layers", "size", "bits"), whole=whole)
    for group in found.groups:
        made.add_row(
            name_of(group.format, 40), Phrase(group.detail), f"{group.layers:,}", decimal(group.nbytes),
            f"{group.bits_per_weight:.2f}", _range(group),
        )  # fmt: skip
    for kept in found.kept:
        bits = f"{8 * kept.nbytes / kept.elements:.2f}" if kept.elements else ""
        made.add_row(kept.dtype, "as it is", f"{kept.tensors:,}", decimal(kept.nbytes), bits, "")
    made.add_section()
    layers = sum(group.layers for group in found.groups) + sum(kept.tensors for kept in found.kept)
    bits = f"{8 * found.nbytes / found.weights:.2f}" if found.weights else ""
    made.add_row("file", "", f"{layers:,}", decimal(found.nbytes), bits, "", style="bold")
    return made


def _range(group: Group) -> str:
    if group.scale_range is None:
        return ""
    low, high = group.scale_range
    text = f"{low:.3g}" if low == high else f"{low:.2g} to {high:.2g}"
    return f"≈ {text}" if group.sampled else text


def _line(word: str, text: str) -> Text:
    return Text.assemble((f"{word:<9} ", "bold"), text)


def _provenance(found: Inspection) -> list[str]:
    """One sentence per distinct conversion."""
    said = []
    for entry in found.provenance:
        listed = entry.get("source")
        sources = [part.get("name", "?") for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []
        source = printable(str(sources[0])) + (f" and {len(sources) - 1} more" if len(sources) > 1 else "") if sources else "?"
        what = "decoded" if entry.get("dequantized") else _recipe(entry.get("recipe") or {})
        said.append(f"streamquant {printable(str(entry.get('version', '?')), 20)} from {source}: {what}")
    return list(dict.fromkeys(said))


def _recipe(recipe: Any) -> str:
    """A recorded recipe in a few words."""
    if not isinstance(recipe, dict):
        return "?"
    knowledge = _knowledge(recipe.get("learned"))
    words = [_choice(recipe.get("base"), knowledge)]
    if recipe.get("custom_layers"):
        words.append(f"{printable(str(recipe['custom_layers']), VALUE_LENGTH)} as {_choice(recipe.get('custom'), knowledge)}")
    if recipe.get("exclude_layers"):
        words.append(f"without {printable(str(recipe['exclude_layers']), VALUE_LENGTH)}")
    if isinstance(recipe.get("layer_config"), list) and recipe["layer_config"]:
        words.append(f"layer config of {len(recipe['layer_config'])}")
    presets = recipe.get("preset")
    if isinstance(presets, list) and presets:
        words.append(f"preset {printable(', '.join(map(str, presets)), VALUE_LENGTH)}")
    return ", ".join(words)


def _knowledge(learned: Any) -> str:
    """What a recorded recipe rounded by, where it did not say nearest."""
    given = learned if isinstance(learned, dict) else {}
    if given.get("objective") == "svd":
        return "rounded for the largest singular directions"
    by = [word for word, key in (("calibration", "calibration_xxh3_64"), ("structure", "structure")) if given.get(key)]
    return f"learned rounding by {' and '.join(by)}" if by else "as it comes, without calibration"


def _choice(choice: Any, knowledge: str) -> str:
    """A recorded format and how it was rounded. knowledge: in words, of learned rounding."""
    if not isinstance(choice, dict):
        return "?"
    rounding = choice.get("rounding")
    how = knowledge if rounding == "learned" else f"{printable(str(rounding), 20)} rounding"
    return printable(str(choice.get("format", "?")), 40) + (f" ({how})" if rounding else "")


def _metadata(metadata: dict[str, str]) -> str:
    shown = [
        f"{printable(key, 40)} = {printable(' '.join(text.split()), VALUE_LENGTH)}"
        for key, text in list(metadata.items())[:METADATA_SHOWN]
    ]
    more = len(metadata) - METADATA_SHOWN
    return "; ".join(shown) + (f"; and {more} more (--json lists all)" if more > 0 else "")


def layers_view(found: Inspection) -> Rows:
    """Every tensor, one row each: quantized layers, then what is as it is."""
    listed = []
    for layer in found.contents.layers.values():
        bits = f"{layer.bits_per_weight:.2f}"
        words = [printable(layer.name), printable(layer.format, 40), layer.detail, shape_of(layer.shape)]
        listed.append([*words, decimal(layer.nbytes), bits])
    for name, tensor in found.contents.plain.items():
        info = tensor.info
        bits = f"{8 * info.nbytes / info.elements:.2f}" if info.elements else ""
        listed.append([printable(name), info.dtype, "as it is", shape_of(info.shape), decimal(info.nbytes), bits])
    return Rows(("layer", "format", "scales", "shape", "size", "bits"), ("size", "bits"), listed)


def tree_view(found: Inspection) -> Tree:
    """The names as a tree, blocks that differ by a number folded into one."""
    contents = found.contents
    named: dict[str, StoredLayer | Any] = dict(contents.layers) | contents.plain
    root: dict[str, Any] = {}
    for names in fold_all(named):
        branch = root
        parts = spell(names).split(".", MAX_LEVELS)
        for part in parts[:-1]:
            branch = branch.setdefault(part, {})
        branch.setdefault(parts[-1], {})[None] = [named[name] for name in names]
    tree = Tree(Text(path_of(found.path), style="green"))
    _grow(tree, root)
    return tree


def _grow(tree: Tree, branch: dict[str, Any]) -> None:
    for part, below in branch.items():
        if part is None:
            continue
        label = part
        while None not in below and len(below) == 1:
            part, below = next(iter(below.items()))
            label = f"{label}.{part}"
        child = tree.add(Text.assemble(printable(label), *(("  " + text, "dim") for text in _leaf(below.get(None, [])))))
        _grow(child, below)


def _leaf(members: list[Any]) -> list[str]:
    """What stands behind a folded name."""
    if not members:
        return []
    formats, shapes, size = {}, {}, 0
    for member in members:
        is_layer = isinstance(member, StoredLayer)
        formats[f"{member.format}, {member.detail}" if is_layer else member.info.dtype] = None
        shapes[shape_of(member.shape if is_layer else member.info.shape)] = None
        size += member.nbytes if is_layer else member.info.nbytes
    shape = next(iter(shapes)) if len(shapes) == 1 else f"{len(shapes)} shapes"
    times = f"{len(members)} x " if len(members) > 1 else ""
    return [f"{times}{shape}", printable(" or ".join(formats)), decimal(size)]


def gguf_view(found: GgufSummary) -> list[Table | Text]:
    """A GGUF file, as far as its header tells."""
    weights = f", {_large(found.weights)} weights" if found.weights else ""
    about = [part for part in (found.architecture, found.file_type) if part]
    parts: list[Table | Text] = [
        path_line(found.path),
        Text(f"{decimal(found.nbytes)}, {count(found.tensors, 'tensor')}{weights}"),
        Text(f"GGUF version {found.version}{''.join(f', {printable(part)}' for part in about)}\n"),
    ]
    if found.types:
        made = table("type", "tensors", "size", "bits", right=("tensors", "size", "bits"))
        for kind in found.types:
            row = [f"{kind.tensors:,}", decimal(kind.nbytes), f"{kind.bits_per_weight:.2f}"]
            made.add_row(name_of(kind.name, 40), *row)
        parts.append(made)
    elif not found.complete:
        parts.append(Text("Its types are not shown: that needs the gguf package (pip install gguf)."))
    parts += [Text(""), _line("loads in", "llama.cpp, and ComfyUI with a node pack for GGUF; streamquant does not convert it")]
    if found.metadata:
        parts.append(_line("metadata", _metadata({name: str(value) for name, value in found.metadata.items()})))
    return parts
