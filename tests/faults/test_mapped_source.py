"""A source that is cut short, or whose disk fails, while it is mapped: a clear error, never a signal, never wrong bytes."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from small_checkpoints import EVERY_FORMAT, floats, save

from streamquant.checkpoint import mapping, reader
from streamquant.checkpoint.mapping import why_no_mapping
from streamquant.options import Silent
from streamquant.transcode import convert

TESTS = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(bool(why_no_mapping()), reason=f"no mappings here: {why_no_mapping()}")

# Truncates the file between the look and the touch: when a command has just been given a tile.
HOOKED = """
import os, sys
sys.path[:0] = [{tests!r}, {repository!r}]
from streamquant.checkpoint.reader import TileReader
tile, count, victim = TileReader.tile, 0, {victim!r}
def cutting(self, tensor, begin, end):
    global count
    view = tile(self, tensor, begin, end)
    if self.io == "mmap" and str(self.checkpoint.files[tensor.file].path) == victim:
        count += 1
        if count == {at}:
            os.truncate(victim, 4096)
    return view
TileReader.tile = cutting
from streamquant.cli import main
sys.argv = ["streamquant", *{arguments!r}]
main(prog_name="streamquant")
"""


@pytest.fixture
def files(tmp_path):
    """A source and an output made from it, both large enough for pages to be missing."""
    tensors = {f"blocks.{n}.weight": floats(256, 256, seed=n) for n in range(6)} | {"bias": floats(70_000, seed=9)}
    source = save(tmp_path / "source.safetensors", tensors)
    convert(source, tmp_path / "output.safetensors", EVERY_FORMAT["fp8-tensor"])
    (tmp_path / "new").mkdir()
    return source, tmp_path / "output.safetensors", tmp_path / "new" / "out.safetensors"


def hooked(victim: Path, at: int, *arguments: str) -> subprocess.CompletedProcess:
    code = HOOKED.format(
        tests=str(TESTS), repository=str(TESTS.parent), victim=str(victim), at=at, arguments=[*map(str, arguments)]
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def check_told(done: subprocess.CompletedProcess, new: Path) -> None:
    assert done.returncode == 6, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr and re.search(r"truncated|changed while", done.stderr), done.stderr
    assert not new.exists()


@pytest.mark.parametrize(("at", "flags"), [(1, "--fp8 --rtn"), (5, "--int8"), (6, "--bnb-4bit --bnb-double-quant"), (7, "--fp8")])
def test_convert(files, at, flags):
    source, _, new = files
    done = hooked(source, at, "convert", source, "-o", new, "--preset", "none", "--io", "mmap", "--threads", "2", *flags.split())
    check_told(done, new)


@pytest.mark.parametrize(("at", "which"), [(1, "source"), (4, "output")])
def test_verify_compare_and_dequantize(files, at, which):
    source, output, new = files
    victim = source if which == "source" else output
    whole = victim.read_bytes()
    done = [hooked(victim, at, "verify", source, output, "--io", "mmap")]
    victim.write_bytes(whole)
    done.append(hooked(victim, at, "compare", output, output, "--source", source, "--io", "mmap"))
    victim.write_bytes(whole)
    if which == "output":
        done.append(hooked(victim, at, "dequantize", output, "-o", new, "--io", "mmap"))
    for one in done:
        check_told(one, new)
    assert not list(new.parent.iterdir())


def test_a_calibration_that_is_cut_short(tmp_path):
    from faults.scenarios import make_sources

    source, calibration = make_sources(tmp_path)
    code = f"""
        import os, sys
        sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
        from streamquant.rounding import knowledge
        init = knowledge.LayerKnowledge.__init__
        def cutting(self, *rest, **named):
            init(self, *rest, **named)
            os.truncate({str(calibration)!r}, 100)
        knowledge.LayerKnowledge.__init__ = cutting
        from streamquant.cli import main
        sys.argv = ["streamquant", "convert", {str(source)!r}, "-o", {str(tmp_path / "o.safetensors")!r},
                    "--int8", "--preset", "none", "--calibration", {str(calibration)!r}, "--calibration-mode", "dense"]
        main(prog_name="streamquant")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 6 and "calibration.safetensors" in done.stderr, (done.returncode, done.stderr)
    assert not (tmp_path / "o.safetensors").exists()


