"""`streamquant convert`: words become a Recipe, Options and a call."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from streamquant import presets
from streamquant.cli.running import stop_on_signals
from streamquant.cli.safe import command_line
from streamquant.cli.words import Size
from streamquant.errors import RunError, StreamquantError, UsageError
from streamquant.layer_config import read_layer_config
from streamquant.recipe import CALIBRATION_MODES, OBJECTIVES, FormatChoice, Recipe

CASTS = {"bf16": "BF16", "fp16": "F16"}
TYPES = ("fp8", "int8", "nf4", "fp4", "fp8_e5m2")
MODES = ("tensor", "row", "block", "block2d", "block3d")


def _preset_flags(command: Callable) -> Callable:
    """One flag per preset; the help names them all in one row."""
    for flag, name in sorted(presets.flags().items(), reverse=True):
        command = click.option(f"--{flag}", "preset_flags", flag_value=name, multiple=True, hidden=True)(command)
    return command


# The help of `convert` as a person reads it: options that belong together share a row, so that all fit one screen.
CONVERT_HELP = {
    "Files": [
        ("--input", "the source, instead of naming it first"),
        ("--output", "[the source's name with the formats in it]"),
        ("--force --resume", "replace an output; go on after an interruption"),
        ("--dry-run --shard-size", "only show the plan; write shards of this size"),
    ],
    "Format of every layer that no other rule claims": [
        ("--fp8 --int8 --bnb-4bit", "FP8 E4M3 (default), INT8, bitsandbytes 4-bit"),
        ("--scaling-mode", "scale per tensor (fp8), row (int8), block"),
        ("--block-size", "edge of an FP8 or INT8 block [128]"),
        ("--bnb-quant-type", "nf4 or fp4 [nf4]"),
        ("--bnb-blocksize", "weights per absmax, 32 to 4096 [64]"),
        ("--bnb-double-quant --convrot", "absmax in 8 bits; rotate INT8 [where better]"),
        ("--convrot-group-size --heur", "[256, or 64]; keep small layers"),
    ],
    "Rounding (learned, unless you say otherwise)": [
        ("--calibration", "what the layers see: streamquant calibration"),
        ("--calibration-mode", "sketch, or dense: more memory [sketch]"),
        ("--calibration-rank", "of the sketch [64]"),
        ("--structure --sweeps", "guess second MLP layers' inputs; sweeps [0]"),
        ("--simple --rtn", "nearest, scales searched; bare absmax"),
        ("--objective", "output, or svd for comparison [output]"),
    ],
    "Which layer becomes what (the upper rule wins)": [
        ("--layer-config", "TOML or JSON: regex -> format and parameters"),
        ("--custom-layers", "layers of another format"),
        ("--custom-type", "their format: fp8, fp8_e5m2, int8, nf4, fp4"),
        ("--custom-scaling-mode", "their scaling mode, never inherited"),
        ("--custom-block-size", "their block size"),
        ("--custom-simple --custom-heur", "--simple and --heur for them"),
        ("--exclude-layers", "layers that stay as they are"),
        ("--preset", "auto, none or a name: `streamquant presets`"),
        ("", "lists them; each is a flag too: --flux2"),
    ],
    "Output": [
        ("--comfy-quant", "mark 4-bit layers for ComfyUI too"),
        ("--cast", "cast floating tensors that stay: bf16 or fp16"),
        ("--allow-nonfinite --seed", "convert NaN and infinity; recorded"),
    ],
    "Machine and screen": [
        ("--memory-budget --vram-budget", "[1GiB, 2GiB]"),
        ("--device --io", "auto, cpu, cuda[:N]; auto, mmap, pread"),
        ("--threads --report", "[all processors]; write a page with pictures"),
        ("--json --quiet --help", "for programs; errors only; this text"),
    ],
}


class GroupedHelp(click.Command):
    """A command whose options are shown in the groups and rows of CONVERT_HELP."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        spelled = {"": ""}
        for option in self.get_params(context):
            if isinstance(option, click.Option):
                metavar = "" if option.is_flag else f" {option.make_metavar(context)}"
                spelled[option.opts[-1]] = ", ".join(option.opts) + metavar
        spelled["--help"] = "--help"
        for heading, rows in CONVERT_HELP.items():
            with formatter.section(heading):
                formatter.write_dl([("  ".join(spelled[word] for word in names.split() or [""]), text) for names, text in rows])


