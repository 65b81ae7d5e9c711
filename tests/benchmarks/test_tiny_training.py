"""The procedural pictures, the training, and what the trained model draws."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from benchmarks import machine, quality_flux, tiny_shapes
from benchmarks.quality_layers import one_thread
from benchmarks.tiny_flux import TinyFlux2
from benchmarks.train_tiny import PEAK_RATE, WEIGHTS, Training, flow_matching_loss, learning_rate, run, train


@pytest.fixture(autouse=True)
def single_threaded() -> Iterator[None]:
    """On a busy machine the threads of short products wait for each other; and training sets their number."""
    with one_thread():
        yield


def colours(table: dict[str, tuple[float, float, float]]) -> torch.Tensor:
    return torch.tensor(list(table.values())) * 2 - 1


def every_prompt() -> torch.Tensor:
    return tiny_shapes.prompts(tiny_shapes.PROMPTS, 0)


def test_prompts_are_all_there_once_and_sets_of_them_share_none() -> None:
    assert len({tuple(prompt.tolist()) for prompt in every_prompt()}) == 6 * 8 * 9 * 3 * 6
    sets = [{tuple(prompt.tolist()) for prompt in quality_flux.prompts(part)} for part in quality_flux.SETS]
    assert [len(part) for part in sets] == [16, 32, 32] and len(set.union(*sets)) == 80
    with pytest.raises(ValueError, match="only 7776 prompts"):
        tiny_shapes.prompts(1, 0, tiny_shapes.PROMPTS)


def test_context_tokens_differ_by_attribute_value_alone() -> None:
    one = tiny_shapes.context(torch.tensor([[0, 1, 2, 0, 3], [0, 1, 5, 0, 3]]))
    assert one.shape == (2, 5, tiny_shapes.CONTEXT_WIDTH)
    assert [torch.equal(*pair) for pair in one.transpose(0, 1)] == [True, True, False, True, True]


def test_pictures_show_what_their_prompts_say() -> None:
    prompt = every_prompt()[:500]
    images = tiny_shapes.pictures(prompt, torch.Generator().manual_seed(3))
    assert images.shape == (500, 3, 48, 48) and images.abs().max() <= 1
    ground = colours(tiny_shapes.GROUNDS)[prompt[:, 4]]
    front = colours(tiny_shapes.COLOURS)[prompt[:, 1]]
    is_ground = (images - ground[:, :, None, None]).abs().amax(1) < 1e-5
    is_front = (images - front[:, :, None, None]).abs().amax(1) < 1e-5
    half = torch.tensor(list(tiny_shapes.SIZES.values()))[prompt[:, 3]]
    # Area of each kind in units of (2 · half)²: circle, square, triangle, ring, cross, diamond.
    area = torch.tensor([0.785, 0.81, 0.45, 0.589, 0.551, 0.5])[prompt[:, 0]] * (2 * half) ** 2
    covered = (~is_ground).sum((1, 2)) / 2 + is_front.sum((1, 2)) / 2  # border pixels count half
    assert ((covered / area - 1).abs() < 0.15).all()
    pixels = torch.arange(48) + 0.5
    middle = torch.stack([(is_front * axis).sum((1, 2)) / is_front.sum((1, 2)) for axis in (pixels[:, None], pixels)], dim=1)
    expected = torch.stack((prompt[:, 2] // 3, prompt[:, 2] % 3), dim=1) * 16 + 8
    assert ((middle - expected).abs() < 8).all(), "the shape lies in its ninth of the picture, or is drawn in from its border"


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_the_latent_keeps_brightness_and_smooth_colour(seed: int, grey: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    if grey:
        images = (torch.rand(2, 1, 48, 48, generator=generator) * 2 - 1).expand(2, 3, 48, 48)
    else:  # a colour per patch
        images = (torch.rand(2, 3, 6, 6, generator=generator) * 2 - 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    latents = tiny_shapes.encode(images)
    assert latents.shape == (2, 128, 6, 6)
    assert torch.allclose(tiny_shapes.decode(latents), images, atol=1e-5)


def test_training_repeats_itself() -> None:
    first, second = (list(train(Training(steps=3, batch=4, seed=5))) for _ in range(2))
    assert [loss for _, loss, _ in first] == [loss for _, loss, _ in second]
    assert all(torch.equal(weight, second[-1][2][name]) for name, weight in first[-1][2].items())
    assert next(train(Training(steps=1, batch=4, seed=6)))[1] != first[0][1]


def test_training_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.train_tiny.WARM_UP", 1)

    def loss(weights: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return float(flow_matching_loss(TinyFlux2.of(weights), 64, torch.Generator().manual_seed(9)))

    losses = [loss(weights) for step, _, weights in train(Training(steps=16, batch=8)) if step in (1, 16)]
    # Untrained, the velocity is zero: the loss is the noise's variance, 1, and the latents'.
    assert 1.2 < losses[0] < 1.5
    assert losses[1] < 0.97 * losses[0]


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 1000) for step in range(1, 1001)]
    assert max(rates) == rates[99] == PEAK_RATE and rates[49] == PEAK_RATE / 2
    assert rates[99:] == sorted(rates[99:], reverse=True) and rates[-1] <= 0.002 * PEAK_RATE


def test_a_run_leaves_weights_and_facts(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    run(Training(steps=2, batch=2), tmp_path / "new" / "tiny.safetensors", console)
    weights = load_file(tmp_path / "new" / "tiny.safetensors")
    expected = list(train(Training(steps=2, batch=2)))[-1][2]
    assert all(torch.equal(weights[name], weight.to(torch.bfloat16)) for name, weight in expected.items())
    facts = json.loads((tmp_path / "new" / "tiny.json").read_text())
    assert facts["weights"] == sum(weight.numel() for weight in weights.values())
    assert facts["training"]["steps"] == 2 and facts["machine"]["torch"] == machine.installed("torch")


def test_the_trained_model_draws_what_it_is_asked_for() -> None:
    model = TinyFlux2.load(WEIGHTS)
    prompt = quality_flux.prompts("final")[:16]
    noise = quality_flux.noise("final")[:16]
    images = tiny_shapes.decode(quality_flux.sample(model, noise, tiny_shapes.context(prompt)))
    # The ground is the colour of most of the border, the shape's that of the middle of its ninth (not of a ring's).
    border = torch.cat((images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]), dim=2).median(dim=2).values
    ground = torch.cdist(border, colours(tiny_shapes.GROUNDS)).argmin(1)
    assert (ground == prompt[:, 4]).sum() >= 15
    difference = (images - border[:, :, None, None]).abs().sum(1)
    ninths = torch.nn.functional.avg_pool2d(difference[:, None], 16).flatten(1).argmax(1)
    assert (ninths == prompt[:, 2]).sum() >= 14
    weight = (difference > 0.5).float()[:, None]
    shape = (images * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1)
    colour = torch.cdist(shape, colours(tiny_shapes.COLOURS)).argmin(1)
    assert (colour == prompt[:, 1]).sum() >= 12
