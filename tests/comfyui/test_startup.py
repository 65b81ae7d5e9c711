"""ComfyUI itself, started with the pack in its custom_nodes: linked alone, and as a clone of the whole repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import comfy_environment
import pytest

import comfyui_quantops

pytestmark = pytest.mark.comfyui
PACK = Path(comfyui_quantops.__file__).resolve().parent


@pytest.mark.parametrize("what", [PACK, PACK.parent], ids=["the pack", "the repository"])
def test_comfyui_imports_it(tmp_path, what):
    base, stubs = tmp_path / "base", tmp_path / "stubs"
    (base / "custom_nodes").mkdir(parents=True)
    (base / "custom_nodes" / "streamquant-loader").symlink_to(what, target_is_directory=True)
    stubs.mkdir()
    (stubs / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        f"sys.path.append({str(Path(comfy_environment.__file__).parent)!r})\n"
        "import comfy_environment as c\n"
        "missing = tuple(n for n in c.NOT_NEEDED if importlib.util.find_spec(n) is None)\n"
        "sys.meta_path.append(c._AbsentFinder(missing))\n"
    )
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(stubs), environment.get("PYTHONPATH")]))
    database = f"sqlite:///{base / 'comfyui.db'}"
    done = subprocess.run(
        [sys.executable, "main.py", "--cpu", "--quick-test-for-ci", "--base-directory", str(base), "--database-url", database],
        cwd=comfy_environment.COMFYUI_PATH, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    lines = [line for line in log.splitlines() if line.rstrip().endswith("streamquant-loader")]
    assert any("seconds" in line for line in lines), log[-3000:]
    assert not any("IMPORT FAILED" in line for line in lines), log[-3000:]
    assert "Cannot import" not in "".join(lines)
