"""Quality on real weights with real activations: the sentence encoder MiniLM.

Calibrated on one set of sentences, scored on another: no sentence is in both, and of the words and patterns that are not common
to all sets none is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks import minilm
from benchmarks.quality_layers import Measured, OnDemand, output_error, second_moments
from benchmarks.quality_results import MINILM
from streamquant.calibration import collect

SENTENCES = 200
METHODS_LEFT_OUT = ("noise", "structure")  # it has no path from noise; no preset knows its graph


class MiniLMStudy:
    """The encoder, its inputs on the scored set, its embeddings of it. `source`: the checkpoint to convert."""

    name = MINILM

    def __init__(self, scored_on: str, workdir: Path):
        self.source = minilm.folder() / "model.safetensors"
        self.model = minilm.SentenceEncoder(minilm.folder())
        self.texts = minilm.sentences(SENTENCES, scored_on)
        self.keys = [f"{name}.weight" for name, layer in self.model.named_modules() if isinstance(layer, torch.nn.Linear)]
        self.weights = {key: self.model.get_parameter(key).detach().clone() for key in self.keys}
        self.original = minilm.load_file(self.source)
        self.moments = second_moments(self.model, self.keys, self.embed)
        self.embeddings = self.embed()
        self.calibrations = OnDemand(lambda kind: self._calibrate(kind, workdir / f"minilm-{kind}.safetensors"))

    @torch.no_grad()
    def embed(self) -> Tensor:
        """Embeddings [sentences, 384] of the scored set by the model as it is now."""
        return torch.stack([self.model(text) for text in self.texts])

    def _calibrate(self, kind: str, path: Path) -> Path:
        with collect(self.model, dense=kind == "dense", budget=None) as collector, torch.no_grad():
            for text in minilm.sentences(SENTENCES, "calibrate"):
                self.model(text)
        collector.calibration().save(path)
        return path

    def applies(self, method: str) -> bool:
        return method not in METHODS_LEFT_OUT

    def measure(self, weights: dict[str, Tensor]) -> Measured:
        """What these weights cost; those that are not there stay as they were."""
        measured = Measured()
        for key in self.keys:
            measured.layers[key.removesuffix(".weight")] = output_error(self.moments[key], self.weights[key], weights[key])
        self.model.load({**self.original, **weights})
        try:
            measured.whole["1 - cosine", ""] = float((1 - (self.embed() * self.embeddings).sum(1)).double().mean())
        finally:
            self.model.load(self.original)
        return measured
