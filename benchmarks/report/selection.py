"""Which rows are shown: of each case the newest session that is complete, and in what words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from benchmarks import results
from benchmarks.cases import CASES
from benchmarks.peers import CONVERT_TO_QUANT
from benchmarks.results import OURS, Result

PEER = CONVERT_TO_QUANT.name
# Conversions, in the order of the tables.
CONVERSIONS = {
    "fp8-tensor": "FP8, tensor scale",
    "fp8-row": "FP8, row scales",
    "fp8-block": "FP8, 128 x 128 blocks",
    "int8-tensor": "INT8, tensor scale",
    "int8-row": "INT8, row scales",
    "int8-block": "INT8, 128 x 128 blocks",
    "nf4": "NF4",
    "nf4-double": "NF4, double quantization",
    "headline-rtn": "NF4 + FP8 (the command above, with `--rtn`)",
    "int8-fp8": "INT8 rows + FP8",
    "int8-default": "INT8, as it comes: rows rotated where better",
    "nf4-default": "NF4, as it comes: scales searched",
    "headline": "NF4 + FP8, as it comes",
}
KERNELS = {
    "copy": "plain copy (the memory's bound)",
    "int8-row": "INT8, row scales",
    "int8-block": "INT8, 128 x 128 blocks",
    "fp8-row": "FP8, row scales",
    "fp8-block": "FP8, 128 x 128 blocks",
    "fp8-tensor": "FP8, tensor scale (two passes)",
    "fp4": "FP4",
    "nf4": "NF4",
    "nf4-double": "NF4, double quantization (two passes)",
}
SHAPE = "6144x6144"


def by_contender(heat: Iterable[Result]) -> dict[str, Result]:
    return {row.contender: row for row in heat}


def is_cold(row: Result) -> bool:
    """Whether the source was read from the disk (see `benchmarks.cache`), as the documents say of whole conversions."""
    return row.cache.startswith("cold")


def conversions(rows: Sequence[Result], source: str) -> dict[str, dict[str, Result]]:
    """Of each conversion of `source`, its newest session that is complete and cold: rows by contender."""

    def complete(heat: list[Result]) -> bool:
        found = by_contender(heat)
        needed = ["cp", OURS, *([PEER] if CASES[heat[0].case].peer is not None else [])]
        return all(name in found and found[name].p50 is not None and is_cold(found[name]) for name in needed)

    newest = results.newest([row for row in rows if row.source == source], complete)
    return {case: by_contender(newest[case, source]) for case in CONVERSIONS if (case, source) in newest}


def sizes(rows: Sequence[Result]) -> dict[tuple[str, str], dict[str, Result]]:
    """Of each conversion of sources of several sizes, the newest cold session of each: (case, source) -> rows by contender,
    the smaller sources first. A sparse source has no copy to be held against."""

    def measured(heat: list[Result]) -> bool:
        return any(row.contender == OURS and row.p50 is not None and is_cold(row) for row in heat)

    newest = {key: by_contender(heat) for key, heat in results.newest(rows, measured).items()}
    found = {}
    for case in CONVERSIONS:
        of_case = {key: heat for key, heat in newest.items() if key[0] == case}
        if len(of_case) > 1:
            found |= dict(sorted(of_case.items(), key=lambda item: item[1][OURS].size_bytes))
    return found


def recoveries(rows: Sequence[Result]) -> dict[tuple[str, str, str], dict[str, Result]]:
    """Of each killed conversion, its newest cold session: (case, contender, moment) -> rows by metric; ours first.

    Under "uninterrupted" stands the seconds of the uninterrupted run.
    """
    found = {}
    for name in dict.fromkeys(row.contender for row in rows):
        mine = [row for row in rows if row.contender == name and row.p50 is not None and is_cold(row)]
        for (case, _), heat in results.newest(mine, lambda heat: any(row.metric == "share lost" for row in heat)).items():
            whole = {row.detail: row for row in heat if row.metric == results.SECONDS}
            for moment in dict.fromkeys(row.detail for row in heat if row.metric == "share lost"):
                by_metric = {row.metric: row for row in heat if row.detail == moment}
                found[case, name, moment] = by_metric | {"uninterrupted": whole["uninterrupted"]}
    return dict(sorted(found.items(), key=lambda item: (item[0][1] != OURS, item[0][0], _percent(item[0][2]))))


def _percent(moment: str) -> int:
    return int(moment.split()[-1].rstrip("%"))


def operations(rows: Sequence[Result], titles: dict[str, str] = KERNELS) -> dict[str, dict[str, Result]]:
    """Of each operation of `kernels` or `decode` on the CPU, its newest session at the size of the tables."""
    shown = [row for row in rows if row.device == "cpu" and SHAPE in row.case]
    newest = results.newest(shown, lambda heat: any(row.p50 is not None for row in heat))
    found = {case.partition(" ")[0]: by_contender(heat) for (case, _), heat in newest.items()}
    return {name: found[name] for name in titles if name in found}


def machine(rows: Iterable[Result]) -> str:
    """In words, what rows were measured on, and when."""
    found = list(rows)
    places = sorted({f"{row.cpu}, {row.cores} cores, Python {row.python}, torch {row.torch}" for row in found})
    days = sorted({row.time[:10] for row in found})
    commits = list(dict.fromkeys(row.commit for row in sorted(found, key=lambda row: row.time)))
    first, last = (datetime.fromisoformat(day).strftime("%-d %B %Y") for day in (days[0], days[-1]))
    when = first if first == last else f"{first} to {last}"
    return f"{'; '.join(places)}; {when}; {'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}"
