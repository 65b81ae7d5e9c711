"""Collecting: moments against exact ones, whatever the model computes in, and what it costs to watch."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import streamquant
from streamquant.calibration import CalibrationError, collect, self_calibrate
from streamquant.calibration.sketch import low_rank, probe

N, HIDDEN = 96, 160


class Tower(torch.nn.Module):
    """Two linear layers, one called by keyword, and modules that are none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(7, N)
        self.first = torch.nn.Linear(N, HIDDEN)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.second = torch.nn.Linear(HIDDEN, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(input=self.norm(torch.relu(self.first(x))))


class OwnLinear(torch.nn.Module):
    """A linear layer that is not torch's, as quantized ones are."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = torch.nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def batches(count: int = 10, seed: int = 0) -> list[torch.Tensor]:
    """[5, 40, N] each: a dozen strong directions, a mean, loud channels and noise."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, N, generator=torch.Generator().manual_seed(99))
    loud = torch.ones(N)
    loud[3], loud[70] = 20.0, 8.0
    draw = lambda width: torch.randn(5, 40, width, generator=generator)
    return [(draw(12) @ mix + 0.3 * draw(N)) * loud + 0.7 for _ in range(count)]


def run(model: torch.nn.Module, inputs: list[torch.Tensor], **options):
    with collect(model, budget=None, **options) as collector, torch.no_grad():
        for x in inputs:
            model(x)
    return collector.calibration()


def exact(inputs: list[torch.Tensor]) -> np.ndarray:
    x = torch.cat([part.reshape(-1, N) for part in inputs]).double().numpy()
    return x.T @ x / len(x)


def test_moments_are_exact_and_the_low_rank_form_is_near():
    inputs = batches()
    layer = run(Tower(), inputs).layers["first"]
    hessian = exact(inputs)
    assert layer.count == 2000 and layer.sketch.shape == (N, 72)
    np.testing.assert_allclose(layer.mean, torch.cat(inputs).reshape(-1, N).double().mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.diagonal, np.diagonal(hessian), rtol=1e-5)
    np.testing.assert_allclose(layer.sketch, hessian @ probe(N, 72, 0), rtol=1e-4, atol=1e-4 * np.abs(hessian).max())
    remainder, vectors = layer.low_rank(32)
    assert (remainder > 0).all() and vectors.shape == (N, 32)
    np.testing.assert_allclose(remainder + np.square(vectors).sum(1), np.diagonal(hessian), rtol=1e-4)
    # As near as the best rank-32 matrix with the true diagonal, but for a few percent.
    values, axes = np.linalg.eigh(hessian)
    best = (axes[:, -32:] * values[-32:]) @ axes[:, -32:].T
    off_diagonal = ~np.eye(N, dtype=bool)
    ours, theirs = (
        np.linalg.norm((approximation - hessian)[off_diagonal]) for approximation in (vectors @ vectors.T, best)
    )
    assert ours <= 1.3 * theirs and ours < 1e-2 * np.linalg.norm(hessian)


def test_dense_collection_keeps_h_itself():
    inputs = batches(4)
    calibration = run(Tower(), inputs, dense=True)
    assert calibration.kind == "dense"
    hessian = exact(inputs)
    np.testing.assert_allclose(
        calibration.layers["first"].hessian, hessian, rtol=1e-4, atol=1e-5 * np.abs(hessian).max()
    )


def test_which_layers_are_watched():
    model = torch.nn.ModuleDict({"tower": Tower(), "own": OwnLinear(N, 4)})
    with collect(model) as collector:
        model["own"](model["tower"].embed(torch.tensor([1, 2])))
        model["tower"](batches(1)[0])
    assert set(collector.calibration().layers) == {"tower.first", "tower.second", "own"}
    with collect(model, only=lambda name: name != "own") as collector:
        model["own"](torch.randn(3, N))
        model["tower"](torch.randn(3, N))
    assert set(collector.calibration().layers) == {"tower.first", "tower.second"}
    model["tower"](torch.randn(3, N))
    assert collector.calibration().layers["tower.first"].count == 3, "hooks are gone after the with"


def test_halves_merge_to_the_whole():
    inputs = batches(9)
    whole = run(Tower(), inputs)
    merged = run(Tower(), inputs[:2]).merged(run(Tower(), inputs[2:]))
    for name, layer in whole.layers.items():
        other = merged.layers[name]
        assert other.count == layer.count
        for part in ("mean", "diagonal", "sketch"):
            ours, theirs = getattr(other, part), getattr(layer, part)
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("mode", ["inference", "autocast", "bfloat16", "grad"])
def test_however_the_model_runs(mode):
    inputs, model = batches(3), Tower()
    expected = run(model, [x.bfloat16().float() for x in inputs] if mode == "bfloat16" else inputs).layers["first"]
    if mode == "bfloat16":
        model, inputs = model.bfloat16(), [x.bfloat16() for x in inputs]
    with collect(model, budget=None) as collector:
        if mode == "inference":
            with torch.inference_mode():
                model(inputs[0])
            model(inputs[1])  # and outside of it again
            with torch.inference_mode():
                model(inputs[2])
        elif mode == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                [model(x) for x in inputs]
        else:
            loss = sum(model(x).float().sum() for x in inputs)
            loss.backward()
    layer = collector.calibration().layers["first"]
    assert layer.count == expected.count
    np.testing.assert_allclose(layer.sketch, expected.sketch, rtol=1e-5, atol=1e-5 * np.abs(expected.sketch).max())


def test_a_budget_takes_some_tokens_of_many_and_all_of_few():
    model = torch.nn.Linear(64, 200)
    tower = torch.nn.Sequential(model)
    with collect(tower, rank=8, budget=0.1) as collector:
        for _ in range(4):
            tower(torch.randn(1000, 64))
    assert (
        collector.calibration().layers["0"].count == 4 * 500
    )  # 2 · 16 · t ≤ 0.1 · 200 · T holds for every second token
    with collect(tower, rank=8, budget=0.1) as collector:
        tower(torch.randn(1, 64))
    assert collector.calibration().layers["0"].count == 1


def test_positions_take_turns():
    tower = torch.nn.Sequential(torch.nn.Linear(4, 1))
    inputs = torch.eye(4).repeat(16, 1)
    with collect(tower, rank=1, budget=1e-6) as collector:
        for _ in range(4):
            tower(inputs)
    np.testing.assert_allclose(collector.calibration().layers["0"].diagonal, 0.25)


def test_watching_costs_little():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512))
    x = torch.randn(1024, 512)

    def fastest(rounds: int = 5) -> float:
        """Seconds of the processor, of one thread: what others do on the machine stays out of it."""
        times = []
        with torch.inference_mode():
            for _ in range(rounds):
                start = time.process_time()
                model(x)
                times.append(time.process_time() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plain = fastest()
        with collect(model):
            watching = fastest()
    finally:
        torch.set_num_threads(threads)
    print(f"collect costs {watching / plain - 1:.1%} of the forward")
    assert watching < 1.3 * plain, "10 % are promised; the rest is what a busy machine does to a timing"


def test_a_probe_never_changes():
    assert probe(6, 10, 0).astype(int).sum(0).tolist() == [0, 0, 0, 4, 0, 0, 4, -4, 4, -2]
    assert set(np.unique(probe(100, 72, 3))) == {-1.0, 1.0}
    assert abs(probe(1000, 72, 3).mean()) < 0.02
    assert not np.array_equal(probe(10, 4, 0), probe(10, 4, 1))


@pytest.mark.parametrize("rank", [1, 5])
def test_few_inputs_and_silent_ones_are_no_trouble(rank):
    vector = np.random.default_rng(0).standard_normal(30)
    hessian = np.outer(vector, vector)
    vectors = low_rank((hessian @ probe(30, 13, 0)).astype(np.float32), 0, rank)
    np.testing.assert_allclose(vectors @ vectors.T, hessian, atol=1e-4)
    assert not low_rank(np.zeros((30, 13), np.float32), 0, rank).any()


def test_self_calibration_follows_the_models_own_path():
    class Velocity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.inner = torch.nn.Linear(N + 1 + 4, 32)
            self.out = torch.nn.Linear(32, N)
            self.times: list[float] = []

        def forward(self, latent, time, text):
            self.times.append(float(time[0]))
            return self.out(torch.tanh(self.inner(torch.cat([latent, time[:, None], text], 1))))

    model = Velocity()
    shapes = {"latent": (2, N), "text": (2, 4)}
    calibration = self_calibrate(model, model, shapes, trajectories=3, steps=5, budget=None)
    assert calibration.layers["inner"].count == 3 * 3 * 2, "three trajectories, three steps of each, a batch of two"
    assert model.times[:5] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    again = self_calibrate(model, model, shapes, trajectories=3, steps=5, budget=None)
    np.testing.assert_array_equal(again.layers["inner"].sketch, calibration.layers["inner"].sketch)
    with pytest.raises(CalibrationError, match="latent"):
        self_calibrate(model, model, {"text": (2, 4)})


def test_what_cannot_be_collected_is_refused():
    with pytest.raises(CalibrationError, match="no linear layer"):
        collect(torch.nn.Sequential(torch.nn.LayerNorm(4)))
    with pytest.raises(CalibrationError, match="rank of 0|rank 0"):
        collect(Tower(), rank=0)
    with pytest.raises(CalibrationError, match="budget"):
        collect(Tower(), budget=0.0)
    with collect(Tower()) as collector:
        pass
    with pytest.raises(CalibrationError, match="saw an input"):
        collector.calibration()
    model = Tower()
    with collect(model) as collector:
        model(torch.full((20, N), torch.nan))
    with pytest.raises(CalibrationError, match="first.*NaN"):
        collector.calibration()


def test_it_is_there_after_importing_the_package_alone():
    """As in README.md's example; and importing the package still imports no torch."""
    script = "import sys, streamquant; assert 'torch' not in sys.modules; streamquant.calibration.collect"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        streamquant.nothing  # noqa: B018