@click.command(cls=GroupedHelp, short_help="Convert SOURCE to FP8, INT8, NF4 or a mixture.")
@click.argument("source", required=False, metavar="[SOURCE]")
@click.option("-i", "--input", "input_", metavar="PATH")
@click.option("-o", "--output", metavar="PATH")
@click.option("--force", is_flag=True)
@click.option("--resume", is_flag=True)
@click.option("--shard-size", type=Size())
@click.option("--dry-run", is_flag=True)
@click.option("--fp8", "base", flag_value="fp8")
@click.option("--int8", "base", flag_value="int8")
@click.option("--bnb-4bit", "base", flag_value="bnb")
@click.option("--scaling-mode", type=click.Choice(MODES), metavar="MODE")
@click.option("--block-size", type=int, metavar="N")
@click.option("--bnb-quant-type", type=click.Choice(["nf4", "fp4"]), default="nf4", metavar="T")
@click.option("--bnb-blocksize", type=int, default=64, metavar="N")
@click.option("--bnb-double-quant", is_flag=True)
@click.option("--simple", is_flag=True)
@click.option("--rtn", is_flag=True)
@click.option("--heur", is_flag=True)
@click.option("--convrot/--no-convrot", default=None)
@click.option("--convrot-group-size", type=int, metavar="N")
@click.option("--calibration", metavar="FILE")
@click.option("--calibration-mode", type=click.Choice(CALIBRATION_MODES), default="sketch", metavar="MODE")
@click.option("--calibration-rank", type=click.IntRange(1), default=64, metavar="K")
@click.option("--sweeps", type=click.IntRange(0), default=0, metavar="N")
@click.option("--structure", is_flag=True)
@click.option("--objective", type=click.Choice(OBJECTIVES), default="output", metavar="WHAT")
@click.option("--layer-config", metavar="FILE")
@click.option("--custom-layers", metavar="REGEX")
@click.option("--custom-type", type=click.Choice(TYPES), metavar="TYPE")
@click.option("--custom-block-size", type=int, metavar="N")
@click.option("--custom-scaling-mode", type=click.Choice(MODES), metavar="MODE")
@click.option("--custom-simple", is_flag=True)
@click.option("--custom-heur", is_flag=True)
@click.option("--exclude-layers", metavar="REGEX")
@click.option("--preset", "preset_names", multiple=True, metavar="NAME")
@_preset_flags
@click.option("--comfy-quant", is_flag=True)
@click.option("--cast", type=click.Choice(sorted(CASTS)), metavar="DTYPE")
@click.option("--allow-nonfinite", is_flag=True)
@click.option("--seed", type=int, default=0, metavar="N")
@click.option("--memory-budget", type=Size(), default="1GiB")
@click.option("--vram-budget", type=Size())
@click.option("--device", default="auto", metavar="NAME")
@click.option("--io", type=click.Choice(["auto", "mmap", "pread"]), default="auto", metavar="HOW")
@click.option("--threads", type=click.IntRange(1), metavar="N")
@click.option("--report", metavar="DIR")
@click.option("--json", "as_json", is_flag=True)
@click.option("-q", "--quiet", is_flag=True)
def convert(**given: Any) -> None:
    """Convert SOURCE, a .safetensors file, a shard index or a folder. In option
    names underscores are read as hyphens."""
    from streamquant import console

    screen = console.Screen(as_json=given["as_json"], quiet=given["quiet"])
    try:
        _convert(given, screen)
    except RunError as error:
        hint = "" if given["resume"] else " --resume"
        screen.fail(error, go_on_with=command_line(["streamquant", *sys.argv[1:]]) + hint)
        sys.exit(error.exit_code)
    except StreamquantError as error:
        screen.fail(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our lines is gone; the partial output is kept. Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _convert(given: dict[str, Any], screen: Any) -> None:
    source = _source(given)
    recipe = recipe_from(given)
    output = Path(given["output"]) if given["output"] else default_output(Path(source), recipe)
    if given["output"] and (os.path.isdir(output) or given["output"].endswith("/")):
        output = output / default_output(Path(source), recipe).name
    from streamquant.transcode import Options, convert, dry_run

    options = Options(
        memory_budget=given["memory_budget"],
        vram_budget=given["vram_budget"],
        device=given["device"],
        io=given["io"],
        threads=given["threads"],
        resume=given["resume"],
        force=given["force"],
        shard_size=given["shard_size"],
    )
    if given["dry_run"]:
        from streamquant.views.convert import plan_as_json, plan_view

        plan = *dry_run(source, output, recipe, options), output
        if screen.as_json:
            screen.line("plan", **plan_as_json(*plan))
        elif not screen.quiet:
            screen.show(plan_view(*plan))
        return
    if given["report"]:
        from streamquant.pages import prepare_page

        prepare_page(given["report"])  # a missing library or a folder that cannot be written is told now, not after hours
    from streamquant.progress import observing
    from streamquant.views.common import report_line
    from streamquant.views.convert import report_view

    with observing(screen) as observer:
        report = convert(source, output, recipe, options=options, observer=observer, stop=stop_on_signals())
    if screen.as_json:
        screen.line("done", **report.as_json())
    elif not screen.quiet:
        screen.show(report_view(report))
    if given["report"]:
        from streamquant.pages import write_conversion_page

        page = write_conversion_page(given["report"], source, report)
        if not (screen.as_json or screen.quiet):
            screen.show([report_line(page)])


def _source(given: dict[str, Any]) -> str:
    if given["source"] and given["input_"]:
        raise UsageError("The source is given twice: name it first or with --input, not both.")
    source = given["source"] or given["input_"]
    if not source:
        raise UsageError("Which checkpoint? Give a .safetensors file, a shard index or a folder.")
    return source


def recipe_from(given: dict[str, Any]) -> Recipe:
    """The Recipe that a set of flags means. Raises UsageError where they contradict."""
    base_kind = given["base"] or "fp8"
    rounding = _rounding(given["simple"], given["rtn"])
    if base_kind == "bnb":
        if given["scaling_mode"] or given["block_size"]:
            raise UsageError("--bnb-4bit takes --bnb-blocksize; --scaling-mode and --block-size are for --fp8 and --int8.")
        base = FormatChoice(
            given["bnb_quant_type"], None, given["bnb_blocksize"], given["bnb_double_quant"], rounding, given["heur"]
        )
    else:
        base = FormatChoice(
            base_kind,
            given["scaling_mode"],
            given["block_size"],
            rounding=rounding,
            heur=given["heur"],
            convrot=given["convrot"] if _has_int8_rows(base_kind, given["scaling_mode"]) else None,
            convrot_group_size=given["convrot_group_size"],
        )
    custom = None
    if given["custom_type"]:
        custom = FormatChoice(
            given["custom_type"],
            given["custom_scaling_mode"],
            given["custom_block_size"],
            given["bnb_double_quant"] and given["custom_type"] in ("nf4", "fp4"),
            _rounding(given["custom_simple"], given["rtn"]),
            given["custom_heur"],
            convrot=given["convrot"] if _has_int8_rows(given["custom_type"], given["custom_scaling_mode"]) else None,
            convrot_group_size=given["convrot_group_size"],
        )
    if given["convrot"] and not any(choice and choice.convrot for choice in (base, custom)):
        raise UsageError("--convrot is for INT8 with row scales: give --int8, or --custom-type int8.")
    names = (*given["preset_names"], *given["preset_flags"])
    return Recipe(
        base=base,
        custom_layers=given["custom_layers"],
        custom=custom,
        exclude_layers=given["exclude_layers"],
        layer_config=read_layer_config(given["layer_config"], rounding) if given["layer_config"] else (),
        preset=tuple(dict.fromkeys(names)) or ("auto",),
        comfy_quant=given["comfy_quant"],
        cast=CASTS.get(given["cast"]),
        allow_nonfinite=given["allow_nonfinite"],
        seed=given["seed"],
        calibration=given["calibration"],
        calibration_mode=given["calibration_mode"],
        calibration_rank=given["calibration_rank"],
        sweeps=given["sweeps"],
        structure=given["structure"],
        objective=given["objective"],
    )


def _rounding(simple: bool, rtn: bool) -> str:
    """--simple and --rtn as a rounding; the plainer one wins, for whoever asks for both wants nothing learned."""
    return "rtn" if rtn else "simple" if simple else "learned"


def _has_int8_rows(kind: str, mode: str | None) -> bool:
    return kind == "int8" and mode in (None, "row")


def default_output(source: Path, recipe: Recipe) -> Path:
    """Beside the source as it was named (not where a link leads): `model-nf4-fp8.safetensors`."""
    source = Path(os.path.abspath(source))
    stem = source.name.removesuffix(".json").removesuffix(".index").removesuffix(".safetensors")
    choices = [recipe.base, *([recipe.custom] if recipe.custom else [])]
    words = dict.fromkeys(word for choice in choices for word in (choice.kind.replace("_", "-"), choice.mode_word) if word)
    return source.parent / f"{stem}-{'-'.join(words)}.safetensors"
