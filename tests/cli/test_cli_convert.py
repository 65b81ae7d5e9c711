"""The command line as a person or a program meets it: real processes, real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import write_checkpoint
from benchmarks.shapes import flux_of_size
from streamquant import cli, presets

HEADLINE = ["--bnb-4bit", "--flux2", "--custom-layers", "img_in|txt_in|final_layer", "--custom-type", "fp8"]


def run(*arguments: str | Path, module: str = "streamquant", **named) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *(["convert"] if module == "streamquant" else []), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **named)


def generate(path: Path, size_bytes: int) -> None:
    write_checkpoint(path, flux_of_size(size_bytes).tensors())


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def flux2(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flux2") / "flux2.safetensors"
    generate(path, size_bytes=20_000_000)
    return path


@pytest.mark.parametrize("module", ["streamquant", "streamquant.convert_to_quant"])
@pytest.mark.parametrize("spelling", ["--comfy-quant", "--comfy_quant"])
def test_headline_command_with_bare_absmax(flux2, tmp_path, module, spelling):
    output = tmp_path / "out.safetensors"
    finished = run(flux2, *HEADLINE, "--rtn", spelling, "-o", output, module=module)
    assert finished.returncode == 0, finished.stderr
    assert "bnb_nf4" in finished.stdout and "float8_e4m3fn" in finished.stdout and str(output.name) in finished.stdout
    source, converted = load_file(flux2), load_file(output)
    with safe_open(output, "pt") as file:
        metadata = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    fp8 = {"img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"}
    assert set(metadata) == fp8
    kept = ("stream_modulation", "guidance_in", "time_in")
    for key, weight in source.items():
        layer = key.removesuffix(".weight")
        if layer in fp8:
            assert converted[key].dtype == torch.float8_e4m3fn
            marker = json.loads(bytes(converted[f"{layer}.comfy_quant"].tolist()))
            assert marker == {"format": "float8_e4m3fn"} == metadata[layer]
            torch.testing.assert_close(
                converted[key].float() * converted[f"{layer}.weight_scale"], weight.float(), rtol=0.07, atol=1e-3
            )
        elif weight.ndim == 2 and not any(word in key for word in kept):
            packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
            assert torch.equal(converted[key], packed)
            ours = {name.removeprefix(f"{layer}."): tensor for name, tensor in converted.items() if name.startswith(f"{key}.")}
            theirs = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            assert torch.equal(QuantState.from_dict(ours, torch.device("cpu")).absmax, state.absmax)
            assert json.loads(bytes(converted[f"{layer}.comfy_quant"].tolist())) == {"format": "bnb_nf4", "group_size": 64}
        else:
            assert torch.equal(converted[key], weight), "what nobody claims is copied"


def test_headline_command_lowers_the_error_of_what_bitsandbytes_reads(flux2, tmp_path):
    """Without more words scales are searched: other bytes than bitsandbytes' own, which it decodes to less error."""
    output = tmp_path / "out.safetensors"
    finished = run(flux2, *HEADLINE, "--comfy-quant", "-o", output)
    assert finished.returncode == 0, finished.stderr
    assert "Nothing is known of the inputs" in finished.stderr and "time sweep" in finished.stderr
    source, converted = load_file(flux2), load_file(output)
    checked = 0
    for key in [key for key in converted if key.endswith(".weight.quant_map")]:
        layer, weight = key.removesuffix(".weight.quant_map"), source[key.removesuffix(".quant_map")].float()
        state = {name: tensor for name, tensor in converted.items() if name.startswith(f"{layer}.weight.")}
        state = QuantState.from_dict({name.removeprefix(f"{layer}."): part for name, part in state.items()}, "cpu")
        ours = dequantize_4bit(converted[f"{layer}.weight"], state).float()
        theirs = dequantize_4bit(*quantize_4bit(source[f"{layer}.weight"], blocksize=64, quant_type="nf4")).float()
        assert (ours - weight).norm() < (theirs - weight).norm(), layer
        checked += 1
    assert checked > 20


def test_default_output_lies_beside_the_source_and_names_the_formats(flux2, tmp_path):
    source = tmp_path / "model.safetensors"
    source.symlink_to(flux2)
    assert run("-i", source, *HEADLINE).returncode == 0
    assert (tmp_path / "model-nf4-fp8.safetensors").is_file()
    assert run(source, "--fp8", "--scaling_mode", "block", "--block_size", "64", "--quiet").returncode == 0
    assert (tmp_path / "model-fp8-block64.safetensors").is_file()


