"""A CLIP text encoder with random weights, quantized, through ComfyUI's own text encoding."""

from __future__ import annotations

import comfy_environment
import pytest
import running
import tiny_flux
import torch
from safetensors.torch import load_file, save_file

from streamquant import FormatChoice, Recipe

pytestmark = pytest.mark.comfyui
LAYERS, WIDTH, HIDDEN, VOCABULARY = 2, 64, 256, 49408
OPTIONS = {
    "model_config": {
        "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "projection_dim": WIDTH,
    }
}  # fmt: skip
FORMATS = {
    "nf4": Recipe(FormatChoice("nf4")),
    "nf4+fp8": Recipe(FormatChoice("nf4", double_quant=True), custom_layers="mlp", custom=FormatChoice("fp8"), comfy_quant=True),
    "fp8-block": Recipe(FormatChoice("fp8", "block", 32)),
    "int8-block": Recipe(FormatChoice("int8", "block", 32)),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    tensors = {
        "text_model.embeddings.token_embedding.weight": normal(VOCABULARY, WIDTH),
        "text_model.embeddings.position_embedding.weight": normal(77, WIDTH),
        "text_model.final_layer_norm.weight": torch.ones(WIDTH),
        "text_model.final_layer_norm.bias": torch.zeros(WIDTH),
    }
    for layer in range(LAYERS):
        block = f"text_model.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= {f"{block}.self_attn.{name}.weight": normal(WIDTH, WIDTH), f"{block}.self_attn.{name}.bias": normal(WIDTH)}
        tensors |= {f"{block}.mlp.fc1.weight": normal(HIDDEN, WIDTH), f"{block}.mlp.fc1.bias": normal(HIDDEN)}
        tensors |= {f"{block}.mlp.fc2.weight": normal(WIDTH, HIDDEN), f"{block}.mlp.fc2.bias": normal(WIDTH)}
        for name in ("layer_norm1", "layer_norm2"):
            tensors |= {f"{block}.{name}.weight": torch.ones(WIDTH), f"{block}.{name}.bias": torch.zeros(WIDTH)}
    path = tmp_path_factory.mktemp("text") / "clip.safetensors"
    save_file(tensors, path)
    return path


def encode(clip):
    return clip.encode_from_tokens(clip.tokenize("a photograph of a cat"))


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """Text encoders otherwise keep what is not quantized in float16."""
    import comfy.model_management

    assert comfy_environment.IS_REAL
    monkeypatch.setattr(comfy.model_management, "text_encoder_dtype", lambda device=None: torch.float32)


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_encoding_is_that_of_the_decoded_weights(encoder, name):
    import comfy.sd

    from comfyui_quantops.layouts import is_ours
    from comfyui_quantops.loader import load_text_encoder

    path = tiny_flux.convert(encoder, FORMATS[name], name)
    tensors = load_file(path)
    plain = tiny_flux.decode(tensors) | {key: t for key, t in tensors.items() if key.endswith(".bias")}
    expected = comfy.sd.load_text_encoder_state_dicts([plain], None, comfy.sd.CLIPType.STABLE_DIFFUSION, dict(OPTIONS))
    clip = load_text_encoder([str(path)], None, comfy.sd.CLIPType.STABLE_DIFFUSION, dict(OPTIONS))
    assert any(is_ours(getattr(module, "weight", None)) for module in clip.cond_stage_model.modules())
    assert running.difference(encode(clip), encode(expected)) <= 10 * tiny_flux.EXACT
    # ComfyUI clones text encoders too, by loading them anew.
    load, arguments = clip.patcher.cached_patcher_init
    assert load(*arguments, disable_dynamic=True).model_size() == clip.patcher.model_size()


def test_an_unquantized_encoder_goes_comfyuis_own_way(encoder):
    import comfy.sd

    from comfyui_quantops.loader import load_text_encoder

    clip = load_text_encoder([str(encoder)], None, comfy.sd.CLIPType.STABLE_DIFFUSION, dict(OPTIONS))
    assert not any("Hybrid" in type(module).__qualname__ for module in clip.cond_stage_model.modules())


@pytest.mark.parametrize("partly", [False, True])
def test_comfyui_saves_a_quantized_encoder(encoder, tmp_path, monkeypatch, partly):
    import comfy.model_management
    import comfy.sd
    import folder_paths
    from comfy_extras.nodes_model_merging import CLIPSave

    from comfyui_quantops.loader import load_text_encoder

    path = tiny_flux.convert(encoder, FORMATS["nf4+fp8"], f"saved-{partly}")
    clip = load_text_encoder([str(path)], None, comfy.sd.CLIPType.STABLE_DIFFUSION, dict(OPTIONS))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    if partly:
        clip.patcher.detach()
        clip.patcher.load(torch.device("cpu"), lowvram_model_memory=1)
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: None)
    CLIPSave().save(clip, "saved")
    (saved,) = tmp_path.glob("*.safetensors")
    found, original = load_file(saved), load_file(path)
    assert [key for key, tensor in original.items() if not running.same_bytes(found[key], tensor)] == []
