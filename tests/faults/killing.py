"""`kill -9` and power cuts at any call of a conversion, and at any call of its resumes."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from typing import Any

from faults.power import Disk, cut, read_log
from faults.scenarios import EVERY, Ordeal

HOW = ("kill before", "kill after", "kill half")


def killed_at(ordeal: Ordeal, moments: list[tuple[int, str]]) -> int:
    """Kill a run at its Nth call, its resume at another, and so on; then let it end. Returns how many kills struck."""
    folder = ordeal.make("kill-" + "-".join(f"{at}" for at, _ in moments) + moments[0][1][5:])
    struck = 0
    for number, (at, how) in enumerate([*moments, (0, "fail")]):
        result = ordeal.run(folder, *(["--resume"] if number else []), orders={"at": at, "how": how, "calls": EVERY})
        trail = f"{ordeal.name}: killed {moments[: number + 1]}\n{result.err}"
        assert result.killed or result.exit == 0, trail
        struck += result.killed
        ordeal.check_names(folder, trail)
    ordeal.check_done(folder, trail)
    shutil.rmtree(folder)
    return struck


def random_moments(ordeal: Ordeal, dice: random.Random, times: int) -> list[tuple[int, str]]:
    """A moment of the run, then moments of its resumes, which are shorter."""
    first = dice.randint(1, ordeal.calls)
    return [(first, dice.choice(HOW)), *((dice.randint(1, 90), dice.choice(HOW)) for _ in range(times - 1))]


def without_power(ordeal: Ordeal, seed: int, times: int) -> int:
    """Cut the power of a run, and of its resumes, at random moments; then let it end. Returns the number of cuts.

    After a cut the output is identical in the end; or the resume says that there is nothing to go on from, and what it
    names to be deleted is deleted: never is a byte wrong.
    """
    dice = random.Random(seed)
    trail: list[Any] = [ordeal.name, f"seed {seed}"]
    folder = ordeal.make(f"power-{seed}-0")
    log = ordeal.folder / f"power-{seed}.log"
    cuts = 0
    for number in range(times):
        before = Disk.of(folder)
        result = ordeal.run(folder, *(["--resume"] if number else []), log=str(log))
        trail.append(result.err)
        assert result.exit == 0, trail
        changes = read_log(log)
        if not changes:
            break
        at = dice.randint(1, len(changes))
        after = cut(before, changes, at, dice)
        shutil.rmtree(folder)
        folder = ordeal.folder / f"power-{seed}-{number + 1}"
        folder.mkdir()
        after.put(folder)
        cuts += 1
        trail.append(f"cut {at} of {len(changes)}, {changes[at - 1].kind}; left {sorted(after.names)}")
        ordeal.check_names(folder, trail)
    result = ordeal.run(folder, "--resume")
    trail.append(result.err)
    assert result.exit == 0, trail
    ordeal.check_done(folder, trail)
    shutil.rmtree(folder)
    log.unlink()
    return cuts


def killed_by_a_timer(ordeal: Ordeal, delays: list[float]) -> int:
    """Start `python -m streamquant`, kill it after each delay in turn, let it end. Returns how many kills struck."""
    folder = ordeal.make(f"timer-{delays[0]:.3f}")
    killed = 0
    for number, delay in enumerate([*delays, None]):
        more = ["--resume"] if number else []
        process = subprocess.Popen(
            [sys.executable, "-m", "streamquant", *ordeal.arguments(folder, *more)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if delay is not None:
            time.sleep(delay)
            process.kill()
        _, err = process.communicate()
        killed += process.returncode < 0
        assert process.returncode <= 0, err
        ordeal.check_names(folder, (delays, err))
    ordeal.check_done(folder, delays)
    shutil.rmtree(folder)
    return killed
