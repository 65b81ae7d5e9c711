"""The whole of it: every call struck with every fault, hundreds of kills, hundreds of power cuts. `make faults`.

Prints what was reached, and adds it to `benchmarks/results/endurance.csv`. Exits with 1 when anything fell.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from faults.killing import killed_at, killed_by_a_timer, random_moments, without_power  # noqa: E402
from faults.record import record  # noqa: E402
from faults.scenarios import SCENARIOS, Ordeal, make_sources  # noqa: E402
from faults.server import Server  # noqa: E402
from faults.shim import why_no_shim  # noqa: E402
from faults.striking import FAULTS, survive  # noqa: E402

KILLS, TIMED, POWER_CUTS = 60, 6, 80  # runs of each scenario
Attack = Callable[[Ordeal], Iterator[int]]


def strikes(ordeal: Ordeal) -> Iterator[int]:
    """Every call with every fault that it can have. A fault that fells it ends there; the others go on, and all are told."""
    fallen = []
    for fault in FAULTS:
        at = 1
        try:
            while survive(ordeal, fault, at):
                yield 1
                at += 1
        except AssertionError as told:
            fallen.append(str(told))
    assert not fallen, "\n".join(fallen)


def kills(ordeal: Ordeal) -> Iterator[int]:
    """At moments spread over the run: once, the resume too, and the resume's resume."""
    dice = random.Random(ordeal.name)
    for number in range(KILLS):
        yield killed_at(ordeal, random_moments(ordeal, dice, 1 + number % 3))


def timed_kills(ordeal: Ordeal) -> Iterator[int]:
    """The real program, killed by a timer, and its resumes."""
    dice = random.Random(ordeal.name)
    for _ in range(TIMED):
        yield killed_by_a_timer(ordeal, [dice.uniform(0.2, 1.2) for _ in range(3)])


def power_cuts(ordeal: Ordeal) -> Iterator[int]:
    """At any change of the disk, and of the resumes' too."""
    for seed in range(POWER_CUTS):
        yield without_power(ordeal, seed, 1 + seed % 3)


ATTACKS: dict[str, Attack] = {
    "calls struck": strikes,
    "kills at a call": kills,
    "kills by a timer": timed_kills,
    "power cuts": power_cuts,
}


def endure(attack: Attack, name: str, root: Path) -> tuple[int, list[str]]:
    """One attack on one scenario: (how many were survived, what fell)."""
    started, count, fallen = time.monotonic(), 0, []
    server = Server()
    try:
        folder = root / f"{attack.__name__}-{name}".replace(" ", "-")
        folder.mkdir()
        for survived in attack(Ordeal(server, *make_sources(folder / "source"), folder, name)):
            count += survived
    except AssertionError as fault:
        fallen.append(f"{name}: {fault}")
    finally:
        server.close()
    print(f"  {name}: {count:,} in {time.monotonic() - started:.0f} s", flush=True)
    return count, fallen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=ATTACKS, action="append", help="this attack")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="this conversion")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    if why := why_no_shim():
        print(why)
        return 1
    fallen = []
    for what in given.only or ATTACKS:
        print(what, flush=True)
        names = given.scenario or list(SCENARIOS)
        with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(given.jobs) as pool:
            results = list(pool.map(lambda name, what=what, root=root: endure(ATTACKS[what], name, Path(root)), names))
        fallen += [text for _, texts in results for text in texts]
        if not any(texts for _, texts in results):
            faults = f", {len(FAULTS)} faults" if what == "calls struck" else ""
            record(what, sum(count for count, _ in results), f"{len(names)} scenarios{faults}, all survived")
    print(*fallen, sep="\n")
    return bool(fallen)


if __name__ == "__main__":
    sys.exit(main())
