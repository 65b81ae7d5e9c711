"""Starts ComfyUI, real or stand-in, before the node pack is imported; see `comfy_environment`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import comfy_environment
import tiny_flux
import torch

comfy_environment.start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if comfy_environment.IS_REAL:
        return
    skip = pytest.mark.skip(reason="needs a ComfyUI checkout: set COMFYUI_PATH")
    for item in items:
        if item.get_closest_marker("comfyui"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def as_nodes_run():
    """ComfyUI executes nodes in one inference mode; loading outside and running inside would clash.

    Such small models gain nothing from threads, which only wait for each other where other tests run beside these.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def source(folder: Path) -> Path:
    """A tiny Flux.2 in float32, which is what a model on the CPU keeps: so that its state dict can equal the file."""
    return tiny_flux.write(folder / "tiny.safetensors", tiny_flux.weights(torch.float32))


@pytest.fixture(scope="session")
def headline(source: Path) -> Path:
    """NF4 and FP8 in one file, marked for ComfyUI."""
    return tiny_flux.convert(source, tiny_flux.HEADLINE, "headline")


@pytest.fixture
def loaded(headline: Path):
    from comfyui_quantops.loader import load_diffusion_model

    return load_diffusion_model(str(headline))
