"""How far a loaded model is from the unquantized one: no further than its format takes it."""

from __future__ import annotations

import pytest
import running
import tiny_flux
import torch

from comfyui_quantops.loader import load_diffusion_model
from streamquant import FormatChoice, Recipe

pytestmark = pytest.mark.comfyui
# Twice the error, relative in the Euclidean norm, that each format has on random weights.
LIMITS = {
    "fp8": (Recipe(FormatChoice("fp8", rounding="rtn"), preset=("none",)), 0.1),
    "int8-tensor": (Recipe(FormatChoice("int8", "tensor", rounding="rtn"), preset=("none",)), 0.045),
    "int8-row": (Recipe(FormatChoice("int8", rounding="rtn"), preset=("none",)), 0.036),
    "headline": (tiny_flux.HEADLINE, 0.23),
    "nf4": (Recipe(FormatChoice("nf4", rounding="rtn"), preset=("none",)), 0.34),
    "fp4": (Recipe(FormatChoice("fp4", rounding="rtn"), preset=("none",)), 0.48),
}


@pytest.mark.parametrize("name", list(LIMITS))
def test_the_error_is_the_formats(source, name):
    recipe, limit = LIMITS[name]
    path = tiny_flux.convert(source, recipe, f"accuracy-{name}")
    original, quantized = (running.output(load_diffusion_model(str(each))) for each in (source, path))
    error = ((quantized - original).norm() / original.norm()).item()
    assert limit / 50 < error < limit
    path.unlink()


def test_bf16_costs_what_bf16_costs(headline):
    """What `--bf16-unet` does: everything unquantized is kept in bfloat16."""
    model = load_diffusion_model(str(headline), {"dtype": torch.bfloat16})
    model.set_model_compute_dtype(torch.bfloat16)
    result = running.output(model)
    assert running.difference(result.float(), running.reference(headline)) <= 1e-2
