"""The nodes as ComfyUI runs them: their declarations, conversion, inspection, and what importing the pack does."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import running

import comfyui_quantops
from comfyui_quantops import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from streamquant.errors import InterruptedRunError, OutputExistsError

PACK = Path(comfyui_quantops.__file__).parent
DOCS = PACK / comfyui_quantops.WEB_DIRECTORY / "docs"


@pytest.fixture
def models(tmp_path, source, monkeypatch):
    """A models folder with the tiny model, of which ComfyUI knows."""
    for name in ("diffusion_models", "text_encoders"):
        (tmp_path / name).mkdir()
        extensions = {".safetensors"}
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], extensions))
    if hasattr(folder_paths, "filename_list_cache"):
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "diffusion_models" / "tiny.safetensors").write_bytes(source.read_bytes())
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    return tmp_path


def run(name, **given):
    node = NODE_CLASS_MAPPINGS[name]
    return getattr(node(), node.FUNCTION)(**given)


@pytest.mark.parametrize("name", list(NODE_CLASS_MAPPINGS))
def test_a_nodes_function_takes_its_inputs(name, models):
    node = NODE_CLASS_MAPPINGS[name]
    declared = node.INPUT_TYPES()
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    assert [*declared["required"], *declared.get("optional", {})] != []
    assert {*declared["required"], *declared.get("optional", {})} == parameters.keys() - {"self"}
    for key, entry in declared.get("optional", {}).items():
        default = (entry[1:] or [{}])[0].get("default", entry[0][0] if isinstance(entry[0], list) else None)
        assert parameters[key].default == default, key


@pytest.mark.parametrize("name", list(NODE_CLASS_MAPPINGS))
def test_a_node_has_a_name_a_help_page_and_a_description(name, models):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    node = NODE_CLASS_MAPPINGS[name]
    assert page.startswith(f"# {NODE_DISPLAY_NAME_MAPPINGS[name]}\n")
    declared = node.INPUT_TYPES()
    for key in (*declared["required"], *declared.get("optional", {})):
        assert key in page
    assert node.DESCRIPTION and name.startswith("Streamquant")


def test_no_page_without_a_node():
    assert {page.stem for page in DOCS.iterdir()} == NODE_CLASS_MAPPINGS.keys()


def test_loading_through_the_node(models, headline):
    (models / "diffusion_models" / "small.safetensors").write_bytes(headline.read_bytes())
    (model,) = run("StreamquantLoadDiffusionModel", unet_name="small.safetensors")
    assert running.difference(running.output(model), running.reference(headline)) <= 1e-6


def test_converting_inspecting_and_loading(models):
    result = run(
        "StreamquantQuantizeModelFile", source="diffusion_models/tiny.safetensors", format="NF4", preset="none",
        other_layers="img_in|txt_in|final_layer", other_format="FP8",
    )  # fmt: skip
    text = result["result"][0]
    path = models / "diffusion_models" / "tiny-nf4-fp8.safetensors"
    assert path.is_file()
    assert text.startswith(f"tiny-nf4-fp8.safetensors: {path.stat().st_size:,} bytes")
    assert "bnb_nf4" in text and "float8_e4m3fn" in text
    (model,) = run("StreamquantLoadDiffusionModel", unet_name=path.name)
    assert running.difference(running.output(model), running.reference(path)) <= 1e-6
    table = run("StreamquantInspectFile", file=f"diffusion_models/{path.name}")["result"][0]
    assert "384 x 128  bnb_nf4, blocks of 64" in table
    assert "128 x 128  float8_e4m3fn" in table
    totals = [line for line in table.splitlines() if " bytes  " in line]
    data = sum(tensor.nbytes for tensor in running.file_tensors(path).values())
    assert sum(int(line.split(" bytes")[0].replace(",", "")) for line in totals) == data


def test_a_calibration_is_rounded_by(models):
    """Weights rounded by what their layers see are others than the nearest ones."""
    import numpy as np
    from safetensors.torch import load_file

    from streamquant.calibration import Calibration, LayerStatistics
    from streamquant.calibration.sketch import probe

    inputs = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32) * np.linspace(0.1, 3, 128, dtype=np.float32)
    moments = inputs.T @ inputs / 64
    statistics = LayerStatistics(64, inputs.mean(0), np.diag(moments).copy(), sketch=moments @ probe(128, 72, 0), seed=0)
    (models / "output" / "calibration").mkdir(parents=True)
    layer = "double_blocks.0.img_attn.qkv"
    Calibration({layer: statistics}).save(models / "output" / "calibration" / "seen.calibration.safetensors")
    given = {"source": "diffusion_models/tiny.safetensors", "format": "NF4", "preset": "none"}
    choices = NODE_CLASS_MAPPINGS["StreamquantQuantizeModelFile"].INPUT_TYPES()["optional"]["calibration"][0]
    assert choices == ["none", "seen.calibration.safetensors"]
    run("StreamquantQuantizeModelFile", **given, file_name="nearest")
    run("StreamquantQuantizeModelFile", **given, file_name="learned", calibration=choices[1])
    nearest, learned = (load_file(models / "diffusion_models" / f"{name}.safetensors") for name in ("nearest", "learned"))
    changed = {key for key in nearest if not running.same_bytes(nearest[key], learned[key])}
    assert f"{layer}.weight" in changed
    assert {key.partition(".weight")[0] for key in changed} == {layer}


def test_what_exists_is_replaced_only_when_asked(models):
    given = {"source": "diffusion_models/tiny.safetensors", "format": "FP8", "preset": "none", "file_name": "mine"}
    path = models / "diffusion_models" / "mine.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(OutputExistsError, match="switch overwrite on"):
        run("StreamquantQuantizeModelFile", **given)
    assert path.read_bytes() == b"precious"
    run("StreamquantQuantizeModelFile", **given, overwrite=True)
    assert path.stat().st_size > 1000


def test_cancel_and_going_on(models, monkeypatch):
    """Cancel stops at the next tile; the same again goes on, to the same bytes."""
    given = {"source": "diffusion_models/tiny.safetensors", "format": "INT8", "preset": "none"}
    run("StreamquantQuantizeModelFile", **given, file_name="whole")
    calls = []

    def interrupted():
        calls.append(None)
        return len(calls) > 3

    monkeypatch.setattr(comfy.model_management, "processing_interrupted", interrupted)
    with pytest.raises(InterruptedRunError):
        run("StreamquantQuantizeModelFile", **given, file_name="stopped")
    folder = models / "diffusion_models"
    assert not (folder / "stopped.safetensors").exists()
    monkeypatch.setattr(comfy.model_management, "processing_interrupted", lambda: False)
    run("StreamquantQuantizeModelFile", **given, file_name="stopped")
    assert (folder / "stopped.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()


def test_importing_the_pack_imports_nothing_heavy_and_registers_nothing():
    """In a fresh interpreter where triton, bitsandbytes and numba cannot be imported."""
    script = """
