"""Finding the streamquant library: installed, or in the checkout that this folder is a part of."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def find() -> None:
    """Make `import streamquant` work. A checkout is used only where nothing is installed, and adds no path for others.

    Raises ImportError with what to do when it is nowhere.
    """
    if "streamquant" in sys.modules or importlib.util.find_spec("streamquant") is not None:
        return
    package = Path(__file__).resolve().parent.parent / "streamquant"
    if not (package / "__init__.py").is_file():
        raise ImportError(
            f"The node pack {Path(__file__).parent} needs the library streamquant, which this Python does not have: install "
            f"it with `{sys.executable} -m pip install streamquant`."
        )
    spec = importlib.util.spec_from_file_location(
        "streamquant", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["streamquant"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["streamquant"]
        raise
