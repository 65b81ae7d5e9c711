"""Linking the node pack into a ComfyUI folder."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from streamquant.comfyui_install import EnvironmentLacksError, NotComfyUIError, find_python, install, pack_folder
from streamquant.errors import OutputExistsError


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    root = tmp_path / "ComfyUI"
    (root / "custom_nodes").mkdir(parents=True)
    (root / "comfy").mkdir()
    (root / "main.py").write_text("")
    return root


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """A Python that imports whatever it is asked to: importing torch takes seconds."""
    python = tmp_path / "content-python"
    python.write_text("#!/bin/sh\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def test_the_pack_is_linked_and_importable(comfyui):
    done = install(comfyui)
    assert done.target == comfyui / "custom_nodes" / "streamquant-loader"
    assert done.linked
    assert done.target.resolve() == pack_folder()
    assert (done.target / "__init__.py").is_file()
    assert done.python == Path(sys.executable)


def test_twice_is_once(comfyui, content):
    assert install(comfyui, content) == install(comfyui, content)


def test_a_folder_that_is_no_comfyui(tmp_path):
    with pytest.raises(NotComfyUIError, match="is no ComfyUI"):
        install(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(comfyui):
    other = comfyui / "custom_nodes" / "streamquant-loader"
    other.mkdir()
    (other / "mine.py").write_text("")
    for force in (False, True):
        with pytest.raises(OutputExistsError):
            install(comfyui, force=force)
    assert (other / "mine.py").is_file()


def test_a_link_elsewhere_is_replaced_by_force_alone(comfyui, tmp_path, content):
    target = comfyui / "custom_nodes" / "streamquant-loader"
    target.symlink_to(tmp_path)
    with pytest.raises(OutputExistsError):
        install(comfyui)
    assert install(comfyui, content, force=True).target.resolve() == pack_folder()


def test_a_dead_link_is_replaced(comfyui, tmp_path, content):
    target = comfyui / "custom_nodes" / "streamquant-loader"
    target.symlink_to(tmp_path / "gone")
    assert install(comfyui, content).target.resolve() == pack_folder()


def test_a_python_that_lacks_something_is_named(comfyui):
    python = comfyui / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'comfy_kitchen'\" >&2\nexit 1\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    assert find_python(comfyui) == python
    with pytest.raises(EnvironmentLacksError, match="No module named 'comfy_kitchen'") as caught:
        install(comfyui)
    assert str(python) in str(caught.value)
    assert (comfyui / "custom_nodes" / "streamquant-loader").is_symlink()


def test_a_python_that_is_not_there(comfyui):
    with pytest.raises(EnvironmentLacksError, match="--python"):
        install(comfyui, comfyui / "nowhere" / "python")
