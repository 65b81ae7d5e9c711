"""Every format we write, loaded: the output of the decoded weights, the bytes of the file."""

from __future__ import annotations

import comfy.model_management
import pytest
import running
import tiny_flux

from comfyui_quantops.layouts import is_ours
from comfyui_quantops.loader import load_diffusion_model
from streamquant import FormatChoice, Recipe


def whole(choice: FormatChoice, **more: object) -> Recipe:
    return Recipe(choice, preset=("none",), **more)


def mixed(first: FormatChoice, pattern: str, second: FormatChoice, **more: object) -> Recipe:
    return whole(first, custom_layers=pattern, custom=second, **more)


WEIGHTS_ALONE = {
    "nf4": whole(FormatChoice("nf4")),
    "nf4-marked": whole(FormatChoice("nf4"), comfy_quant=True),
    "nf4-double": whole(FormatChoice("nf4", double_quant=True)),
    "nf4-blocks-of-128": whole(FormatChoice("nf4", block_size=128)),
    "fp4": whole(FormatChoice("fp4")),
    "fp4-double-marked": whole(FormatChoice("fp4", double_quant=True), comfy_quant=True),
    "fp8": whole(FormatChoice("fp8")),
    "fp8-e5m2": whole(FormatChoice("fp8_e5m2")),
    "fp8-row": whole(FormatChoice("fp8", "row")),
    "fp8-block": whole(FormatChoice("fp8", "block", 64)),
    "fp8-block3d": whole(FormatChoice("fp8", "block3d", 64)),
    "int8-block": whole(FormatChoice("int8", "block", 64)),
    "nf4+fp8": tiny_flux.HEADLINE,
    "nf4+fp8-block": mixed(FormatChoice("nf4"), "mlp", FormatChoice("fp8", "block")),
    "kept by the preset": Recipe(FormatChoice("nf4")),
}
# ComfyUI quantizes the activations of these too.
EIGHT_BIT_ACTIVATIONS = {
    "int8": whole(FormatChoice("int8")),
    "int8-tensor": whole(FormatChoice("int8", "tensor")),
    "nf4+int8": mixed(FormatChoice("nf4"), "mlp", FormatChoice("int8"), comfy_quant=True),
}


@pytest.fixture(scope="module", params=[*WEIGHTS_ALONE, *EIGHT_BIT_ACTIVATIONS])
def case(request, source):
    recipes = WEIGHTS_ALONE | EIGHT_BIT_ACTIVATIONS
    path = tiny_flux.convert(source, recipes[request.param], request.param.replace(" ", "-"))
    yield path, tiny_flux.EIGHT_BIT if request.param in EIGHT_BIT_ACTIVATIONS else tiny_flux.EXACT
    path.unlink()


def test_the_output_is_that_of_the_decoded_weights(case):
    path, limit = case
    assert running.difference(running.output(load_diffusion_model(str(path))), running.reference(path)) <= limit


def test_the_state_dict_is_the_file(case):
    path, _ = case
    model = load_diffusion_model(str(path))
    assert running.differing(model, path) == []
    running.output(model)
    assert running.differing(model, path) == []


def test_the_memory_estimate_is_what_is_packed(case):
    path, _ = case
    model = load_diffusion_model(str(path))
    packed = sum(tensor.nbytes for tensor in running.file_tensors(path).values())
    assert comfy.model_management.module_size(model.model.diffusion_model) == packed


def test_every_part_of_a_layer_moves_with_it(loaded):
    running.output(loaded)
    moved = loaded.model.diffusion_model.to("meta")
    ours = [module.weight for module in moved.modules() if is_ours(getattr(module, "weight", None))]
    assert ours
    for weight in ours:
        parts, _ = weight.__tensor_flatten__()
        assert {getattr(weight, part).device.type for part in parts} == {"meta"}


def test_an_unquantized_file_goes_comfyuis_own_way(source):
    model = load_diffusion_model(str(source))
    assert not any("Hybrid" in type(module).__qualname__ for module in model.model.modules())
    assert running.difference(running.output(model), running.reference(source)) == 0


def test_two_models_at_once_do_not_disturb_each_other(headline, source):
    other = tiny_flux.convert(source, WEIGHTS_ALONE["fp4"], "other")
    first, second = load_diffusion_model(str(headline)), load_diffusion_model(str(other))
    comfy.model_management.load_models_gpu([first, second])
    expected = running.reference(headline), running.reference(other)
    assert running.difference(running.output(first), expected[0]) <= tiny_flux.EXACT
    assert running.difference(running.output(second), expected[1]) <= tiny_flux.EXACT
    other.unlink()