def test_truncated_at_random_moments(tmp_path):
    """By the clock, in a run that is slow enough to be met in the middle."""
    tensors = {f"blocks.{n}.weight": floats(1024, 1024, seed=n) for n in range(12)}
    source, out = save(tmp_path / "source.safetensors", tensors), tmp_path / "out.safetensors"
    whole, dice = source.read_bytes(), random.Random(1)
    for _ in range(4):
        source.write_bytes(whole)
        process = subprocess.Popen(
            [sys.executable, "-m", "streamquant", "convert", str(source), "-o", str(out), "--preset", "none", "--io", "mmap",
             "--bnb-4bit", "--memory-budget", "160MiB"], stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(dice.uniform(0.3, 1.2))
        os.truncate(source, dice.randrange(len(whole)))
        _, err = process.communicate()
        assert process.returncode in (0, 5, 6) and "Traceback" not in err, (process.returncode, err)
        assert out.exists() == (process.returncode == 0)
        for left in tmp_path.glob("*out.safetensors*"):
            left.unlink()


def test_another_fault_is_not_ours():
    """A SIGBUS outside our mappings ends the process as it would have, while one of ours is open."""
    code = f"""
        import mmap, os, sys, tempfile
        sys.path.insert(0, {str(TESTS.parent)!r})
        import numpy as np
        from streamquant.checkpoint.mapping import Mapping
        with tempfile.TemporaryFile() as ours, tempfile.TemporaryFile() as other:
            for file in (ours, other):
                file.truncate(1 << 16)
            mapping, theirs = Mapping(ours.fileno(), 1 << 16), mmap.mmap(other.fileno(), 1 << 16, access=mmap.ACCESS_READ)
            ours.truncate(10)
            assert not np.frombuffer(mapping.view, np.uint8).any() and mapping.damaged
            other.truncate(10)
            print("about to", flush=True)
            np.frombuffer(theirs, np.uint8).any()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -7 and done.stdout == "about to\n"


def test_the_handler_is_there_only_while_a_mapping_is_open(tmp_path):
    code = f"""
        import faulthandler, os, sys
        sys.path.insert(0, {str(TESTS.parent)!r})
        import numpy as np
        from streamquant.checkpoint import mapping
        faulthandler.enable()  # its own handler, which must be there again afterwards
        def current():
            old = mapping._action(0)
            mapping._exchange(None, old)
            return bytes(old)[:8]
        theirs = current()
        descriptor = os.open({str(tmp_path / "f")!r}, os.O_RDONLY)
        for _ in range(3):
            first, second = mapping.Mapping(descriptor, 5000), mapping.Mapping(descriptor, 5000)
            assert current() != theirs
            kept = second.view[10:20]
            first.close()
            second.close()
            assert current() != theirs, "a view that is still held is still guarded"
            assert bytes(kept) == b"x" * 10
            del kept, second
            assert current() == theirs
        assert not mapping._table[:, 1].any()
    """
    (tmp_path / "f").write_bytes(b"x" * 5000)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_many_threads_touch_what_is_gone(tmp_path):
    code = f"""
        import os, sys
        from concurrent.futures import ThreadPoolExecutor
        sys.path.insert(0, {str(TESTS.parent)!r})
        import numpy as np
        from streamquant.checkpoint.mapping import Mapping
        size = 1 << 24
        with open({str(tmp_path / "f")!r}, "wb+") as file:
            for _ in range(5):
                file.truncate(size)
                mapping = Mapping(file.fileno(), size)
                data = np.frombuffer(mapping.view, np.uint8)
                file.truncate(100)
                with ThreadPoolExecutor(8) as pool:
                    assert not any(pool.map(lambda part: data[part::8].any(), range(8)))
                assert mapping.damaged
                del data
                mapping.close()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_without_numba_files_are_read_and_that_is_said(tmp_path, monkeypatch):
    source = save(tmp_path / "m.safetensors", {"l.weight": floats(64, 64)})
    observer = Silent()
    observer.note = (notes := []).append
    monkeypatch.setattr(reader, "why_no_mapping", lambda: "it is not safe")
    convert(source, tmp_path / "o.safetensors", EVERY_FORMAT["int8-row"], io="mmap", observer=observer)
    assert "Files are read instead of mapped: it is not safe." in notes and (tmp_path / "o.safetensors").exists()
    monkeypatch.setattr(mapping.importlib.util, "find_spec", lambda name: None)
    assert "without numba" in mapping.why_no_mapping()


def test_a_mapping_that_is_collected_while_another_is_opened(tmp_path):
    """The collector may run at any moment, in whichever thread: also in one that holds the lock."""
    code = f"""
    import gc, os, sys
    sys.path.insert(0, {str(TESTS.parent)!r})
    from streamquant.checkpoint import mapping
    path = {str(tmp_path / "file")!r}
    with open(path, "wb") as file:
        file.write(bytes(1 << 16))
    descriptor = os.open(path, os.O_RDONLY)
    circle = [mapping.Mapping(descriptor, 1 << 16)]
    circle.append(circle)
    with mapping._lock:
        del circle
        gc.collect()
    assert not mapping._open
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
