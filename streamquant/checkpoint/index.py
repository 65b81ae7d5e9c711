"""The index of a shard set, `*.index.json`: which file holds which tensor. It comes from a download, and is not trusted."""

from __future__ import annotations

import errno
import stat
from pathlib import Path, PurePosixPath

from streamquant import errors
from streamquant.checkpoint.header import Header, printable
from streamquant.checkpoint.json_text import load_json

MAX_INDEX_BYTES = 100_000_000


def read_index(path: Path) -> dict[Path, set[str]]:
    """Shard paths -> the tensors the index lists in them, in order of shard name. Raises a CheckpointError."""
    where = printable(str(path), 300)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a named pipe would wait for ever, a device never end
            raise errors.SourceReadError(f"{where}: this is not a regular file; give the path of a shard index.")
        if found.st_size > MAX_INDEX_BYTES:
            raise errors.IndexFileError(f"The index {where} is larger than {MAX_INDEX_BYTES:,} bytes: it is damaged.")
        document = load_json(path.read_bytes())
        weight_map = document.get("weight_map") if isinstance(document, dict) else None
        well_formed = isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())
    except OSError as error:
        raise errors.SourceReadError(f"Cannot read the index {where}: {error.strerror}.") from None
    except ValueError as error:
        raise errors.IndexFileError(f"The index {where} is malformed ({printable(str(error))}): download it again.") from None
    if not well_formed:
        raise errors.IndexFileError(f"The index {where} needs a weight_map from tensor names to shard files.")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(shard, set()).add(tensor)
    return {_shard_path(path, name): shards[name] for name in sorted(shards)}


def _shard_path(index: Path, name: str) -> Path:
    """The file of that name beside the index. It is data from a download: it must name a file in the index's own folder, on
    any system, and a link there must not lead out of it.
    """
    where = f"The index {printable(str(index), 300)} names the shard '{printable(name)}'"
    if not _stays_inside(name):
        raise errors.ShardOutsideFolderError(f"{where}, which is outside its own folder: do not trust it, download it again.")
    path = index.parent / name
    try:
        found = path.stat()
        real = path.resolve(strict=True)
        homes = _homes(index)
    except ValueError:  # a name that no filesystem takes
        raise errors.ShardMissingError(f"{where}, which is not there: download it.") from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            raise errors.ShardMissingError(f"{where}, which is not there ({error.strerror}): download it.") from None
        raise errors.SourceReadError(f"{where}, which cannot be read ({error.strerror}).") from None
    if not stat.S_ISREG(found.st_mode):
        raise errors.ShardMissingError(f"{where}, which is no regular file: download it.")
    if not any(real.is_relative_to(home) for home in homes):
        raise errors.ShardOutsideFolderError(
            f"{where}, which is a link out of its own folder, to {printable(str(real), 300)}: put the file itself there."
        )
    return path


def _homes(index: Path) -> list[Path]:
    """Folders in which the shards of an index may really lie: its own; the one where it lies itself, if it is a link; and of a
    Hugging Face cache, whose snapshots/ are links into the blobs/ beside them, those."""
    folder = index.parent.resolve()
    blobs = [above.parent / "blobs" for above in folder.parents if above.name == "snapshots"]
    return [folder, index.resolve().parent, *blobs]


# Names that Windows takes for devices, with any ending.
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789¹²³")}


def _stays_inside(name: str) -> bool:
    """Whether a shard's name, taken on any system, names something below its folder. Windows drops dots and spaces at the end
    of a part, so that ".. " is the folder above."""
    if not name or name.startswith("/") or any(character in name for character in '\\:\0'):
        return False
    parts = PurePosixPath(name).parts
    return bool(parts) and not any(part != part.rstrip(". ") or part.split(".")[0].upper() in _DEVICES for part in parts)


def check_shard(index: Path, shard: Path, header: Header, listed: set[str]) -> None:
    """Raise ShardContentError when a shard does not hold the tensors that its index lists in it, and no others."""
    where = f"{printable(shard.name)} and its index {printable(index.name)}"
    if missing := sorted(listed - header.tensors.keys()):
        raise errors.ShardContentError(f"{where} disagree: the shard lacks {printable(missing[0])!r} ({len(missing)} in all).")
    if surplus := sorted(header.tensors.keys() - listed):
        raise errors.ShardContentError(
            f"{where} disagree: the shard holds {printable(surplus[0])!r}, which is not listed for it ({len(surplus)} in all)."
        )
