"""Putting the node pack into a ComfyUI: a link to its folder, and a look at whether that ComfyUI's Python can import it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from streamquant.checkpoint.header import printable
from streamquant.errors import DestinationWriteError, OutputExistsError, PreflightError, UsageError

NODE_FOLDER = "streamquant-loader"
PACK = "comfyui_quantops"
# Where the Pythons of the usual installations are, from ComfyUI's folder: a virtual environment, the Windows portable one.
PYTHONS = (
    ".venv/bin/python",
    "venv/bin/python",
    ".venv/Scripts/python.exe",
    "venv/Scripts/python.exe",
    "../python_embeded/python.exe",
)
# Finds the library as the pack itself does, without starting ComfyUI: its command line would be read as ours.
CHECK = "import sys; sys.path.insert(0, sys.argv[1]); import library; library.find(); import streamquant, torch, comfy_kitchen"


class NotComfyUIError(UsageError):
    """The folder given is no ComfyUI."""


class EnvironmentLacksError(PreflightError):
    """ComfyUI's Python cannot import what the node pack needs. The pack is linked all the same."""


@dataclass(frozen=True)
class Installation:
    """What `install` did. pack: where the node pack is. target: its name in custom_nodes. python: whose imports were tried.

    linked: False when the files had to be copied, because the system allows no links.
    """

    pack: Path
    target: Path
    python: Path
    linked: bool


def pack_folder() -> Path:
    """The node pack: beside this package in a checkout, inside it when installed. Raises UsageError when it is neither."""
    here = Path(__file__).resolve().parent
    for folder in (here / PACK, here.parent / PACK):
        if (folder / "__init__.py").is_file():
            return folder.resolve()
    raise UsageError("This installation of streamquant has no ComfyUI nodes: install it from a checkout of its repository.")


def install(
    comfyui: str | os.PathLike[str], python: str | os.PathLike[str] | None = None, *, force: bool = False
) -> Installation:
    """Link the node pack into `comfyui`/custom_nodes, and check that its Python can import what the pack needs.

    python: ComfyUI's interpreter; None looks for one in the folder's usual places, and takes this one where there is none.
    force: replace what has the name already, if it is a link. Installing twice changes nothing.
    Raises NotComfyUIError, OutputExistsError, DestinationWriteError, and EnvironmentLacksError after linking.
    """
    root, pack = Path(comfyui).expanduser(), pack_folder()
    where = printable(str(root), 300)
    if not ((root / "main.py").is_file() and (root / "comfy").is_dir() and (root / "custom_nodes").is_dir()):
        raise NotComfyUIError(f"{where} is no ComfyUI: give the folder that holds its main.py and custom_nodes.")
    target = root / "custom_nodes" / NODE_FOLDER
    linked = _link(pack, target, force)
    interpreter = Path(python) if python is not None else find_python(root)
    check_imports(interpreter, pack)
    return Installation(pack, target, interpreter, linked)


def find_python(root: Path) -> Path:
    """The interpreter that belongs to a ComfyUI folder, or the one that runs this."""
    found = (root / place for place in PYTHONS)
    return next((path for path in found if path.is_file()), Path(sys.executable))


def _link(pack: Path, target: Path, force: bool) -> bool:
    """Make `target` lead to `pack`; returns whether by a link. Raises OutputExistsError, DestinationWriteError."""
    shown = printable(str(target), 300)
    if target.exists() and target.resolve() == pack:
        return target.is_symlink()
    try:
        if target.is_symlink() and (force or not target.exists()):
            target.unlink()
        if target.exists():
            raise OutputExistsError(f"{shown} exists and is not this node pack: remove it, or use --force if it is a link.")
        try:
            target.symlink_to(pack, target_is_directory=True)
            return True
        except (OSError, NotImplementedError):
            if os.name != "nt":
                raise
            # Windows allows links to administrators and developers only.
            shutil.copytree(pack, target, ignore=shutil.ignore_patterns("__pycache__"))
            return False
    except OSError as error:
        raise DestinationWriteError(
            f"{shown} cannot be made ({error.strerror or error}): check the folder's rights."
        ) from error


def check_imports(python: Path, pack: Path) -> None:
    """Raise EnvironmentLacksError unless this interpreter imports streamquant, torch and comfy-kitchen."""
    shown = printable(str(python), 300)
    try:
        done = subprocess.run(
            [str(python), "-c", CHECK, str(pack)], capture_output=True, text=True, timeout=300, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentLacksError(f"{shown} does not run ({error}): name ComfyUI's Python with --python.") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EnvironmentLacksError(
            f"The nodes are in place, but {shown} cannot import what they need ({printable(last, 300)}): install it there, "
            f"with `{shown} -m pip install streamquant`, or name ComfyUI's Python with --python."
        )
