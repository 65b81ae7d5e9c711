"""The quality harness: its judge against the definition, its cells against a study whose answers are known."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks import (
    minilm,
    quality,
    quality_converter,
    quality_flux,
    quality_methods,
    quality_results,
    quality_rivals,
    quality_synthetic,
    rivals,
)
from benchmarks.__main__ import main
from benchmarks.peers import Peer, PeerError
from benchmarks.quality_flux import FluxStudy, psnr
from benchmarks.quality_layers import Measured, one_thread, output_error, second_moments
from benchmarks.quality_methods import Quantized
from benchmarks.quality_synthetic import Inputs
from benchmarks.results import Result
from benchmarks.tiny_flux import FluxSize, TinyFlux2


@pytest.fixture(scope="module", autouse=True)
def single_threaded() -> Iterator[None]:
    """On a busy machine the threads of short products wait for each other."""
    with one_thread():
        yield


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_the_output_error_is_that_of_outputs(rows: int, columns: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False, dtype=torch.float64))
    inputs = torch.randn(2, count, columns, generator=generator, dtype=torch.float64) + 0.5
    moments = second_moments(layer, ["0.weight"], lambda: [layer(part) for part in inputs])
    weight = layer[0].weight.detach()
    quantized = weight + 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    flat = inputs.flatten(0, 1)
    expected = float((flat @ (quantized - weight).T).norm() / (flat @ weight.T).norm())
    assert output_error(moments["0.weight"], weight, quantized) == pytest.approx(expected, rel=1e-6)
    assert not layer[0]._forward_pre_hooks, "whoever watched is gone"


def test_psnr_is_decibel_of_the_full_range_over_the_error() -> None:
    reference = torch.zeros(2, 3, 4, 4)
    images = torch.stack((torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)))
    assert psnr(images, reference) == pytest.approx((20 + 40) / 2, abs=1e-4)


def row(contender: str, time: str, model: str = "m", value: float = 0.5) -> Result:
    return quality_results.score(time, model, "nf4", contender, "1 - cosine", value)


def test_of_each_contender_the_last_run_counts() -> None:
    first, second = row("streamquant rtn", "2026-01-01"), row("streamquant rtn", "2026-01-02", value=0.25)
    other, rival = row("streamquant sketch", "2026-01-01"), row("torchao 0.18.0", "2026-01-01")
    rows = [first, second, row("streamquant rtn", "2027", model="other"), other, rival]
    assert quality_results.latest(rows, "m") == [second, other, rival]
    assert [quality_results.method(one) for one in (second, other, rival)] == ["rtn", "sketch", ""]
    with pytest.raises(ValueError, match="no such metric"):
        quality_results.score("", "m", "nf4", "streamquant rtn", "beauty", 1.0)


class KnownStudy:
    """Weights are errors: each cell's numbers are read off them."""

    name, scored_on, source, calibrations = "known", "final", Path("nowhere"), {}

    def applies(self, method: str) -> bool:
        return method != "structure"

    def measure(self, weights: dict[str, torch.Tensor]) -> Measured:
        errors = {name: float(weight) for name, weight in weights.items()}
        return Measured(errors, {("velocity error", ""): sum(errors.values()), ("PSNR", ""): -10 * math.log10(sum(errors.values()))})


def test_a_cell_is_compared_with_nearest_in_its_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    errors = {"rtn": (0.02, 0.08), "scales": (0.021, 0.04), "sketch": (0.01, 0.04)}

    def quantize(source: Path, destination: Path, format: str, method: str, calibrations: dict) -> Quantized:
        first, second = errors[method]
        return Quantized({"a": torch.tensor(first), "b": torch.tensor(second)}, ["a", "b"], 100, 0.5)

    monkeypatch.setattr(quality_methods, "quantize", quantize)
    monkeypatch.setattr(quality, "open_study", lambda *_: KnownStudy())
    cells = quality.Settings(["flux"], ["nf4"], ["structure", "scales", "sketch", "rtn"], "final", tmp_path)
    recorded: list[Result] = []
    console = Console(file=io.StringIO(), width=300)
    quality.run(cells, console, recorded.extend)
    assert list(dict.fromkeys(map(quality_results.method, recorded))) == ["rtn", "scales", "sketch"]
    found = {(quality_results.method(score), score.metric, score.detail): score for score in recorded}
    assert found["sketch", "velocity error", ""].ratio == pytest.approx(0.5)
    assert found["sketch", "velocity error", ""].ratio_to == "streamquant rtn"
    assert found["sketch", "PSNR", ""].ratio == pytest.approx(10 * math.log10(2))
    assert found["sketch", "layer output error", ""].p50 == pytest.approx(0.02, rel=1e-5)
    assert found["scales", "layer output error", ""].ratio == pytest.approx(math.sqrt(1.05 * 0.5), rel=1e-5)
    assert found["scales", "worst layer", "a"].ratio == pytest.approx(1.05, rel=1e-5)
    assert found["sketch", "layer output error", "b"].ratio == pytest.approx(0.5)
    assert ("rtn", "layer output error", "b") not in found
    assert found["rtn", "seconds", ""].p50 == 0.5
    assert {(score.output_bytes, score.size_bytes) for score in recorded} == {(100, 4)}, "two weights of two bytes each"
    assert "0.50 / 0.50 / 0.50" in console.file.getvalue()