def test_dry_run_writes_nothing_and_agrees_with_the_real_run(flux2, tmp_path):
    output = tmp_path / "out.safetensors"
    planned = run(flux2, *HEADLINE, "-o", output, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert list(tmp_path.iterdir()) == []
    plan = json_lines(planned.stdout)[0]
    assert run(flux2, *HEADLINE, "-o", output, "--quiet").returncode == 0
    assert plan["output_bytes"] == output.stat().st_size
    with open(output, "rb") as file:
        for tensor in plan["tensors"]:
            for written in tensor["outputs"]:
                if written["name"].endswith("quant_map"):
                    file.seek(written["offset"])
                    assert torch.frombuffer(bytearray(file.read(written["bytes"])), dtype=torch.float32)[0] == -1.0
    text = run(flux2, *HEADLINE, "-o", tmp_path / "other.safetensors", "--dry-run").stdout
    for words in ("custom layers", "base format", "preset flux2", "Free disk", "Peak memory"):
        assert words in text


def test_json_lines_tell_a_program_everything(flux2, tmp_path):
    finished = run(flux2, "--int8", "-o", tmp_path / "out.safetensors", "--json")
    events = json_lines(finished.stdout)
    assert [event["event"] for event in events][:4] == ["note", "note", "note", "started"]
    assert "rotated (ConvRot)" in events[1]["text"] and "Nothing is known" in events[2]["text"]
    layers = [event for event in events if event["event"] == "layer"]
    assert {layer["knowledge"] for layer in layers} == {"nearest"} and len(layers) == 24
    assert events[-1]["event"] == "done"
    assert {summary["format"] for summary in events[-1]["formats"]} == {"int8_tensorwise", "copy"}
    assert events[-1]["outputs"] == [str(tmp_path / "out.safetensors")]
    assert 0 < [event for event in events if event["event"] == "done"][0]["formats"][0]["mean_relative_error"] < 0.1


def test_quiet_says_nothing(flux2, tmp_path):
    finished = run(flux2, "--fp8", "-q", "-o", tmp_path / "out.safetensors")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.safetensors"], 5, "no file or folder at missing.safetensors"),
        ([], 2, "Which checkpoint?"),
        (["{source}", "-i", "{source}"], 2, "given twice"),
        (["{source}", "--custom-layers", "img_in"], 2, "needs --custom-type"),
        (["{source}", "--custom-type", "fp8"], 2, "needs --custom-layers"),
        (["{source}", "--custom-layers", "img_[in", "--custom-type", "fp8"], 2, "position"),
        (["{source}", "--exclude-layers", "no_such_layer"], 2, "finds no tensor"),
        (["{source}", "--exclude-layers", "key_norm"], 2, "only tensors that cannot be quantized"),
        (["{source}", "--preset", "fluxx"], 2, "no preset 'fluxx'"),
        (["{source}", "--scaling-mode", "wide"], 2, "wide"),
        (["{source}", "--int8", "--scaling-mode", "block3d"], 2, "does not go with int8"),
        (["{source}", "--bnb-4bit", "--bnb-blocksize", "48"], 2, "no block size 48"),
        (["{source}", "--bnb-4bit", "--scaling-mode", "row"], 2, "--bnb-blocksize"),
        (["{source}", "--memory-budget", "lots"], 2, "not a size"),
        (["{source}", "--memory-budget", "1MiB"], 4, "--memory-budget"),
        (["{source}", "--device", "cuda:99"], 4, "cuda"),
        (["{source}", "--device", "tpu"], 2, "no device 'tpu'"),
        (["{source}", "-o", "{source}"], 4, "is the source itself"),
        (["{source}", "-o", "no/such/folder/out.safetensors"], 4, "does not exist"),
        (["{source}", "--layer-config", "missing.toml"], 2, "Cannot read the layer config"),
    ],
)
def test_every_refusal_is_one_sentence_with_its_own_exit_code(flux2, tmp_path, arguments, code, words):
    finished = run(*(argument.format(source=flux2) for argument in arguments), cwd=tmp_path, env=_environment())
    assert finished.returncode == code, finished.stderr
    assert words.lower() in finished.stderr.lower()
    assert "Traceback" not in finished.stderr
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}


