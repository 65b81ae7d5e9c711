"""Real weights, real activations: what calibration does to output error on sentences it never saw.

Twelve layers of MiniLM, two blocks of six; the words of the sentences for calibration and for scoring are disjoint.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from minilm import sentence_encoder, sentences

from streamquant.calibration import collect
from streamquant.calibration.collector import linear_layers
from streamquant.kernels import select
from streamquant.kernels.codebooks import CODE_BOOKS
from streamquant.kernels.jit.refine import refine
from streamquant.rounding import LayerHessian, scales


def watched(name: str) -> bool:
    return name.startswith(("encoder.layer.1.", "encoder.layer.4."))


@pytest.fixture(scope="module")
def study():
    """(weights by layer, calibration, dense calibration, exact H of held-out sentences by layer)."""
    model = sentence_encoder()
    collected = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sentences are short: on a busy machine threads only wait for each other
    for texts, dense in ((sentences(100, 0), False), (sentences(100, 0), True), (sentences(100, 1), True)):
        with collect(model, dense=dense, budget=None, only=watched) as collector, torch.inference_mode():
            for text in texts:
                model(text)
        collected.append(collector.calibration())
    torch.set_num_threads(threads)
    weights = {name: layer.weight.detach().numpy() for name, layer in linear_layers(model).items() if watched(name)}
    held_out = {name: LayerHessian.of(layer, dense=True) for name, layer in collected[2].layers.items()}
    return weights, collected[0], collected[1], held_out


def scale_of(weight: np.ndarray, kind: str, diagonal: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, str]:
    """scale [M, groups], column_group [N] and grid of INT8 row, FP8 tensor or NF4 of 64, as its format has it."""
    rows, columns = weight.shape
    whole = np.zeros(columns, dtype=np.int64)
    if kind == "int8 row":
        return np.abs(weight).max(axis=1, keepdims=True) / np.float32(127), whole, "int8"
    if kind == "fp8 tensor":
        return np.full((rows, 1), np.abs(weight).max() / np.float32(448)), whole, "e4m3"
    if diagonal is None:
        absmax = np.abs(weight.reshape(-1, 64)).max(axis=1)
    else:
        absmax = select("cpu").book_absmax(weight.reshape(-1), 64, scales.run_weights(diagonal, columns, 64), "nf4")
    return absmax.reshape(rows, -1), np.arange(columns) // 64, "nf4"


def decoded(codes: np.ndarray, scale: np.ndarray, column_group: np.ndarray, grid: str) -> np.ndarray:
    if grid == "e4m3":
        values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    else:
        values = codes.astype(np.float32) if grid == "int8" else CODE_BOOKS[grid][codes]
    return values * scale[:, column_group]


def ratios(study, kind: str, dense: bool, sweeps: int) -> np.ndarray:
    """Held-out output error of each layer, refined over nearest with absmax."""
    weights, sketch, whole, held_out = study
    result = []
    for name, weight in weights.items():
        nearest = LayerHessian(np.ones(weight.shape[1]), np.zeros((weight.shape[1], 0))).feedback()
        hessian = LayerHessian.of((whole if dense else sketch).layers[name], dense=dense).shrunk()
        errors = []
        for feedback, diagonal, times in ((nearest, None, 0), (hessian.feedback(), hessian.diagonal, sweeps)):
            scale, groups, grid = scale_of(weight, kind, diagonal)
            codes = refine(weight, scale, groups, feedback, grid, sweeps=times).codes
            error = decoded(codes, scale, groups, grid) - weight
            errors.append(np.sqrt(held_out[name].output_error(error).sum()))
        result.append(errors[1] / errors[0])
    return np.array(result)


def geometric_mean(values: np.ndarray) -> float:
    return float(np.exp(np.log(values).mean()))


@pytest.mark.parametrize("kind", ["int8 row", "fp8 tensor", "nf4"])
def test_calibration_lowers_held_out_output_error(study, kind):
    sketch = ratios(study, kind, dense=False, sweeps=0)
    assert len(sketch) == 12
    assert geometric_mean(sketch) <= 0.85
    assert sketch.max() <= 1.02, "never worse than nearest on any layer by more than 2 %"
    swept = ratios(study, kind, dense=True, sweeps=2)
    assert geometric_mean(swept) < geometric_mean(sketch)
    print(
        f"{kind}: sketch {geometric_mean(sketch):.3f} (worst {sketch.max():.3f}), "
        f"dense + 2 sweeps {geometric_mean(swept):.3f}"
    )


def test_a_scale_search_weighted_by_real_inputs_beats_an_unweighted_one(study):
    weights, sketch, _, held_out = study
    gains = []
    for name, weight in weights.items():
        errors = []
        identity = LayerHessian(np.ones(weight.shape[1]), np.zeros((weight.shape[1], 0))).feedback()
        for diagonal in (np.ones(weight.shape[1]), sketch.layers[name].diagonal):
            scale, groups, grid = scale_of(weight, "nf4", diagonal)
            error = decoded(refine(weight, scale, groups, identity, grid).codes, scale, groups, grid) - weight
            errors.append(held_out[name].output_error(error).sum())
        gains.append(errors[1] / errors[0])
    assert geometric_mean(np.array(gains)) < 1.0
