"""Files that other programs make: each named for what it is, and refused in one sentence where it cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from others_layers import EVERY_LAYOUT, bnb4, legacy_float8, plain_cast, weight
from small_checkpoints import Tensor, floats, noise, of_values, save, save_shards

from streamquant import cli, errors
from streamquant.inspect import inspect

CONFIG_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
              "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16"}  # fmt: skip
CONFIG_INT8 = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
LORAS = {
    "peft": ("base_model.model.blocks.{}.to_q.lora_A.weight", "base_model.model.blocks.{}.to_q.lora_B.weight"),
    "peft with a name": ("blocks.{}.to_q.lora_A.default.weight", "blocks.{}.to_q.lora_B.default.weight"),
    "kohya": ("lora_unet_double_blocks_{}_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_{}_img_attn_qkv.lora_up.weight"),
    "diffusers": ("unet.{}.processor.to_q_lora.down.weight", "unet.{}.processor.to_q_lora.up.weight"),
    "linear layers": ("unet.{}.to_q.lora_linear_layer.down.weight", "unet.{}.to_q.lora_linear_layer.up.weight"),
}


def run(*arguments: str | Path, columns: int = 160) -> Result:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def lora(path: Path, kind: str = "kohya", rank: int = 16) -> Path:
    down, up = LORAS[kind]
    tensors = {}
    for block in range(3):
        tensors[down.format(block)] = floats(rank, 64)
        tensors[up.format(block)] = floats(128, rank)
        if kind == "kohya":
            tensors[down.format(block).replace("lora_down.weight", "alpha")] = of_values(np.array(8.0))
    return save(path, tensors)


def quanto(path: Path) -> Path:
    """As optimum-quanto's modules save themselves: 8 bits in `a`, 4 bits in `b`."""
    scales = {f"{name}.{kind}_scale": floats(dtype="F32") for name in "ab" for kind in ("input", "output")}
    eight = {"a.weight._data": noise("I8", 32, 32), "a.weight._scale": floats(32, 1)}
    four = {"b.weight._data._data": noise("U8", 16, 32), "b.weight._scale": floats(32, 1), "b.weight._shift": floats(32, 1)}
    return save(path, eight | four | scales | {"a.bias": floats(32), "norm.weight": floats(32)})


def torchao(path: Path) -> Path:
    """As torchao flattens a Float8Tensor for safetensors."""
    stands = {"_type": "Float8Tensor", "_data": {"block_size": [1, 32]}, "_tensor_data_names": ["qdata", "scale"]}
    metadata = {"a.weight": json.dumps(stands), "a.bias": '{"_type": "Tensor"}', "tensor_names": '["a.weight", "a.bias"]'}
    return save(
        path, {"a._weight_qdata": noise("F8_E4M3", 32, 32), "a._weight_scale": floats(32, 1), "a.bias": floats(32)}, metadata
    )


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_is_named_as_one(tmp_path, kind):
    found = inspect(lora(tmp_path / "lora.safetensors", kind))
    assert (found.adapter.kind, found.adapter.layers, found.adapter.ranks) == ("LoRA", 3, {16: 3})
    assert found.alphas == ((8.0,) if kind == "kohya" else ())
    shown = run("inspect", tmp_path / "lora.safetensors").stdout
    assert "a LoRA of 3 layers, rank 16" in shown and "not a checkpoint to convert" in shown
    assert ("alpha 8" in shown) == (kind == "kohya")
    assert json.loads(run("inspect", "--json", tmp_path / "lora.safetensors").stdout)["adapter"]["kind"] == "LoRA"


@pytest.mark.parametrize(
    ("kind", "names"),
    [("LoHa", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")), ("LoKr", ("lokr_w1", "lokr_w2_a", "lokr_w2_b"))],
)
def test_kin_of_lora(tmp_path, kind, names):
    path = save(tmp_path / "file.safetensors", {f"lora_unet_block.{name}": floats(4, 4) for name in names})
    found = inspect(path)
    assert (found.adapter.kind, found.adapter.layers) == (kind, 1)


def test_a_model_with_a_few_such_names_is_no_lora(tmp_path):
    tensors = {f"blocks.{block}.linear.weight": floats(32, 32) for block in range(4)}
    tensors |= {"blocks.0.lora_A.weight": floats(4, 32), "blocks.0.lora_B.weight": floats(32, 4)}
    assert inspect(save(tmp_path / "model.safetensors", tensors)).adapter is None


@pytest.mark.parametrize("command", ["convert", "dequantize", "verify", "compare"])
@pytest.mark.parametrize("make", [lora, quanto, torchao])
def test_what_cannot_be_used_is_refused_in_a_sentence(tmp_path, make, command):
    path = make(tmp_path / "theirs.safetensors")
    plain = save(tmp_path / "plain.safetensors", {"a.weight": floats(32, 32), "a.bias": floats(32), "norm.weight": floats(32)})
    others = {"verify": [[plain, path], [path, plain]], "compare": [[plain, path], [path, plain]]}
    for arguments in others.get(command, [[path, "-o", tmp_path / "new.safetensors"]]):
        shown = run(command, *arguments)
        expected = errors.NothingToConvertError if command == "convert" and make is not lora else errors.CheckpointError
        assert shown.exit_code == expected.exit_code, shown.output
        name = {lora: "LoRA", quanto: "optimum-quanto", torchao: "torchao"}[make]
        assert name in shown.stderr and str(path) in shown.stderr and len(shown.stderr.strip().splitlines()) == 1, shown.stderr
        assert shown.stdout == ""
    assert sorted(tmp_path.iterdir()) == sorted([path, plain])


@pytest.mark.parametrize("make", [quanto, torchao])
def test_other_tools_are_named(tmp_path, make):
    shown = run("inspect", make(tmp_path / "theirs.safetensors")).stdout
    assert "In layouts of other tools" in shown and {quanto: "optimum-quanto", torchao: "torchao"}[make] in shown
    assert "stock ComfyUI" not in shown


def test_a_copy_of_a_foreign_file_is_sound(tmp_path):
    assert run("verify", quanto(tmp_path / "a.safetensors"), quanto(tmp_path / "b.safetensors")).exit_code == 0


def folder(path: Path, kind: str, config: dict | str | None) -> Path:
    """A sharded diffusers folder."""
    shards = [EVERY_LAYOUT[kind](weight(64, 64)).named(f"blocks.{shard}.to_q") | {f"norm{shard}.weight": floats(64)}
              for shard in range(2)]  # fmt: skip
    save_shards(path, *shards, stem="diffusion_pytorch_model")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps({"_class_name": "Tiny", "quantization_config": config})
        (path / "config.json").write_text(text)
    return path


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("nf4", CONFIG_NF4, "bitsandbytes 4-bit nf4, computes in bfloat16"),
        ("nf4 nested", CONFIG_NF4 | {"bnb_4bit_use_double_quant": True}, "bitsandbytes 4-bit nf4, absmax in 8 bits"),
        ("fp4", CONFIG_NF4 | {"bnb_4bit_quant_type": "fp4"}, "bitsandbytes 4-bit fp4"),
        ("llm.int8", CONFIG_INT8, "bitsandbytes 8-bit"),
    ],
)
def test_a_folder_says_how_it_is_quantized(tmp_path, kind, config, said):
    found = inspect(folder(tmp_path / "transformer", kind, config))
    assert found.config.startswith(said) and found.faults == () and found.files == 2
    assert f"{said}" in run("inspect", tmp_path / "transformer").stdout


