"""Conversions one after the other in one process, as in ComfyUI, some of which fail; run as a program.

`python many_conversions.py COUNT FOLDER` prints one JSON object: after each conversion, what the process holds.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import numpy as np
from small_checkpoints import EVERY_FORMAT, SEARCHED_FORMATS, floats, sample, save, save_shards

from streamquant import FormatChoice, Recipe, errors
from streamquant.calibration import Calibration, LayerStatistics
from streamquant.checkpoint.header import build_header, layout
from streamquant.options import Silent
from streamquant.transcode import convert
from streamquant.verify import verify

Action = Callable[[], None]


def expecting(kind: type[errors.StreamquantError], action: Action) -> Action:
    def run() -> None:
        try:
            action()
        except kind:
            return
        raise AssertionError(f"{kind.__name__} was expected")

    return run


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """No file may grow beyond that: what a full disk is to a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def actions(folder: Path) -> list[Action]:
    """What a session of the node may see: every format, shards, calibration; and everything that goes wrong."""
    large = {f"l{n}.weight": floats(700, 400, seed=n) for n in range(5)}
    source = save(folder / "in" / "m.safetensors", sample() | large)
    index = save_shards(folder / "in" / "shards", {"a.weight": floats(64, 96)}, {"b.weight": floats(128, 64), "b.bias": floats(128)})
    bad = floats(64, 64)
    not_finite = save(folder / "in" / "nan.safetensors", {"a.weight": bad._replace(data=bad.data[:-2] + b"\xc0\x7f"), "b.weight": floats(64, 64)})
    truncated = folder / "in" / "short.safetensors"
    truncated.write_bytes(source.read_bytes()[:5000])
    empty = folder / "in" / "nothing.safetensors"
    empty.write_bytes(build_header(layout([]), {}))
    moment = np.eye(64, dtype=np.float32)
    known = LayerStatistics(10, np.zeros(64, np.float32), np.ones(64, np.float32), hessian=moment)
    Calibration({"blocks.0.attn.qkv": known}).save(folder / "in" / "c.safetensors")
    out = folder / "out"
    out.mkdir()
    taken = out / "taken.safetensors"
    taken.write_bytes(b"another file")

    def simple(recipe: Recipe, path: Path = source, **options) -> Action:
        return lambda: (convert(path, out / "o.safetensors", recipe, force=True, **options), None)[1]

    def interrupted(recipe: Recipe) -> Action:
        def run() -> None:
            stop, observer = threading.Event(), Silent()
            observer.progress = lambda unit, nbytes: stop.set()
            expecting(errors.InterruptedRunError, lambda: convert(source, out / "i.safetensors", recipe, observer=observer, stop=stop))()
            convert(source, out / "i.safetensors", recipe, resume=True)
            (out / "i.safetensors").unlink()

        return run

    def too_large() -> None:
        with file_size_limit(100_000):
            convert(source, out / "f.safetensors", EVERY_FORMAT["fp8-row"])

    def verified() -> None:
        convert(source, out / "v.safetensors", EVERY_FORMAT["nf4"], force=True)
        assert verify(source, out / "v.safetensors").sound

    fp8 = EVERY_FORMAT["fp8-tensor"]
    good = [simple(recipe) for recipe in (EVERY_FORMAT | SEARCHED_FORMATS).values()]
    good += [simple(Recipe(FormatChoice("nf4"), calibration=folder / "in" / "c.safetensors", calibration_mode="dense"))]
    good += [simple(fp8, io="pread", threads=5), simple(fp8, index), simple(fp8, shard_size=100_000), verified]
    bad_ones = [
        interrupted(fp8), interrupted(EVERY_FORMAT["nf4-double"]), expecting(errors.NonFiniteError, simple(fp8, not_finite)),
        expecting(errors.CheckpointError, simple(fp8, truncated)), expecting(errors.NothingToConvertError, simple(fp8, empty)),
        expecting(errors.SourceMissingError, simple(fp8, folder / "in" / "absent.safetensors")),
        expecting(errors.PreflightError, lambda: convert(source, folder / "absent" / "o.safetensors", fp8)),
        expecting(errors.OutputExistsError, lambda: convert(source, taken, fp8)), expecting(errors.DestinationWriteError, too_large),
        expecting(errors.BudgetError, simple(fp8, memory_budget=1 << 20)),
        expecting(errors.UsageError, lambda: convert(source, out / "u.safetensors", Recipe(FormatChoice("int3")))),
        expecting(errors.PatternError, simple(Recipe(exclude_layers="is nowhere"))),
    ]  # fmt: skip
    # A failure after every second conversion.
    mixed: list[Action] = []
    failures = cycle(bad_ones)
    for number, action in enumerate(good * 2):
        mixed.append(action)
        if number % 2:
            mixed.append(next(failures))
    return mixed


def held(folder: Path) -> dict[str, int]:
    """What this process holds now."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "anonymous": int(status["RssAnon"].split()[0]) << 10,
        "threads": int(status["Threads"]),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_bytes().splitlines()),
        "hidden files": sum(path.name.startswith(".") for path in (folder / "out").iterdir()),
    }


def main(count: int, folder: Path) -> None:
    done = []
    for action in islice(cycle(actions(folder)), count):
        action()
        done.append(held(folder))
    print(json.dumps(done))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
