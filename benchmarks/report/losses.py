"""Where others are better: computed from the results, so that nobody has to be honest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks.quality_results import AS_IT_COMES
from benchmarks.report.equal_bytes import CALIBRATED, PANELS, Point, points
from benchmarks.report.selection import CONVERSIONS, KERNELS, OURS, conversions, operations
from benchmarks.report.tables import SIZE, markdown
from benchmarks.results import Result

# Nearer than this is a draw, in bytes and in error; times of one machine differ by more between runs.
DRAW, TIMES_DRAW = 1.01, 1.05


def quality_losses(found: Sequence[Point]) -> Iterator[tuple[Point, Point | None, Point | None]]:
    """Points of others with less error than ours, as it comes, at no more bytes; with our best two ways at no more bytes.

    Ours is None where we have nothing as small.
    """
    for rival in sorted((point for point in found if not point.method), key=lambda point: (point.bits, point.error)):

        def best(method: str, rival: Point = rival) -> Point | None:
            mine = [point for point in found if point.method == method and point.bits <= rival.bits * DRAW]
            return min(mine, key=lambda point: point.error, default=None)

        mine = best(AS_IT_COMES)
        if mine is None or rival.error * DRAW < mine.error:
            yield rival, mine, best(CALIBRATED)


def quality_loss_table(rows: Sequence[Result]) -> str:
    """In markdown, all models."""
    lines = [
        [model, rival.contender, rival.format, f"{rival.bits:.2f}", f"{rival.error:.3g}", _cell(mine), _cell(calibrated)]
        for model, (metric, _) in PANELS.items()
        for rival, mine, calibrated in quality_losses(points(rows, model, metric))
    ]
    if not lines:
        return "Nowhere in what was measured.\n"
    heads = ["model", "who is better", "format", "bits a weight", "error", "ours, as it comes", "ours, calibrated"]
    return markdown(heads, lines)


def _cell(point: Point | None) -> str:
    return "nothing as small" if point is None else f"{point.error:.3g} ({point.format}, {point.bits:.2f} bits)"


def speed_loss_table(read: Callable[[str], Sequence[Result]]) -> str:
    """Who is faster than we are, in whole conversions, encoding and decoding."""
    lines = []
    for case, heat in conversions(read("convert"), SIZE).items():
        lines += _slower(
            "a whole conversion to " + CONVERSIONS[case].replace("(the command above, with `--rtn`)", "`--rtn`"), heat
        )
    for benchmark, verb in (("kernels", "encoding"), ("decode", "decoding")):
        for name, heat in operations(read(benchmark)).items():
            lines += _slower(f"{verb} {KERNELS[name]}", heat)
    if not lines:
        return "Nowhere in what was measured.\n"
    return markdown(["at", "who is faster", "seconds", "ours", "times"], lines)


def _slower(what: str, heat: dict[str, Result]) -> Iterator[list[str]]:
    mine = heat.get(OURS)
    if mine is None or not mine.p50:
        return
    for row in heat.values():
        if row.contender != OURS and row.p50 and row.p50 * TIMES_DRAW < mine.p50:
            yield [what, row.contender, f"{row.p50:.3g}", f"{mine.p50:.3g}", f"{mine.p50 / row.p50:.2f}"]