class FakeWorker:
    """A library that keeps one weight as it is, halves the other, and knows no FP4."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.weights = weights

    def quantize(self, format: str) -> tuple[float, int]:
        if format == "fp4":
            raise PeerError("KeyError: 'fp4'")
        return 0.25, 50

    def decoded(self, format: str) -> dict[str, torch.Tensor]:
        return {name: weight / 2 if name == "b" else weight for name, weight in self.weights.items()}


def test_other_tools_are_compared_with_the_product_at_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "source.safetensors"
    save_file({"a": torch.tensor(0.02), "b": torch.tensor(0.08), "kept": torch.tensor(0.01)}, source)
    ours = {"a": torch.tensor(0.02), "b": torch.tensor(0.08), "kept": torch.tensor(0.01)}
    monkeypatch.setattr(KnownStudy, "source", source)
    monkeypatch.setattr(quality, "open_study", lambda *_: KnownStudy())
    monkeypatch.setattr(quality_methods, "quantize", lambda *_: Quantized(ours, ["a", "b"], 100, 0.5))

    @contextmanager
    def working(library: rivals.Library, weights: dict, workdir: Path, threads: int) -> Iterator[FakeWorker]:
        assert sorted(weights) == ["a", "b"], "only what the product quantized"
        if library.package == "torchao":
            raise PeerError("cannot be installed: no network")
        yield FakeWorker(weights)

    monkeypatch.setattr(quality_rivals, "working", working)
    monkeypatch.setitem(rivals.LIBRARIES["bitsandbytes"].formats, "odd", "")
    cells = quality.Settings(["flux"], [], [], "final", tmp_path, against=["bitsandbytes", "torchao"])
    console = Console(file=io.StringIO(), width=300)
    recorded: list[Result] = []
    quality.run(cells, console, recorded.extend)
    found = {(score.contender, score.case, score.metric, score.detail): score for score in recorded}
    nf4 = found["bitsandbytes 0.50.2", "nf4", "velocity error", ""]
    assert nf4.p50 == pytest.approx(0.02 + 0.04 + 0.01) and nf4.ratio == pytest.approx(0.07 / 0.11)
    assert (nf4.ratio_to, nf4.output_bytes) == ("streamquant no-data, nf4", 50)
    assert found["bitsandbytes 0.50.2", "fp4", "layer output error", ""].note == "KeyError: 'fp4'"
    assert found["torchao 0.18.0", "all", "layer output error", ""].p50 is None
    unlike = found["bitsandbytes 0.50.2", "odd", "velocity error", ""]
    assert unlike.p50 == pytest.approx(0.07) and unlike.ratio is None, "we have nothing like it"
    assert "torchao 0.18.0 DOES NOT TAKE PART in all on known" in console.file.getvalue()


def test_the_converter_s_learned_rounding_is_measured_on_whole_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = {"a": torch.tensor(0.02), "b": torch.tensor(0.08), "kept": torch.tensor(0.01)}
    monkeypatch.setattr(quality, "open_study", lambda *_: KnownStudy())
    monkeypatch.setattr(quality_methods, "quantize", lambda *_: Quantized(ours, ["a", "b"], 100, 0.5))

    def convert(source: Path, destination: Path, format: str, method: str, layers: list[str], workdir: Path) -> Quantized:
        assert (source, method, layers) == (KnownStudy.source, "learned", ["a", "b"])
        if format == "int8-row":
            raise PeerError("was not done within 9 s")
        destination.touch()
        return Quantized(ours | {"a": torch.tensor(0.04)}, layers, 60, 9.0)

    monkeypatch.setattr(quality_converter, "quantize", convert)
    cells = quality.Settings(["flux"], [], [], "final", tmp_path, learned=["fp8-tensor", "int8-row"])
    recorded: list[Result] = []
    quality.run(cells, Console(file=io.StringIO(), width=300), recorded.extend)
    assert {score.contender for score in recorded} == {"convert-to-quant 1.3.4 learned"}
    found = {(score.case, score.metric, score.detail): score for score in recorded}
    whole = found["fp8-tensor", "velocity error", ""]
    assert whole.p50 == pytest.approx(0.13) and whole.ratio == pytest.approx(0.13 / 0.11) and whole.output_bytes == 60
    assert whole.ratio_to == "streamquant no-data, fp8-tensor"
    assert found["fp8-tensor", "layer output error", "a"].ratio == pytest.approx(2)
    assert found["int8-row", "layer output error", ""].note == "was not done within 9 s"
    assert list((tmp_path / "quality").iterdir()) == [], "converted files go"


def test_what_the_converter_did_not_write_is_not_taken_from_an_earlier_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Peer, "install", lambda peer, workdir: Path("true"))
    source, destination = tmp_path / "source.safetensors", tmp_path / "earlier.safetensors"
    for path in (source, destination):
        save_file({"a.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(PeerError, match="failed"):
        quality_converter.quantize(source, destination, "int8-row", "--simple", ["a.weight"], tmp_path)


def test_synthetic_layers_are_measured_with_other_tools_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes to be measured")
    monkeypatch.setattr(Peer, "install", lambda peer, workdir: Path(sys.executable))
    (tmp_path / "peers").mkdir()
    monkeypatch.setattr(quality_synthetic, "LAYERS", {"blocks.0.attn.qkv": (128, 256), "blocks.0.mlp.2": (64, 512)})
    monkeypatch.setattr(quality_synthetic, "SETS", {"final": range(2)})
    cells = quality.Settings(["synthetic"], [], [], "final", tmp_path, against=["bitsandbytes"])
    recorded: list[Result] = []
    quality.run(cells, Console(file=io.StringIO(), width=300), recorded.extend)
    weights = 128 * 256 + 64 * 512
    for format, bits, error in (("nf4", 4.5, 0.1), ("nf4-double", 4.2, 0.1), ("fp4", 4.5, 0.13), ("int8-row", 8.1, 0.02)):
        mine = [score for score in recorded if score.case == format]
        layers = {score.detail: score.p50 for score in mine if score.metric == "layer output error"}
        assert list(layers) == ["", "blocks.0.attn.qkv 256 columns", "blocks.0.mlp.2 512 columns"]
        mean, *each = layers.values()
        assert mean == pytest.approx(math.sqrt(math.prod(each))) and all(error / 3 < value < 2 * error for value in each)
        assert 8 * mine[0].output_bytes / weights == pytest.approx(bits, rel=0.1) and mine[0].size_bytes == 2 * weights


@pytest.mark.parametrize(
    "wrong",
    [dict(models=["bert"]), dict(formats=["fp9"]), dict(methods=["luck"]), dict(against=["magic"]), dict(learned=["nf4"])],
)
def test_unknown_names_are_refused(wrong: dict, tmp_path: Path) -> None:
    right = dict(models=["flux"], formats=["nf4"], methods=["rtn"])
    with pytest.raises(ValueError, match="no such"):
        quality.Settings(**(right | wrong), scored_on="final", workdir=tmp_path)


def test_the_command_line_refuses_nonsense_at_once() -> None:
    for arguments in (["--formats", "fp9"], ["--models", "bert"], ["--scored-on", "calibrate"], ["--learned", "nf4"]):
        assert CliRunner().invoke(main, ["quality", *arguments]).exit_code == 2
    assert CliRunner().invoke(main, ["train-tiny", "--hidden", "100"]).exit_code == 2


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FluxStudy]:
    """The study of a model with random weights, which is trained nothing but has all the parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_flux, "SETS", {"calibrate": (0, 4), "develop": (4, 2)})
        yield random_study(tmp_path_factory.mktemp("flux"))