import sys
for name in ("triton", "bitsandbytes", "numba", "comfy", "folder_paths"):
    sys.modules[name] = None
import comfy_kitchen.tensor
before = set(comfy_kitchen.tensor.base.LAYOUTS)
import comfyui_quantops
assert comfyui_quantops.NODE_CLASS_MAPPINGS
assert set(comfy_kitchen.tensor.base.LAYOUTS) == before
import comfyui_quantops.decode
assert comfyui_quantops.decode.bitsandbytes_ops() is None
print("ok")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=PACK.parent,
    )  # fmt: skip
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize("in_comfyui", [True, False])
def test_a_clone_of_the_whole_repository_is_a_node_pack_to_comfyui_alone(tmp_path, in_comfyui):
    """ComfyUI imports a folder of custom_nodes by its path; a build or a test runner gets nothing from it."""
    (tmp_path / "custom_nodes").mkdir()
    clone = tmp_path / "custom_nodes" / "streamquant"
    clone.symlink_to(PACK.parent, target_is_directory=True)
    script = f"""
import importlib.util, sys, types
if {in_comfyui}:
    sys.modules["comfy"] = types.ModuleType("comfy")
spec = importlib.util.spec_from_file_location("a_node_pack", {str(clone / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["a_node_pack"] = module
spec.loader.exec_module(module)
import pathlib
mappings = getattr(module, "NODE_CLASS_MAPPINGS", {{}})
page = pathlib.Path(module.__file__).parent / getattr(module, "WEB_DIRECTORY", ".") / "docs" / "StreamquantInspectFile.md"
print(len(mappings), page.is_file())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == (f"{len(NODE_CLASS_MAPPINGS)} True\n" if in_comfyui else "0 False\n"), done.stderr


def test_layout_names_are_our_own(loaded):
    from comfy_kitchen.tensor import get_layout_class

    from comfyui_quantops import layouts

    for name, layout in layouts.LAYOUTS.items():
        assert name.startswith("Streamquant")
        assert get_layout_class(name) is layout


@pytest.mark.parametrize("path", sorted((PACK / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_a_workflow_holds_together(path, models):
    graph = json.loads(path.read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    for number, source, output, target, slot, kind in graph["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert kind in (nodes[source]["outputs"][output]["type"], "*")
    ours = [node for node in graph["nodes"] if node["type"] in NODE_CLASS_MAPPINGS]
    assert ours
    for node in ours:
        declared = NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
        widgets = [
            key
            for section in declared.values()
            for key, entry in section.items()
            if isinstance(entry[0], list) or entry[0] not in ("MODEL", "CLIP")
        ]
        # ComfyUI's frontend gives an input called "seed" a second widget, for what becomes of it after a run.
        assert len(node["widgets_values"]) == len(widgets) + ("seed" in widgets)


@pytest.mark.comfyui
@pytest.mark.parametrize("path", sorted((PACK / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_a_workflows_nodes_exist_in_comfyui(path, models):
    import asyncio

    import nodes as comfy_nodes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", "--cpu"])
        asyncio.run(comfy_nodes.init_builtin_extra_nodes())
    for node in json.loads(path.read_text())["nodes"]:
        known = {**comfy_nodes.NODE_CLASS_MAPPINGS, **NODE_CLASS_MAPPINGS}[node["type"]]
        declared = known.INPUT_TYPES()
        names = [key for section in ("required", "optional") for key in declared.get(section, {})]
        assert {slot["name"] for slot in node["inputs"]} <= set(names)
        assert len(node["outputs"]) in (0, len(known.RETURN_TYPES))


@pytest.mark.comfyui
def test_the_v3_schema_is_the_v1_declaration(models):
    import asyncio

    async def schemas():
        extension = await comfyui_quantops.comfy_entrypoint()
        return {node.GET_SCHEMA().node_id: node for node in await extension.get_node_list()}

    made = asyncio.run(schemas())
    assert made.keys() == NODE_CLASS_MAPPINGS.keys()
    for name, node in made.items():
        old, new = NODE_CLASS_MAPPINGS[name].INPUT_TYPES(), node.INPUT_TYPES()
        for section in ("required", "optional"):
            assert list(new.get(section, {})) == list(old.get(section, {}))
        assert list(node.RETURN_TYPES) == list(NODE_CLASS_MAPPINGS[name].RETURN_TYPES)
    result = made["StreamquantInspectFile"].execute(file="diffusion_models/tiny.safetensors")
    assert "not quantized" in result.args[0]


def test_the_registry_metadata():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    metadata = tomllib.loads((PACK / "pyproject.toml").read_text())
    name = metadata["project"]["name"]
    assert len(name) < 100 and "comfyui" not in name.lower()
    assert metadata["tool"]["comfy"]["PublisherId"] and (PACK / metadata["tool"]["comfy"]["Icon"]).is_file()
    assert metadata["project"]["dependencies"] == (PACK / "requirements.txt").read_text().split()
    assert (PACK / metadata["project"]["license"]["file"]).is_file()
