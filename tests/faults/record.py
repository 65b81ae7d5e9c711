"""How much was endured: a row per kind of attack and run in `benchmarks/results/endurance.csv`, rows only ever added.

From a test: `from faults.record import record` (the folder `tests` is on its path). From a shell, in the repository:
`python tests/faults/record.py WHAT COUNT DETAIL`.
"""

from __future__ import annotations

import csv
import sys
from datetime import datetime, timezone
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PATH = REPOSITORY / "benchmarks" / "results" / "endurance.csv"


def record(what: str, count: int, detail: str = "", path: Path = PATH) -> None:
    """Add a row and print it. what: the kind of attack; count: how many were survived; detail: scenarios, duration, seeds."""
    if str(REPOSITORY) not in sys.path:  # run as a program, only this file's folder is on the path
        sys.path.append(str(REPOSITORY))
    from benchmarks import machine

    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = {"time": time, "what": what, "count": count, "detail": detail, **machine.facts()}
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), [])
        if found != list(row):
            raise ValueError(f"{path} has other columns ({', '.join(found)}): move it away first")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(f"{what}: {count:,} {detail}".rstrip(), flush=True)


if __name__ == "__main__":
    record(sys.argv[1], int(sys.argv[2]), " ".join(sys.argv[3:]))
