"""`python -m benchmarks report`: every picture and every table of the documents, from the recorded results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from rich.console import Console

from benchmarks import results
from benchmarks.machine import REPOSITORY
from benchmarks.report import losses, marks, rounding_tables, tables
from benchmarks.results import Result

DOCUMENTS = ("README.md", "ARCHITECTURE.md", "docs/rounding.md", "docs/benchmarks.md")
PICTURES, ROUNDING = Path("docs/benchmarks"), Path("docs/rounding")

Read = Callable[[str], Sequence[Result]]


def parts(read: Read) -> dict[str, str]:
    """The written parts of the documents, by name."""
    quality = read("quality")
    return {
        "conversions": tables.conversion_table(read("convert")),
        "sizes": tables.size_table(read("convert")),
        "kernels": tables.kernel_table(read("kernels")),
        "rounding": rounding_tables.tables(quality),
        "quality": tables.quality_table(quality),
        "recovery": _pictured("After a kill", "recovery", tables.recovery_table(read("faults")), read("faults")),
        "tensors": _pictured("Time against the number of tensors", "tensors", "", read("tensors")),
        "quality-losses": losses.quality_loss_table(quality),
        "speed-losses": losses.speed_loss_table(read),
    }


def _pictured(title: str, name: str, text: str, rows: Sequence[Result]) -> str:
    """A part with its picture, which is there only when there are results."""
    return f"![{title}](benchmarks/{name}.svg)\n\n{text}" if rows else "Not measured yet."


def stale(read: Read | None = None, repository: Path = REPOSITORY) -> dict[Path, str]:
    """Documents that do not say what the results say, with what they should say."""
    written = parts(read or cache(results.read))
    found = {}
    for name in DOCUMENTS:
        path = repository / name
        text = path.read_text(encoding="utf-8")
        if (wanted := marks.filled(text, written)) != text:
            found[path] = wanted
    return found


def pictures(read: Read, folder: Path) -> list[Path]:
    """Draw everything that there are results for, below `folder`; the sheet of samples is not among it."""
    from matplotlib import pyplot

    from benchmarks.report import conversion_pictures, kernel_pictures, quality_pictures, rounding_pictures, style

    convert, quality = read("convert"), read("quality")
    place, rounding = folder / PICTURES, folder / ROUNDING
    with pyplot.rc_context(style.STYLE):
        drawn = [
            conversion_pictures.speed(convert, tables.SIZE, place / "speed.svg"),
            conversion_pictures.memory([*convert, *read("memory")], place / "memory.svg"),
            conversion_pictures.recovery(read("faults"), place / "recovery.svg"),
            conversion_pictures.tensor_counts(read("tensors"), place / "tensors.svg"),
            kernel_pictures.kernels(read("kernels"), read("decode"), place / "kernels.svg"),
            quality_pictures.at_equal_bytes(quality, place / "quality.svg"),
            rounding_pictures.velocity_by_time(quality, rounding / "velocity-by-time.svg"),
            rounding_pictures.layer_ratios(quality, rounding / "layer-ratios.svg"),
        ]
    return [path for path in drawn if path is not None]


def run(workdir: Path, console: Console, samples: bool = True) -> None:
    """Draw the pictures and write the tables. samples: also the sheet, for which the small Flux.2 is converted anew."""
    read = cache(results.read)
    drawn = pictures(read, REPOSITORY)
    if samples:
        from matplotlib import pyplot

        from benchmarks.report import style
        from benchmarks.report.samples import sheet

        with pyplot.rc_context(style.STYLE):
            drawn.append(sheet(workdir, REPOSITORY / ROUNDING / "samples.png"))
    for path in drawn:
        console.print(f"drew {path.relative_to(REPOSITORY)}", soft_wrap=True)
    for path, text in stale(read).items():
        path.write_text(text, encoding="utf-8")
        console.print(f"wrote {path.relative_to(REPOSITORY)}", soft_wrap=True)
