"""Architectures as data: which layers of each stay in high precision, and by which keys it is recognised.

One TOML file per architecture beside this module. `_everywhere.toml` applies to all of them, `_generic.toml` is the
safe rule for an architecture that no file recognises.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from dataclasses import dataclass, field
from importlib import resources

import regex

from streamquant.errors import UsageError

from .graph import Feed, TimeGraph, compiled, parse_feeds, parse_time

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What checkpoints put before an architecture's own names; `model.diffusion_model.` is ComfyUI's and the original's.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")


@dataclass(frozen=True)
class Preset:
    """One architecture. keep, remove: regular expressions searched in layer names and whole keys, without prefix.

    time, feeds: what is known of the architecture's graph (`streamquant.presets.graph`), for learned rounding.
    """

    name: str
    title: str
    flags: tuple[str, ...]
    order: int
    keep: tuple[str, ...]
    remove: tuple[str, ...]
    recognise_all: tuple[str, ...]
    recognise_none: tuple[str, ...]
    time: TimeGraph | None = field(default=None, compare=False)
    feeds: tuple[Feed, ...] = ()

    def recognises(self, keys: list[str]) -> bool:
        """Whether `keys` (without prefix) are this architecture's."""
        if not self.recognise_all:
            return False
        if not all(fnmatch.filter(keys, pattern) for pattern in self.recognise_all):
            return False
        return not any(fnmatch.filter(keys, pattern) for pattern in self.recognise_none)

    def keeps(self, layer: str) -> str | None:
        """The expression by which `layer` (without prefix) stays as it is, or None."""
        return _first_found(self.keep, layer)

    def removes(self, key: str) -> str | None:
        """The expression by which the tensor `key` (without prefix) is left out, or None."""
        return _first_found(self.remove, key)


@functools.cache
def _any_of(patterns: tuple[str, ...]) -> regex.Pattern:
    return regex.compile("|".join(f"(?:{pattern})" for pattern in patterns))


def _first_found(patterns: tuple[str, ...], name: str) -> str | None:
    """The first expression that is found in `name`, or None."""
    if not patterns or not _any_of(patterns).search(name):
        return None  # one search for all: most names are found by none
    return next(pattern for pattern in patterns if compiled(pattern).search(name))


@functools.cache
def load_presets() -> dict[str, Preset]:
    """Every preset by name, in the order in which recognition tries them."""
    presets = []
    for entry in resources.files(__name__).iterdir():
        if not entry.name.endswith(".toml"):
            continue
        data = tomllib.loads(entry.read_text(encoding="utf-8"))
        recognise = data.get("recognise", {})
        presets.append(
            Preset(
                name=entry.name.removesuffix(".toml"),
                title=data.get("title", ""),
                flags=tuple(data.get("flags", ())),
                order=data.get("order", 0),
                keep=tuple(data.get("keep", ())),
                remove=tuple(data.get("remove", ())),
                recognise_all=tuple(recognise.get("all", ())),
                recognise_none=tuple(recognise.get("none", ())),
                time=parse_time(data.get("time")),
                feeds=parse_feeds(data.get("feeds", [])),
            )
        )
    presets.sort(key=lambda preset: (preset.order, preset.name))
    return {preset.name: preset for preset in presets}


def everywhere() -> Preset:
    """What stays in every architecture: norms, embeddings, output heads."""
    return load_presets()["_everywhere"]


def flags() -> dict[str, str]:
    """Command-line flag (without dashes) -> preset name."""
    return {flag: preset.name for preset in load_presets().values() for flag in preset.flags}


def named(name: str) -> Preset:
    """The preset of that name or flag. Raises UsageError, listing what there is."""
    wanted = name.replace("-", "_").lower()
    for preset in load_presets().values():
        if not preset.name.startswith("_") and wanted in (preset.name, *(flag.replace("-", "_") for flag in preset.flags)):
            return preset
    known = sorted(preset for preset in load_presets() if not preset.startswith("_"))
    raise UsageError(f"There is no preset {name!r}. Known presets: auto, none, {', '.join(known)}.")


def strip_prefix(key: str, prefix: str) -> str:
    return key.removeprefix(prefix)


def find_prefix(keys: list[str]) -> str:
    """The known prefix that most keys carry, or an empty string."""
    for prefix in PREFIXES[:-1]:
        if 2 * sum(key.startswith(prefix) for key in keys) > len(keys):
            return prefix
    return ""


def recognise(keys: list[str]) -> tuple[Preset, str]:
    """The architecture of a checkpoint with these keys, and the prefix they carry; unknown ones get the generic rule."""
    prefix = find_prefix(keys)
    bare = [strip_prefix(key, prefix) for key in keys]
    for preset in load_presets().values():
        if preset.recognises(bare) or (prefix and preset.recognises(keys)):
            return preset, prefix
    return load_presets()["_generic"], prefix