def random_study(folder: Path) -> FluxStudy:
    generator = torch.Generator().manual_seed(0)
    model = TinyFlux2(FluxSize(128, 64, 1, 1))
    weights = {
        name: torch.randn(weight.shape, generator=generator).div(weight.shape[-1] ** 0.5) if weight.dim() == 2 else weight
        for name, weight in model.state_dict().items()
    }
    save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, folder / "random.safetensors")
    return FluxStudy("develop", folder, folder / "random.safetensors")


def test_weights_come_back_from_the_product_as_its_file_has_them(flux: FluxStudy, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    quantized = quality_methods.quantize(flux.source, out, "int8-row", "rtn", flux.calibrations)
    stored, source = load_file(out), load_file(flux.source)
    in_blocks = [name for name in source if "_blocks." in name and "norm" not in name]
    assert sorted(quantized.layers) == sorted(in_blocks)
    assert quantized.bytes >= sum(source[name].numel() for name in quantized.layers)
    for name, weight in source.items():
        expected = weight.float()
        if name in quantized.layers:
            expected = stored[name].float() * stored[name.replace("weight", "weight_scale")]
            nearest = (weight.float() / (weight.float().abs().amax(1, keepdim=True) / 127)).round()
            assert torch.equal(stored[name].float(), nearest)
        assert torch.equal(quantized.weights[name], expected)


def test_an_untouched_model_costs_nothing_and_calibration_pays(flux: FluxStudy, tmp_path: Path) -> None:
    same = flux.measure(flux.original)
    assert not same.layers and same.whole["velocity error", ""] == 0 and same.whole["final latent error", ""] == 0
    assert sum(bool(detail) for metric, detail in same.whole if metric == "velocity error") == 16
    nearest, calibrated = (
        flux.measure(quality_methods.quantize(flux.source, tmp_path / "out", "nf4", method, flux.calibrations).weights)
        for method in ("rtn", "sketch")
    )
    ratios = [calibrated.layers[name] / error for name, error in nearest.layers.items()]
    assert len(ratios) == 10 and np.exp(np.mean(np.log(ratios))) < 0.9


def test_the_judge_walks_the_path_it_says(flux: FluxStudy) -> None:
    latent = flux.noise
    for step, (seen, velocity) in enumerate(flux.path):
        assert torch.equal(seen, latent)
        latent = latent - velocity / 16
        assert step < 16 and velocity.shape == latent.shape
    assert torch.equal(latent, flux.latent)


def test_the_peer_s_files_are_decoded_by_their_scales() -> None:
    codes = torch.arange(-12, 12, dtype=torch.int8).reshape(4, 6)

    def decode(scale: torch.Tensor, marker: bytes = b'{"format": "x"}', codes: torch.Tensor = codes) -> torch.Tensor:
        tensors = {"weight": codes, "weight_scale": scale, "comfy_quant": torch.tensor(list(marker), dtype=torch.uint8)}
        return quality_converter.decode(tensors)

    assert torch.equal(decode(torch.tensor(2.0)), codes * 2.0)
    rows = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(decode(rows), codes * rows[:, None]) and torch.equal(decode(rows[:, None]), codes * rows[:, None])
    blocks = decode(torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]]))
    assert torch.equal(blocks[:2, 2:4], codes[:2, 2:4] * 2.0) and torch.equal(blocks[2:, :2], codes[2:, :2] * 3.0)
    # A column of ones is, rotated by H4 / 2 (its rows sum to 1), a column of ones.
    turned = decode(torch.tensor(0.5), b'{"convrot": true, "convrot_groupsize": 4}', torch.ones(3, 8, dtype=torch.int8))
    assert torch.equal(turned, torch.full((3, 8), 0.5))


def test_sets_of_sentences_share_no_sentence_and_a_third_of_their_words() -> None:
    sets = {part: minilm.sentences(200, part) for part in minilm.SETS}
    assert len(set().union(*sets.values())) == 600
    for kind in minilm.WORDS:
        words = [set(minilm.vocabulary(part)[kind]) for part in minilm.SETS]
        common = set.intersection(*words)
        assert len(common) == len(words[0] & words[1]) == len(words[1] & words[2]) == len(words[0] & words[2])
        assert len(common) == math.ceil(len(set.union(*words)) / 3)


def test_synthetic_inputs_repeat_themselves_and_change_with_prompt_and_time() -> None:
    for gated in (False, True):
        inputs = Inputs(64, gated, 1)
        assert torch.equal(inputs(3, 0.5), Inputs(64, gated, 1)(3, 0.5))
        assert not torch.equal(inputs(3, 0.5), inputs(4, 0.5)) and not torch.equal(inputs(3, 0.5), inputs(3, 0.9))
