"""What the stand-in says of ComfyUI is true of the real one: the same names, and calls that fit them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys

import comfy_environment
import pytest

pytestmark = pytest.mark.comfyui
MODULES = (
    "model_detection", "model_management", "model_patcher", "ops", "patcher_extension", "quant_ops", "sd", "utils",
)  # fmt: skip
# What the stand-in has for itself, inside classes and functions that ComfyUI has too.
OWN = {
    "model_patcher": {"Backup", "patched"},
    "model_detection": {"Configuration"},
    "sd": {"Network", "BaseModel"},
    "quant_ops": set(),
}
OWN_METHODS = {"ModelPatcher.layers", "ModelPatcher.patch_weight_to_device"}


def load_standin(name):
    """A module of the stand-in under another name, so that the real one stays where it is."""
    package = "comfy_standin"
    if package not in sys.modules:
        folder = comfy_environment.STANDIN / "comfy"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[package] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{package}.{name}")


def parameters(function):
    return {
        name: parameter.default is not inspect.Parameter.empty
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }


def pairs(name):
    """(dotted name, stand-in's, real one's) of everything public that a stand-in's module defines."""
    standin, real = load_standin(name), importlib.import_module(f"comfy.{name}")
    for member, value in vars(standin).items():
        defined = getattr(value, "__module__", None) == standin.__name__
        if member.startswith("_") or member in OWN.get(name, ()) or not (defined and callable(value)):
            continue
        assert hasattr(real, member), f"comfy.{name}.{member} is not there"
        yield member, value, getattr(real, member)
        if not inspect.isclass(value) or name == "ops":
            continue
        for method, body in vars(value).items():
            if inspect.isfunction(body) and f"{member}.{method}" not in OWN_METHODS and "Error" not in member:
                assert hasattr(getattr(real, member), method), f"comfy.{name}.{member}.{method} is not there"
                yield f"{member}.{method}", body, getattr(getattr(real, member), method)


@pytest.mark.parametrize("name", MODULES)
def test_a_function_takes_what_the_real_one_takes(name):
    for dotted, standin, real in pairs(name):
        if inspect.isclass(standin):
            continue
        mine, theirs = parameters(standin), parameters(real)
        assert list(mine) == list(theirs)[: len(mine)], f"comfy.{name}.{dotted}"
        assert {key: mine[key] for key in mine} == {key: theirs[key] for key in mine}, f"comfy.{name}.{dotted}"
        assert all(list(theirs.values())[len(mine) :]), f"comfy.{name}.{dotted} needs more"


def test_the_names_of_callbacks_and_wrappers():
    import comfy.patcher_extension as real

    standin = load_standin("patcher_extension")
    for group in ("CallbacksMP", "WrappersMP"):
        mine = {key: value for key, value in vars(getattr(standin, group)).items() if key.isupper()}
        assert mine.items() <= vars(getattr(real, group)).items()


def test_the_formats_that_comfyui_reads():
    import comfy.quant_ops as real

    for name, algorithm in load_standin("quant_ops").QUANT_ALGOS.items():
        theirs = real.QUANT_ALGOS[name]
        assert theirs["storage_t"] == algorithm["storage_t"]
        assert theirs.get("quantize_input", True) == algorithm.get("quantize_input", True)


def test_a_quantized_linear_layer_has_what_the_stand_ins_has():
    import comfy.ops
    import torch

    mine = load_standin("ops").mixed_precision_ops({}, torch.float32).Linear
    theirs = comfy.ops.mixed_precision_ops({}, torch.float32).Linear
    for name, body in vars(mine).items():
        if inspect.isfunction(body) and name != "_take_quantized":
            assert hasattr(theirs, name), name
            real = parameters(getattr(theirs, name))
            if real.keys() > {"self"}:  # some of the real ones take *args
                assert list(parameters(body))[:2] == list(real)[:2], name
    made, real = mine(4, 8, device="cpu", dtype=torch.float32), theirs(4, 8, device="cpu", dtype=torch.float32)
    assert made.factory_kwargs == real.factory_kwargs
    for name in ("weight_function", "bias_function", "in_features", "out_features", "_full_precision_mm"):
        assert getattr(made, name) == getattr(real, name), name


def test_the_folders_and_the_version():
    import folder_paths

    spec = importlib.util.spec_from_file_location("folder_paths_standin", comfy_environment.STANDIN / "folder_paths.py")
    standin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(standin)
    for name, value in vars(standin).items():
        if inspect.isfunction(value):
            mine, theirs = parameters(value), parameters(getattr(folder_paths, name))
            assert list(mine) == list(theirs)[: len(mine)], name
    assert folder_paths.folder_names_and_paths.keys() >= standin.folder_names_and_paths.keys()
