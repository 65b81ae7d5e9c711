"""Fuzz one target: `python tests/fuzz/one.py TARGET CORPUS CRASHES SECONDS`, as `campaign.py` does.

An exception other than a refusal, an input that takes more than 5 seconds, and an allocation far beyond its size end the
run with an exit code, and leave the input in the folder CRASHES.
"""

from __future__ import annotations

import hashlib
import resource
import sys
from pathlib import Path

import atheris

# Whatever numba compiles must be as it was written.
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
NAMES = (path.relative_to(KERNELS.parent).with_suffix("").parts for path in KERNELS.rglob("*.py"))
COMPILED = {"streamquant.checkpoint.mapping", *(".".join(["streamquant", *names]) for names in NAMES)}

with atheris.instrument_imports(include=["streamquant"], exclude=COMPILED):
    import targets
    from mutate import mutate

SLOWEST = 5  # seconds for one input
LARGEST = 1 << 16  # bytes of an input
ROOM = 512 << 20  # bytes that a run may add to the process; most is the fuzzer's own, which takes a kilobyte for each run


def main() -> None:
    name, corpus, crashes, seconds = sys.argv[1:5]
    target = targets.TARGETS[name]

    def mutated(data: bytes, size: int, seed: int) -> bytes:
        return mutate(data, size, seed, atheris.Mutate)

    def run(data: bytes) -> None:
        try:
            target.run(data)
        except BaseException:  # libFuzzer was seen to end without having written the input down
            (Path(crashes) / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    for seed in sorted(Path(corpus).iterdir()):  # what is imported or compiled late is there before memory is counted
        run(seed.read_bytes())
    _limit_memory()
    flags = [f"-max_total_time={seconds}", f"-timeout={SLOWEST}", f"-max_len={LARGEST}", f"-artifact_prefix={crashes}/{name}-",
             "-rss_limit_mb=0", "-print_final_stats=1", "-len_control=0"]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags, *sys.argv[5:], corpus], run, **({"custom_mutator": mutated} if target.is_file else {}))
    atheris.Fuzz()


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