@pytest.mark.parametrize(
    ("kind", "config", "fault"),
    [
        ("fp4", CONFIG_NF4, "says nf4, and 2 of its layers are bnb_fp4"),
        ("nf4", CONFIG_NF4 | {"bnb_4bit_use_double_quant": True}, "says absmax in 8 bits, and 2 of its layers have it in F32"),
        ("nf4 nested", CONFIG_NF4, "says nothing of absmax in 8 bits, and 2"),
        ("nf4", CONFIG_INT8, "says bitsandbytes 8-bit, and no layer of it is"),
        ("llm.int8", CONFIG_NF4, "says bitsandbytes 4-bit, and no layer of it is"),
        ("nf4", "{}", "has no quantization_config"),
        ("nf4", "not json", "cannot be read as JSON"),
        ("nf4", "[]", "no JSON object"),
    ],
)
def test_a_config_that_the_tensors_belie(tmp_path, kind, config, fault):
    found = inspect(folder(tmp_path / "transformer", kind, config))
    assert any(fault in text for _, text in found.faults), found.faults


def test_a_config_that_is_not_about_the_file(tmp_path):
    path = save(tmp_path / "flux.safetensors", bnb4(weight(64, 64), "nf4").named("a"))
    (tmp_path / "config.json").write_text("{}")
    assert inspect(path).faults == ()


def test_a_single_file_of_forge_with_its_prefixes(tmp_path):
    prefixes = ("model.diffusion_model.", "text_encoders.t5xxl.transformer.", "vae.")
    tensors = bnb4(weight(64, 64), "nf4").named(f"{prefixes[0]}double_blocks.0.img_attn.qkv")
    tensors |= bnb4(weight(64, 64), "fp4").named(f"{prefixes[0]}single_blocks.0.linear1")
    tensors |= plain_cast(weight(64, 64)).named(f"{prefixes[1]}encoder.block.0.layer.0.SelfAttention.q")
    tensors |= {f"{prefixes[2]}decoder.conv_in.weight": floats(8, 4, 3, 3)}
    found = inspect(save(tmp_path / "forge.safetensors", tensors))
    assert {group.format for group in found.groups} == {"bnb_nf4", "bnb_fp4", "float8_e4m3fn"} and found.faults == ()
    assert run("inspect", tmp_path / "forge.safetensors").exit_code == 0


def test_the_older_comfyui_kind(tmp_path):
    stored = legacy_float8(weight(32, 32)).named("model.a") | {"scaled_fp8": Tensor("F8_E4M3", (2,), b"\0\0")}
    shown = run("inspect", save(tmp_path / "file.safetensors", stored)).stdout
    assert "scaled_fp8" in shown and "stock ComfyUI" in shown and "Wrong" not in shown


@pytest.mark.parametrize(
    "tensors",
    [
        {"shared.weight": floats(64, 32), "encoder.block.0.layer.0.SelfAttention.q.weight": floats(32, 32)},
        {"decoder.conv_in.weight": floats(8, 4, 3, 3), "encoder.conv_in.weight": floats(8, 3, 3, 3)},
        {},
        {"empty": Tensor("F32", (0,), b"")},
    ],
    ids=["text encoder", "VAE", "no tensor", "a tensor of nothing"],
)
@pytest.mark.parametrize("screen", [[], ["--layers"], ["--tree"], ["--json"]])
def test_plain_and_empty_files_have_their_screens(tmp_path, tensors, screen):
    shown = run("inspect", *screen, save(tmp_path / "file.safetensors", tensors), columns=80)
    assert shown.exit_code == 0, shown.output
    if not screen:
        assert "no layer is quantized" in shown.stdout
