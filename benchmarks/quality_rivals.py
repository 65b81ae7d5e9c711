"""What other tools' rounding costs in the same studies: the same layers, each tool in its own formats, bytes counted alike.

Ratios are to what the product makes of the same model, asked for nothing, in the format of about as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file

from benchmarks import quality_converter, quality_results
from benchmarks.peers import CONVERT_TO_QUANT, PeerError
from benchmarks.quality import Cell, Study, line
from benchmarks.quality_layers import Measured
from benchmarks.quality_methods import Quantized
from benchmarks.quality_results import AS_IT_COMES
from benchmarks.race import shout
from benchmarks.results import Result
from benchmarks.rivals import LIBRARIES, Library, working

CONVERTER = "convert-to-quant"
NAMES = (*LIBRARIES, CONVERTER)

# The product in one of its formats, as it comes: what it costs, and what it wrote.
Reference = Callable[[str], tuple[Measured, Quantized]]


def measure(
    study: Study, names: Sequence[str], learned: Sequence[str], reference: Reference, folder: Path, workdir: Path, time: str,
    console: Console,
) -> Iterator[list[Result]]:  # fmt: skip
    """Yield the rows of each tool in each of its formats; a tool or format that fails has a row that says why.

    learned: formats in which the converter's learned rounding takes part, too.
    """
    for name in names:
        if name == CONVERTER:
            yield from _converter("--simple", tuple(quality_converter.FLAGS), study, reference, folder, workdir, time, console)
        else:
            yield from _library(name, study, reference, folder, workdir, time, console)
    yield from _converter("learned", learned, study, reference, folder, workdir, time, console)


def _library(
    name: str, study: Study, reference: Reference, folder: Path, workdir: Path, time: str, console: Console
) -> Iterator[list[Result]]:
    library: Library = LIBRARIES[name]
    layers = reference("nf4")[1].layers
    source = load_file(study.source)
    try:
        with working(library, {key: source[key] for key in layers}, workdir, threads=1) as worker:
            for format, ours in library.formats.items():
                try:
                    seconds, size = worker.quantize(format)
                    weights = {key: weight.float() for key, weight in source.items()} | worker.decoded(format)
                except PeerError as error:
                    yield [_missing(study, time, format, library.name, error, console)]
                    continue
                quantized = Quantized(weights, layers, size, seconds)
                yield _rows(study, Cell(time, study.name, format, library.name, quantized), ours, reference, console)
    except PeerError as error:
        yield [_missing(study, time, "all", library.name, error, console)]


def _converter(
    method: str, formats: Sequence[str], study: Study, reference: Reference, folder: Path, workdir: Path, time: str,
    console: Console,
) -> Iterator[list[Result]]:  # fmt: skip
    destination, contender = folder / "converter.safetensors", f"{CONVERT_TO_QUANT.name} {method}"
    for format in formats:
        layers = reference(format)[1].layers
        try:
            quantized = quality_converter.quantize(study.source, destination, format, method, layers, workdir)
        except PeerError as error:
            yield [_missing(study, time, format, contender, error, console)]
            continue
        finally:
            destination.unlink(missing_ok=True)
        cell = Cell(time, study.name, format, contender, quantized, by_layer=method == "learned")
        yield _rows(study, cell, format, reference, console)


def _rows(study: Study, cell: Cell, ours: str, reference: Reference, console: Console) -> list[Result]:
    other = reference(ours)[0] if ours else None
    rows = list(cell.scores(study.measure(cell.quantized.weights), other, _reference_name(ours) if ours else ""))
    console.print(line(rows), highlight=False, soft_wrap=True)
    return rows


def _reference_name(format: str) -> str:
    return f"{quality_results.contender(AS_IT_COMES)}, {format}"


def _missing(study: Study, time: str, format: str, contender: str, error: PeerError, console: Console) -> Result:
    shout(console, f"{contender} DOES NOT TAKE PART in {format} on {study.name}: {error}")
    return quality_results.score(time, study.name, format, contender, "layer output error", None, note=str(error))
