"""How much was endured: a row per kind of attack and run in `benchmarks/results/endurance.csv`, rows only ever added.

From a test: `from faults.record import record` (the folder `tests` is on its path). From a shell, in the repository:
`python tests/faults/record.py WHAT COUNT DETAIL`.
"""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def record(what: str, count: int, detail: str = "", path: Path | None = None) -> None:
    """Add a row and print it. what: the kind of attack; count: how many were survived; detail: scenarios, duration, seeds.

    path: another file than the repository's.
    """
    if str(REPOSITORY) not in sys.path:  # run as a program, only this file's folder is on the path
        sys.path.append(str(REPOSITORY))
    from benchmarks import endurance, machine, results

    endurance.append(endurance.Endured(results.now(), what, count, detail, **machine.facts()), path or endurance.PATH)
    print(f"{what}: {count:,} {detail}".rstrip(), flush=True)


if __name__ == "__main__":
    record(sys.argv[1], int(sys.argv[2]), " ".join(sys.argv[3:]))
