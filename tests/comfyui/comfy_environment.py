"""Which `comfy` the tests run against: the checkout that COMFYUI_PATH names, or the stand-in beside this file.

Import this before anything of the node pack. Packages that ComfyUI imports for sound and pictures, and that loading a
model does not need, are replaced by empty modules where they are missing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from unittest import mock

COMFYUI_PATH = os.environ.get("COMFYUI_PATH", "")
IS_REAL = bool(COMFYUI_PATH)
STANDIN = Path(__file__).parent / "standin"
NOT_NEEDED = ("torchvision", "torchaudio", "kornia", "spandrel")


class _Absent(types.ModuleType):
    """A module that has whatever is asked of it, as long as nobody uses it."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: object) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def start(*flags: str) -> None:
    """Put the right `comfy` on the path and, if it is the real one, let it read its command line: --cpu and `flags`."""
    if "comfy" in sys.modules:
        return
    if not IS_REAL:
        sys.path.insert(0, str(STANDIN))
        return
    missing = tuple(name for name in NOT_NEEDED if importlib.util.find_spec(name) is None)
    sys.meta_path.append(_AbsentFinder(missing))
    sys.path.insert(0, COMFYUI_PATH)
    arguments, sys.argv = sys.argv, ["main.py", "--cpu", *flags]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = arguments
