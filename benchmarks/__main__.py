"""The command line of the harness: `python -m benchmarks COMMAND`. Each command imports what it needs when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

if TYPE_CHECKING:
    from benchmarks.cases import Case

DIFFUSERS_PREFIX = "model.diffusion_model."
VERIFY_CASES = "fp8-tensor,fp8-row,fp8-block,int8-row,int8-default,nf4,nf4-double,headline"
CONVERT_CASES = "fp8-tensor,fp8-row,fp8-block,int8-tensor,int8-row,int8-block,nf4,headline,int8-fp8"


def _check_sizes(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Refuse a bad size now, not after the first hour of measuring."""
    del context, parameter
    from benchmarks.units import parse_size

    try:
        for part in value.split(","):
            parse_size(part)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


def _check_sources(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """The same, for names of sources."""
    del context, parameter
    from benchmarks.sources import check

    try:
        for name in value.split(","):
            check(name)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


_workdir = click.option(
    "--workdir",
    type=click.Path(path_type=Path),
    default=Path("build/benchmarks"),
    show_default=True,
    help="Where sources, outputs and the peers' environments go.",
)
_others = click.option(
    "--others/--no-others", default=True, show_default=True, help="Also other libraries, in their own environments."
)
_cold = click.option(
    "--cold",
    type=click.Choice(["system", "file", "none"]),
    default="file",
    show_default=True,
    help="What to drop from the page cache before each run: all of it, the source, or nothing.",
)
_threads = click.option("--threads", type=int, default=None, help="Threads to compute with.")


@click.group()
def main() -> None:
    """Measure streamquant. Results are appended to benchmarks/results/<benchmark>.csv."""


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--size", help="A Flux.2 scaled down in width and depth to this size, such as 4GB.")
@click.option("--shape", type=click.Choice(["flux2-dev"]), help="The full shape of a released model.")
@click.option("--one-tensor", help="A single layer of this size.")
@click.option("--sparse", is_flag=True, help="Header and a hole: all zeros, no disk used.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--prefix",
    is_flag=False,
    flag_value=DIFFUSERS_PREFIX,
    default="",
    help=f"Put this before every name; {DIFFUSERS_PREFIX} if given without a value.",
)
@click.option("--dtype", type=click.Choice(["bf16", "f16", "f32"]), default="bf16", show_default=True)
def generate(
    output: Path,
    size: str | None,
    shape: str | None,
    one_tensor: str | None,
    sparse: bool,
    seed: int,
    prefix: str,
    dtype: str,
) -> None:
    """Write a synthetic Flux.2 checkpoint to OUTPUT."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from benchmarks import shapes
    from benchmarks.checkpoints import write_checkpoint
    from benchmarks.units import parse_size
    from streamquant.checkpoint.header import layout

    if sum(choice is not None for choice in (size, shape, one_tensor)) != 1:
        raise click.UsageError("Give exactly one of --size, --shape and --one-tensor.")
    tag = dtype.upper()
    try:
        if one_tensor is not None:
            tensors = shapes.one_tensor(parse_size(one_tensor), tag, prefix)
        else:
            model = shapes.FluxShape() if size is None else shapes.flux_of_size(parse_size(size), tag)
            tensors = model.tensors(tag, prefix)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    console = Console()
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("write", total=layout(tensors)[-1].end)
        written = write_checkpoint(output, tensors, seed, sparse, lambda count: progress.advance(task, count))
    console.print(f"{output}: {len(tensors)} tensors, {written} bytes", soft_wrap=True)


@main.command()
@click.option(
    "--size",
    default="4GB",
    show_default=True,
    callback=_check_sources,
    help="Sources by commas: 0.5GB, 4GB, 16GB-sparse, flux2-dev-sparse. Sparse ones take no disk, and no cp runs.",
)
@click.option("--cases", default=CONVERT_CASES, show_default=True)
@click.option("--runs", type=int, default=3, show_default=True)
@click.option("--peer/--no-peer", default=True, show_default=True, help="Also run convert-to-quant, once a case.")
@click.option("--peer-largest", default="4GB", show_default=True, callback=_check_sizes, help="It runs on no larger source.")
@click.option("--memory-budget", default="1GiB", show_default=True, callback=_check_sizes)
@_cold
@click.option("--keep", is_flag=True, help="Keep the last output of each contender in each case.")
@_threads
@_workdir
def convert(
    size: str,
    cases: str,
    runs: int,
    peer: bool,
    peer_largest: str,
    memory_budget: str,
    cold: str,
    keep: bool,
    threads: int | None,
    workdir: Path,
) -> None:
    """Time whole conversions against cp and the peer."""
    from benchmarks.cache import CHILLS
    from benchmarks.convert import Settings, run

    settings = Settings(workdir, size.split(","), runs, memory_budget, threads, peer, keep, peer_largest)
    run(_cases(cases), settings, CHILLS[cold], Console())


@main.command()
@click.option(
    "--files",
    default="0.5GB,1GB,2GB,4GB,16GB-sparse,flux2-dev-sparse,one-tensor-4GB",
    show_default=True,
    callback=_check_sources,
)
@click.option("--cases", default="fp8-tensor,fp8-block,int8-row,nf4,nf4-double", show_default=True)
@click.option("--budgets", default="256MiB,1GiB", show_default=True, callback=_check_sizes)
@click.option(
    "--peer-files", default="0.5GB,1GB,2GB,4GB", show_default=True, help="Which of them convert-to-quant converts too."
)
@_workdir
def memory(files: str, cases: str, budgets: str, peer_files: str, workdir: Path) -> None:
    """Measure the peak memory of conversions of small, large and one-layer files."""
    from benchmarks.memory import run

    run(_cases(cases), files.split(","), budgets.split(","), workdir, Console(), peer_files=_listed(peer_files))


@main.command()
@click.option("--size", default="4GB", show_default=True, callback=_check_sizes, help="Of the source.")
@click.option("--cases", default=VERIFY_CASES, show_default=True)
@click.option("--runs", type=int, default=3, show_default=True)
@click.option("--sample", help="Also time a quick look at this share, such as 5%.")
@_workdir
def verify(size: str, cases: str, runs: int, sample: str | None, workdir: Path) -> None:
    """Time `streamquant verify` against reading and hashing the same bytes."""
    from benchmarks.verify import run

    run(_cases(cases), size, runs, sample, workdir, Console())


@main.command()
@click.option("--rows", type=int, default=6144, show_default=True)
@click.option("--columns", type=int, default=6144, show_default=True)
@click.option("--runs", type=int, default=5, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@_others
@_threads
@_workdir
def kernels(rows: int, columns: int, runs: int, device: str, others: bool, threads: int | None, workdir: Path) -> None:
    """Time every quantization of one weight in memory."""
    if device == "cuda":
        from benchmarks import gpu_kernels

        gpu_kernels.run(Console(), rows, columns, runs)
        return
    from benchmarks.kernels import run

    run((rows, columns), runs, threads or os.cpu_count() or 1, Console(), workdir=workdir if others else None)


@main.command()
@click.option("--rows", type=int, default=6144, show_default=True)
@click.option("--columns", type=int, default=6144, show_default=True)
@click.option("--runs", type=int, default=5, show_default=True)
@_others
@_threads
@_workdir
def decode(rows: int, columns: int, runs: int, others: bool, threads: int | None, workdir: Path) -> None:
    """Time every decoding as the ComfyUI pack does it, next to other libraries."""
    from benchmarks.decode import run

    run(Console(), (rows, columns), runs, threads, workdir=workdir if others else None)


@main.command()
@click.option("--rows", type=int, default=3072, show_default=True)
@click.option("--columns", type=int, default=3072, show_default=True)
@click.option("--runs", type=int, default=3, show_default=True)
@_workdir
def learned(rows: int, columns: int, runs: int, workdir: Path) -> None:
    """Time learned rounding of one INT8 layer against the peer's (which takes minutes)."""
    from benchmarks.learned import run

    run(rows, columns, runs, workdir, Console())


@main.command()
@click.option("--size", default="2GB", show_default=True, callback=_check_sizes)
@click.option("--cases", default="fp8-tensor,int8-default,headline", show_default=True)
@click.option("--moments", default="10,50,90", show_default=True, help="When to kill: percents of what there is to write.")
@click.option("--runs", type=int, default=3, show_default=True)
@click.option("--peer/--no-peer", default=True, show_default=True, help="Also convert-to-quant, once.")
@_cold
@_workdir
def faults(size: str, cases: str, moments: str, runs: int, peer: bool, cold: str, workdir: Path) -> None:
    """Kill conversions, go on with them, and measure what that costs."""
    from benchmarks.cache import CHILLS
    from benchmarks.faults import run

    try:
        shares = [float(moment) / 100 for moment in moments.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--moments: {error}") from error
    if not all(0 < share < 1 for share in shares):
        raise click.UsageError("--moments: percents between 0 and 100")
    run(_cases(cases), size, shares, runs, workdir, CHILLS[cold], Console(), peer)


@main.command()
@click.option("--counts", default="12500,25000,50000,100000,200000", show_default=True, help="Numbers of tensors, by commas.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@_workdir
def tensors(counts: str, runs: int, workdir: Path) -> None:
    """Time every step on checkpoints of many tiny tensors: it should grow with their number and no faster."""
    from benchmarks.tensors import run

    try:
        numbers = [int(count) for count in counts.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--counts takes numbers, by commas: {error}.") from error
    run(numbers, runs, workdir, Console())


@main.command("train-tiny")
@click.option("--output", type=click.Path(path_type=Path), help="The weights; default: those of the repository.")
@click.option("--steps", type=click.IntRange(1), default=3600, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True)
@click.option("--hidden", type=int, default=128, show_default=True, help="Width of the model, a multiple of 128.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="The bits of the result depend on it.")
def train_tiny(output: Path | None, steps: int, batch: int, hidden: int, seed: int, threads: int) -> None:
    """Train a small Flux.2 on procedural pictures, about 20 minutes on one core."""
    from benchmarks.train_tiny import WEIGHTS, Training, run

    try:
        run(Training(steps, batch, hidden, seed, threads), output or WEIGHTS, Console())
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@main.command()
@click.option("--models", default="minilm,flux,synthetic", show_default=True)
@click.option("--formats", help="By commas; default: all.")
@click.option("--methods", help='By commas; default: all; "": none. With any, nearest is measured too.')
@click.option("--scored-on", type=click.Choice(["develop", "final"]), default="final", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path), help="Another small Flux.2 than the repository's.")
@click.option("--against", default="none", show_default=True, help="Also other tools: their names by commas, all, or none.")
@click.option("--learned", default="", help="Formats, by commas, for convert-to-quant's learned rounding; slow.")
@_workdir
def quality(
    models: str,
    formats: str | None,
    methods: str | None,
    scored_on: str,
    weights: Path | None,
    against: str,
    learned: str,
    workdir: Path,
) -> None:
    """Measure what each way of rounding costs at the outputs of real models.

    Results of the final set are recorded; those of the set to develop on are only shown.
    """
    from benchmarks import quality as harness
    from benchmarks import quality_methods, quality_rivals, results
    from benchmarks.train_tiny import WEIGHTS

    try:
        settings = harness.Settings(
            models=_listed(models),
            formats=list(quality_methods.FORMATS) if formats is None else _listed(formats),
            methods=list(quality_methods.METHODS) if methods is None else _listed(methods),
            scored_on=scored_on,
            workdir=workdir,
            weights=weights or WEIGHTS,
            against=quality_rivals.NAMES if against == "all" else [] if against == "none" else _listed(against),
            learned=_listed(learned),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    harness.run(settings, Console(), results.append if scored_on == "final" else lambda rows: None)


@main.command()
@click.option("--samples/--no-samples", default=True, show_default=True, help="Also the sheet of samples (a minute or more).")
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if a document does not say what the results say.")
@_workdir
def report(samples: bool, check: bool, workdir: Path) -> None:
    """Draw every picture and write every table of the documents from the recorded results."""
    from benchmarks import report as reports

    if not check:
        reports.run(workdir, Console(), samples)
    elif found := reports.stale():
        raise click.ClickException(f"{', '.join(map(str, found))}: not as the results are. Run: python -m benchmarks report")


@main.command()
@click.argument("benchmark")
@click.option("--last", type=click.IntRange(1), default=40, show_default=True, help="Show only this many rows.")
def show(benchmark: str, last: int) -> None:
    """Print recorded results: BENCHMARK is the name of a file in benchmarks/results."""
    from benchmarks import results

    there = sorted(path.stem for path in results.FOLDER.glob("*.csv"))
    if benchmark not in there:
        raise click.BadParameter(f"no results of {benchmark!r}. There are: {', '.join(there)}", param_hint="BENCHMARK")
    if benchmark == "compiled":
        from benchmarks.compiled import read, table

        Console().print(table(read()[-last:]))
        return
    if benchmark == "endurance":
        from benchmarks import endurance

        Console().print(endurance.table(endurance.read()[-last:]))
        return
    Console().print(results.table(results.read(benchmark)[-last:], benchmark))


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _cases(names: str) -> list[Case]:
    from benchmarks.cases import choose

    try:
        return choose(names)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
