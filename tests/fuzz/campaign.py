"""All fuzzers, one after the other on each processor, for a time: `python tests/fuzz/campaign.py --seconds 1800`.

Prints what each reached; what was found lies in FOLDER/crashes, and makes the exit code 1. The corpus in FOLDER/corpus grows from
run to run. A finding becomes a small test in `test_found.py`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SHARES = {"header": 2, "index": 1, "layer_config": 1, "pattern": 1, "stored": 3, "plan": 1, "calibration": 1, "journal": 1, "write": 1,
          "gguf": 1}  # fmt: skip
SPARE_SECONDS = 120  # beyond its time, for starting and ending; then a fuzzer hangs in a way that it does not see itself


class Outcome(NamedTuple):
    """What one fuzzer did. coverage: places in the code that were reached, and ways there; found: the files it left, if any."""

    target: str
    code: int
    runs: int
    coverage: int
    features: int
    found: list[str]
    output: str

    def line(self) -> str:
        what = "nothing found" if not self.code else f"FOUND {', '.join(self.found) or 'a failure'}"
        return f"{self.target:<13} {self.runs:>10,} runs  {self.coverage:>5} places  {self.features:>6} ways  {what}"


def environment() -> dict[str, str]:
    """With the folders on the path from which the fuzzers import."""
    folders = [ROOT, ROOT / "tests", ROOT / "tests" / "checkpoint", HERE]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONWARNINGS": "ignore"}


def write_corpus(folder: Path) -> None:
    """The seeds of all targets."""
    subprocess.run([sys.executable, HERE / "corpus.py", folder], check=True, env=environment())


def fuzz(target: str, corpus: Path, crashes: Path, seconds: int, *flags: str) -> Outcome:
    """Run one fuzzer for `seconds`."""
    crashes.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in crashes.iterdir()}
    command = [sys.executable, HERE / "one.py", target, corpus / target, crashes, str(seconds), *flags]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        done = subprocess.run(
            command, env=environment() | {"TMPDIR": scratch}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=seconds + SPARE_SECONDS,
        )  # fmt: skip
    counts = re.findall(r"^#(\d+)\s", done.stdout, re.MULTILINE)
    reached = re.findall(r"cov: (\d+) ft: (\d+)", done.stdout)
    coverage, features = map(int, reached[-1]) if reached else (0, 0)
    found = sorted(str(path) for path in crashes.iterdir() if path.name not in before)
    runs = int(counts[-1]) if counts else 0
    return Outcome(target, done.returncode, runs, coverage, features, found, done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=1800, help="of all fuzzers together")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--targets", nargs="*", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--record", action="store_true", help="add a row to benchmarks/results/endurance.csv")
    given = parser.parse_args()
    given.folder = given.folder.resolve()
    write_corpus(given.folder / "corpus")
    total = sum(SHARES[target] for target in given.targets)
    seconds = {target: max(given.seconds * SHARES[target] // total, 1) for target in given.targets}

    def run(target: str) -> Outcome:
        done = fuzz(target, given.folder / "corpus", given.folder / "crashes", seconds[target])
        (given.folder / f"{target}.log").write_text(done.output, encoding="utf-8")
        print(done.line(), flush=True)
        return done

    with ThreadPoolExecutor(given.jobs) as pool:  # the longest first, so that none is left running alone at the end
        done = list(pool.map(run, sorted(given.targets, key=lambda target: -seconds[target])))
    if given.record:
        from faults.record import record

        runs = sum(outcome.runs for outcome in done)
        found = sum(bool(outcome.code) for outcome in done)
        detail = "; ".join(f"{outcome.target} {outcome.runs:,} runs, {outcome.coverage} places" for outcome in done)
        record("fuzzing", runs, f"{sum(seconds.values())} s in all, {found} findings: {detail}")
    sys.exit(any(outcome.code for outcome in done))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main()
