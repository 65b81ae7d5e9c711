"""The tables of README.md, ARCHITECTURE.md and docs/benchmarks.md, in markdown, from the recorded results alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.cases import CASES
from benchmarks.quality_results import AS_IT_COMES, latest
from benchmarks.report.equal_bytes import CALIBRATED, PANELS, points
from benchmarks.report.selection import CONVERSIONS, KERNELS, OURS, PEER, conversions, machine, operations, recoveries, sizes
from benchmarks.results import Result

SIZE = "4GB"


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def memory(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def conversion_table(rows: Sequence[Result], source: str = SIZE) -> str:
    """Whole conversions against cp and the peer."""
    found = conversions(rows, source)
    if not found:
        return "Not measured yet.\n"
    lines = []
    for case, heat in found.items():
        copied, mine, peer = heat["cp"], heat[OURS], heat.get(PEER)
        if peer is None:
            theirs, factor = "does not write it" if "--bnb-4bit" in CASES[case].ours else "", ""
        elif peer.p50 is None:
            theirs, factor = "does not write it" if peer.note.startswith("has no format") else "failed", ""
        else:
            theirs, factor = f"{peer.p50:.0f} s, {memory(peer.peak_anonymous_bytes)}", f"{peer.p50 / mine.p50:.1f}"
        lines.append(
            [CONVERSIONS[case], f"{mine.p50:.1f}", f"{copied.p50:.1f}", f"{mine.p50 / copied.p50:.2f}", theirs, factor,
             memory(mine.peak_anonymous_bytes)]
        )  # fmt: skip
    heads = [
        f"{source[:-2]} GB, Flux.2-shaped, to (with `--rtn` unless it says otherwise)", "seconds", "`cp` + fsync", "ratio",
        f"{PEER} `--simple`", "times faster", "peak memory",
    ]  # fmt: skip
    shown = [row for heat in found.values() for row in heat.values()]
    return f"{markdown(heads, lines)}\nMedians; each line is one session. {machine(shown)}.\n"


def size_table(rows: Sequence[Result]) -> str:
    """Conversions of sources of every size, to the formats that were measured at several."""
    found = sizes(rows)
    if not found:
        return "Not measured yet.\n"
    lines = []
    for (case, source), heat in found.items():
        mine, copied, peer = heat[OURS], heat.get("cp"), heat.get(PEER)
        has_copy = copied is not None and copied.p50 is not None
        lines.append(
            [CONVERSIONS[case], source.removesuffix("-sparse"), f"{mine.p50:.1f} s", f"{mine.bytes_per_second / 1e9:.2f} GB",
             f"{mine.p50 / copied.p50:.2f}" if has_copy else "sparse: no copy",
             f"{peer.p50:.0f} s, {memory(peer.peak_anonymous_bytes)}" if peer is not None and peer.p50 else "",
             memory(mine.peak_anonymous_bytes)]
        )  # fmt: skip
    heads = ["to", "source", "whole command", "of source a second", "against `cp` + fsync", f"{PEER} `--simple`", "peak memory"]
    return f"{markdown(heads, lines)}\nMedians. {machine([row for heat in found.values() for row in heat.values()])}.\n"


def kernel_table(rows: Sequence[Result]) -> str:
    """Each quantization of one weight in memory."""
    found = operations(rows)
    if not found:
        return "Not measured yet.\n"
    lines = []
    for name, heat in found.items():
        if name == "copy":
            (copy,) = heat.values()
            lines.append([KERNELS[name], "", f"{copy.bytes_per_second / 1e9:.1f} GB, and as much written", "", ""])
            continue
        mine = heat.get(OURS)
        if mine is None or mine.p50 is None:
            continue
        speed = mine.bytes_per_second
        plain = heat.get("plain torch")
        others = [row for row in heat.values() if row.contender not in (OURS, "plain torch") and row.p50]
        best = min(others, key=lambda row: row.p50, default=None)
        lines.append(
            [KERNELS[name], f"{speed / 2e9:.2g} billion", f"{speed / 1e9:.2g} GB" if speed < 1e10 else f"{speed / 1e9:.1f} GB",
             _times(plain, mine), f"{_times(best, mine)} ({best.contender})" if best else ""]
        )  # fmt: skip
    heads = ["", "weights a second", "BF16 read a second", "against plain torch", "against the fastest other library"]
    shown = [row for heat in found.values() for row in heat.values()]
    return f"{markdown(heads, lines)}\nMedians. {machine(shown)}.\n"


def _times(other: Result | None, mine: Result) -> str:
    return "" if other is None or not other.p50 else f"{other.p50 / mine.p50:.2g} x"


def quality_table(rows: Sequence[Result]) -> str:
    """Every tool and format at the outputs of models and layers: bits a weight and error, fewest bits first."""
    parts = []
    for model, (metric, words) in PANELS.items():
        shown = sorted(points(rows, model, metric), key=lambda point: (round(point.bits, 1), point.error))
        if not shown:
            continue
        ways = {AS_IT_COMES: f"**{OURS}**, as it comes", CALIBRATED: f"**{OURS}**, calibrated"}
        lines = [
            [f"{point.bits:.2f}", ways.get(point.method, point.contender), point.format, f"{point.error:.3g}"]
            for point in shown
        ]
        parts.append(f"{model}, {words}:\n\n" + markdown(["bits a weight", "tool", "format", "error"], lines))
    note = machine([row for model in PANELS for row in latest(rows, model)]) if parts else ""
    return "\n".join(parts) + f"\n{note}.\n" if parts else "Not measured yet.\n"


def recovery_table(rows: Sequence[Result]) -> str:
    """What a kill costs, newest of each case and moment."""
    found = recoveries(rows)
    if not found:
        return "Not measured yet.\n"
    lines = []
    for (case, name, moment), by_metric in found.items():
        value = {metric: row.p50 for metric, row in by_metric.items()}
        again, first = value["bytes written again"], value.get("seconds to first write")
        mine = name == OURS
        lines.append(
            [name, CONVERSIONS.get(case, case), moment, f"{value['uninterrupted']:.1f} s", f"{value['seconds']:.1f} s",
             f"{value['seconds lost']:.1f} s", f"{max(again, 0) / 1e6:.1f} MB" if mine else "everything",
             f"{first:.1f} s" if mine and first is not None else ""]
        )  # fmt: skip
    heads = ["", "to", "", "uninterrupted", "going on", "lost in all", "written again", "until it writes again"]
    shown = [row for by_metric in found.values() for row in by_metric.values()]
    source = ", ".join(sorted({row.source for row in shown}))
    return f"{markdown(heads, lines)}\nMedians; source of {source}, cold. {machine(shown)}.\n"