def test_an_existing_output_is_only_replaced_when_asked(flux2, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_text("precious")
    refused = run(flux2, "--fp8", "-o", output)
    assert refused.returncode == 4 and "--force" in refused.stderr and output.read_text() == "precious"
    assert run(flux2, "--fp8", "-o", output, "--force").returncode == 0
    assert output.stat().st_size > 1_000_000


def test_a_nan_is_named_and_nothing_is_left_behind(tmp_path):
    weight = torch.ones(8, 64)
    weight[3, 5] = float("nan")
    save_file({"blocks.0.weight": weight}, tmp_path / "nan.safetensors")
    finished = run(tmp_path / "nan.safetensors", "--fp8", "-o", tmp_path / "out.safetensors")
    assert finished.returncode == 8 and "blocks.0.weight[3, 5] is nan" in finished.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["nan.safetensors"]
    assert run(tmp_path / "nan.safetensors", "--fp8", "-o", tmp_path / "out.safetensors", "--allow-nonfinite").returncode == 0
    assert load_file(tmp_path / "out.safetensors")["blocks.0.weight"].float().isnan().sum() == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_a_tile_and_the_printed_command_goes_on(tmp_path, number):
    source = tmp_path / "big.safetensors"
    generate(source, size_bytes=800_000_000)
    output, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    command = [sys.executable, "-m", "streamquant", "convert", str(source), "--bnb-4bit", "-o", str(output), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if json.loads(line)["event"] == "progress":
            break
    process.send_signal(number)
    rest, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert not output.exists()
    failure = json_lines(rest)[-1]
    assert failure["exit_code"] == 130 and failure["resume"].endswith("--resume")
    assert failure["resume"] in complaint
    resumed = run(*failure["resume"].split()[2:])
    assert resumed.returncode == 0, resumed.stderr
    assert run(source, "--bnb-4bit", "-o", whole, "-q").returncode == 0
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["big.safetensors", "out.safetensors", "whole.safetensors"]


def test_help_needs_neither_torch_nor_numba():
    code = "import sys; from streamquant.cli import main\ntry: main(['convert', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numba', 'rich'} & set(sys.modules), 'heavy imports for a help text'"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


def test_help_fits_a_screen_and_names_every_option():
    shown = CliRunner().invoke(cli.main, ["convert", "--help"], terminal_width=80).output
    assert len(shown.splitlines()) <= 50
    for option in cli.convert.params:
        if option.name not in ("preset_flags", "source"):
            assert option.opts[-1] in shown, f"{option.opts[-1]} is not in the help"
    listed = CliRunner().invoke(cli.main, ["presets"], env={"COLUMNS": "200"}).output
    assert all(f"--{flag}" in listed for flag in presets.flags())


def test_version_names_the_libraries():
    shown = CliRunner().invoke(cli.main, ["--version"]).output
    assert all(name in shown for name in ("streamquant", "torch 2", "triton", "bitsandbytes"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    shown = CliRunner().invoke(cli.main, ["completion", shell]).output
    assert "_STREAMQUANT_COMPLETE" in shown


def test_names_from_a_file_cannot_write_to_the_terminal(tmp_path):
    save_file({"a[red]\x1b[2J.weight": torch.ones(8, 60), "b.weight": torch.ones(8, 64)}, tmp_path / "odd.safetensors")
    shown = run(tmp_path / "odd.safetensors", "--fp8", "--scaling-mode", "block", "--block-size", "4", "--heur", "--dry-run",
                "-o", tmp_path / "out.safetensors")  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    shown = run(tmp_path / "odd.safetensors", "--int8", "--scaling-mode", "block", "--block-size", "64", "--dry-run",
                "-o", tmp_path / "out.safetensors")  # fmt: skip
    assert "\x1b" not in shown.stdout + shown.stderr
    assert "a[red]\\x1b[2J.weight" in shown.stdout


def test_a_vanished_source_keeps_the_partial(tmp_path):
    source = tmp_path / "big.safetensors"
    generate(source, size_bytes=800_000_000)
    output = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "streamquant", "convert", str(source), "--bnb-4bit", "-o", str(output), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if json.loads(line)["event"] == "progress":
            break
    os.truncate(source, source.stat().st_size // 2)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 6, complaint
    assert "changed while it was being read" in complaint
    assert any(entry.name.endswith(".partial") for entry in tmp_path.iterdir())
    assert not output.exists()
