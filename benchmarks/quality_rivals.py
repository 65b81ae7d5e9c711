"""What other tools' rounding costs in the same studies: the same layers, each tool in its own formats, bytes counted alike.

Ratios are to what the product makes of the same model, asked for nothing, in the format of about as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file

from benchmarks import quality_converter, quality_results, results
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
    study: Study, names: Sequence[str], reference: Reference, folder: Path, workdir: Path, time: str, console: Console
) -> Iterator[list[Result]]:
    """Yield the rows of each tool in each of its formats; a tool or format that fails has a row that says why."""
    for name in names:
        cells = _converter if name == CONVERTER else _library
        yield from cells(name, study, reference, folder, workdir, time, console)


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
    name: str, study: Study, reference: Reference, folder: Path, workdir: Path, time: str, console: Console
) -> Iterator[list[Result]]:
    destination = folder / "converter.safetensors"
    for format in quality_converter.FLAGS:
        layers = reference(format)[1].layers
        contender = f"{CONVERT_TO_QUANT.name} --simple"
        try:
            quantized = quality_converter.quantize(study.source, destination, format, "--simple", layers, workdir)
            yield _rows(study, Cell(time, study.name, format, contender, quantized), format, reference, console)
        except PeerError as error:
            yield [_missing(study, time, format, contender, error, console)]
        chosen = [key for key in quality_converter.LEARNED_LAYERS if key in layers]
        if chosen and format in quality_converter.LEARNED_FORMATS:
            yield list(_learned(study, format, chosen, len(layers), reference, destination, workdir, time, console))
    destination.unlink(missing_ok=True)


def _learned(
    study: Study, format: str, chosen: Sequence[str], layers: int, reference: Reference, destination: Path, workdir: Path,
    time: str, console: Console,
) -> Iterator[Result]:  # fmt: skip
    """A row per chosen layer: what the converter's learned rounding makes of it alone."""
    contender, limit = f"{CONVERT_TO_QUANT.name} learned", quality_converter.LEARNED_SECONDS
    note = f"{len(chosen)} of {layers} layers, at most {limit} s each"
    ours = reference(format)[0]
    for key in chosen:
        layer = key.removesuffix(".weight")
        try:
            quantized = quality_converter.quantize(study.source, destination, format, "learned", [key], workdir, limit)
        except PeerError as error:
            yield _missing(study, time, format, contender, error, console, detail=layer)
            continue
        value = study.measure(quantized.weights).layers[layer]
        sizes = {"size_bytes": quantized.size_bytes, "output_bytes": quantized.bytes, "detail": layer, "note": note}
        ratio, to = value / ours.layers[layer], _reference_name(format)
        yield quality_results.score(
            time, study.name, format, contender, "layer output error", value, ratio=ratio, ratio_to=to, **sizes
        )
        yield quality_results.score(time, study.name, format, contender, results.SECONDS, quantized.seconds, **sizes)
        console.print(f"{format} {contender}, {layer}, {quantized.seconds:.0f} s: {value:.4g} (x {ratio:.3f})", highlight=False)


def _rows(study: Study, cell: Cell, ours: str, reference: Reference, console: Console) -> list[Result]:
    other = reference(ours)[0] if ours else None
    rows = list(cell.scores(study.measure(cell.quantized.weights), other, _reference_name(ours) if ours else ""))
    console.print(line(rows), highlight=False, soft_wrap=True)
    return rows


def _reference_name(format: str) -> str:
    return f"{quality_results.contender(AS_IT_COMES)}, {format}"


def _missing(
    study: Study, time: str, format: str, contender: str, error: PeerError, console: Console, detail: str = ""
) -> Result:
    shout(console, f"{contender} DOES NOT TAKE PART in {format} on {study.name}: {error}")
    return quality_results.score(
        time, study.name, format, contender, "layer output error", None, detail=detail, note=str(error)
    )
