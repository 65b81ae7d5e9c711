"""Disks that fill or refuse, sources that change, requests that cannot be met; real ones where they can be had."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest
from conversions import Watcher, files, hidden, interrupt, the_journal, the_partial
from small_checkpoints import EVERY_FORMAT, floats, noise, of_values, sample, save, save_shards

from streamquant import FormatChoice, Recipe, errors, preflight
from streamquant.checkpoint import writer
from streamquant.transcode import convert

pytestmark = pytest.mark.usefixtures("small_tiles")
RECIPE = EVERY_FORMAT["int8-row"]


@pytest.fixture
def mount(tmp_path):
    """Mounts a small tmpfs; skips where that is not allowed."""
    mounted = []

    def mount_tmpfs(options: str):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount_tmpfs
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave: int) -> None:
    """Take all room of a disk but `leave` bytes."""
    status = os.statvfs(folder)
    with (folder / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave)


# -- a full disk


def test_a_disk_too_small_is_refused_before_anything_is_written(source, mount):
    disk = mount("size=64k")
    (disk / "out.safetensors").write_bytes(b"old")
    with pytest.raises(errors.DiskSpaceError, match="make room") as caught:
        convert(source, disk / "out.safetensors", RECIPE, force=True)
    assert caught.value.exit_code == 4
    assert files(disk) == {"out.safetensors": b"old"} and hidden(disk) == []


def test_a_disk_that_fills_while_the_files_are_made(source, mount, monkeypatch):
    """Someone else takes the room between the check and the reservation: nothing is left in the way."""
    disk = mount("size=64k")
    monkeypatch.setattr(preflight, "free_disk", lambda folder: 1 << 40)
    with pytest.raises(errors.DestinationWriteError, match="No space left on device") as caught:
        convert(source, disk / "out.safetensors", RECIPE)
    assert caught.value.exit_code == 7 and list(disk.iterdir()) == []


def test_a_disk_that_fills_halfway_keeps_the_work_and_the_old_file(source, mount, monkeypatch, tmp_path):
    """On a filesystem that cannot reserve space the disk is full when it is full; with room made, the run goes on."""
    disk = mount("size=32m")
    out = disk / "out.safetensors"
    out.write_bytes(b"old")
    monkeypatch.setattr(writer, "_fallocate", None)
    notes = Watcher(lambda tiles: fill(disk, 8192) if tiles == 5 else None)
    with pytest.raises(errors.DestinationWriteError, match=r"No space left on device.*--resume") as caught:
        convert(source, out, RECIPE, force=True, observer=notes)
    assert caught.value.exit_code == 7
    assert any("cannot reserve space" in note for note in notes.notes)
    assert out.read_bytes() == b"old" and the_partial(disk).exists()
    (disk / "ballast").unlink()
    resumed = Watcher()
    convert(source, out, RECIPE, force=True, resume=True, observer=resumed)
    assert resumed.done_bytes > 0 and hidden(disk) == []
    convert(source, tmp_path / "whole.safetensors", RECIPE)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_disk_too_full_for_the_journal(source, mount, tmp_path):
    """The partial file has its room; the journal has not, and tears in the middle of a line."""
    disk = mount("size=32m")
    out = disk / "out.safetensors"
    many = save(tmp_path / "many.safetensors", {f"l{n}.weight": floats(8, 8, seed=n) for n in range(300)})
    with pytest.raises(errors.DestinationWriteError, match=r"journal failed: (No space left on device|short write)"):
        convert(many, out, RECIPE, observer=Watcher(lambda tiles: fill(disk, 0) if tiles == 20 else None))
    assert not out.exists()
    (disk / "ballast").unlink()
    convert(many, out, RECIPE, resume=True)
    convert(many, tmp_path / "whole.safetensors", RECIPE)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes() and hidden(disk) == []


# -- folders that cannot be written


def test_a_read_only_folder(source, mount):
    """A mount that is read-only stops root too."""
    disk = mount("size=32m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(errors.PreflightError, match="cannot be written to") as caught:
        convert(source, disk / "out.safetensors", RECIPE)
    assert caught.value.exit_code == 4


def test_a_folder_that_becomes_read_only(source, mount, tmp_path):
    """As a disk does after an I/O error."""
    disk = mount("size=32m")
    out = disk / "out.safetensors"
    interrupt(source, out, RECIPE, 5)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(errors.DestinationWriteError, match="Read-only file system"):
        convert(source, out, RECIPE, resume=True)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    convert(source, out, RECIPE, resume=True)
    convert(source, tmp_path / "whole.safetensors", RECIPE)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_folder_that_is_removed_meanwhile(source, out, tmp_path):
    def remove(tiles: int) -> None:
        if tiles == 5:
            out.parent.rename(tmp_path / "gone")

    with pytest.raises(errors.DestinationWriteError, match="No such file"):
        convert(source, out, RECIPE, observer=Watcher(remove))


@pytest.mark.parametrize(
    "name", ["absent/out.safetensors", "x" * 250 + ".safetensors", "folder", "source/m.safetensors/out"]
)
def test_destinations_that_cannot_be(source, tmp_path, name):
    (tmp_path / "folder").mkdir(exist_ok=True)
    with pytest.raises((errors.PreflightError, errors.DestinationWriteError)) as caught:
        convert(source, tmp_path / name, RECIPE)
    assert caught.value.exit_code in (4, 7) and hidden(tmp_path) == []


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", [".", "", "/", ".."])
def test_a_folder_for_a_destination(source, tmp_path, monkeypatch, name, resume):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.PreflightError, match="is a folder: give a file name"):
        convert(source, name, RECIPE, resume=resume)


# -- output and input


def test_output_is_input(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source.parent)
    (tmp_path / "symlink.safetensors").symlink_to(source)
    os.link(source, tmp_path / "hardlink.safetensors")
    (tmp_path / "folder").symlink_to(source.parent)
    before = source.read_bytes()
    for name in (source, "m.safetensors", "../source/m.safetensors", tmp_path / "symlink.safetensors",
                 tmp_path / "hardlink.safetensors", tmp_path / "folder" / "m.safetensors"):  # fmt: skip
        for options in ({}, {"force": True}, {"resume": True}, {"resume": True, "force": True}):
            with pytest.raises(errors.OutputIsInputError, match="is the source itself") as caught:
                convert(source, name, RECIPE, **options)
            assert caught.value.exit_code == 4
    assert source.read_bytes() == before and hidden(source.parent) == hidden(tmp_path) == []


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_output_is_one_of_the_inputs_shards(tmp_path, name):
    tensors = sample()
    names = list(tensors)
    index = save_shards(tmp_path, {n: tensors[n] for n in names[:4]}, {n: tensors[n] for n in names[4:]})
    before = files(tmp_path)
    with pytest.raises(errors.OutputIsInputError):
        convert(index, tmp_path / name, RECIPE, force=True)
    with pytest.raises(errors.OutputIsInputError):  # as shards of the same names
        convert(index, tmp_path / "model.safetensors", RECIPE, force=True, shard_size=40_000)
    assert files(tmp_path) == before


def test_output_exists(source, out):
    out.write_bytes(b"old")
    with pytest.raises(errors.OutputExistsError, match="--force") as caught:
        convert(source, out, RECIPE)
    assert caught.value.exit_code == 4 and out.read_bytes() == b"old" and hidden(out.parent) == []


def test_force_keeps_the_old_file_until_the_new_one_is_complete(source, out):
    out.write_bytes(b"old")
    seen = set()
    convert(source, out, RECIPE, force=True, observer=Watcher(lambda tiles: seen.add(out.read_bytes())))
    # The last tile is reported before the file is published.
    assert seen == {b"old"} and out.stat().st_size > 10_000


def test_force_replaces_a_link_and_not_what_it_points_to(source, out, tmp_path):
    (tmp_path / "precious").write_bytes(b"old")
    out.symlink_to(tmp_path / "precious")
    convert(source, out, RECIPE, force=True)
    assert not out.is_symlink() and (tmp_path / "precious").read_bytes() == b"old"


# -- sources that change, weights that cannot be


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("how", ["truncate", "overwrite"])
def test_a_source_that_changes_meanwhile(source, out, io, how):
    def change(tiles: int) -> None:
        if tiles == 5:
            if how == "truncate":
                os.truncate(source, source.stat().st_size // 2)
            else:
                os.utime(source, ns=(1, 1))

    with pytest.raises(errors.SourceReadError, match="changed while it was being read") as caught:
        convert(source, out, RECIPE, observer=Watcher(change), io=io, threads=1)
    assert caught.value.exit_code == 6 and not out.exists()
    assert the_journal(out.parent).exists(), "a source that comes back (a network drive) can be gone on from"


def test_a_source_gone_before_the_resume(source, out):
    interrupt(source, out, RECIPE, 5)
    source.rename(source.with_name("elsewhere"))
    with pytest.raises(errors.SourceMissingError):
        convert(source, out, RECIPE, resume=True)
    source.with_name("elsewhere").rename(source)
    convert(source, out, RECIPE, resume=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", ["fp8-tensor", "int8-row", "nf4", "nf4-double", "cast-bf16"])
@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, out, value, recipe, dtype):
    weights = np.random.default_rng(0).standard_normal((40, 64))
    weights[31, 17] = value
    source = save(tmp_path / "m.safetensors", {"a.weight": floats(8, 8), "b.weight": of_values(weights, dtype)})
    with pytest.raises(errors.NonFiniteError, match=rf"b\.weight\[31, 17\] is {value}") as caught:
        convert(source, out, EVERY_FORMAT[recipe])
    assert caught.value.exit_code == 8 and list(out.parent.iterdir()) == []
    report = convert(source, out, Recipe(EVERY_FORMAT[recipe].base, cast=EVERY_FORMAT[recipe].cast, allow_nonfinite=True))
    known = {layer.key: layer.relative_error for layer in report.layers if layer.format not in ("copy", "cast")}
    assert known.get("b.weight") is None, "an error of what has no size is no number"
    assert all(error is not None for key, error in known.items() if key != "b.weight")


def test_a_number_too_large_for_the_cast_is_named(tmp_path, out):
    tensors = {"a.weight": floats(8, 8), "scalar": of_values(np.float32(70_000), "F32")}
    source = save(tmp_path / "m.safetensors", tensors)
    with pytest.raises(errors.NonFiniteError, match=r"scalar\[\] is 70000\.0, beyond what F16 can hold"):
        convert(source, out, Recipe(FormatChoice("int8"), cast="F16"))


def test_what_is_copied_may_hold_anything(tmp_path, out):
    tensors = {"a.weight": floats(8, 8), "nan.bias": of_values(np.full(5, np.nan), "F32"), "bits": noise("F16", 999)}
    convert(save(tmp_path / "m.safetensors", tensors), out, RECIPE)


# -- threads


def test_an_error_in_a_worker_ends_every_thread_and_closes_every_file(source, out, monkeypatch):
    import threading

    from streamquant.pour import Pour

    def fail(*_):
        raise RuntimeError("a bug")

    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    monkeypatch.setattr(Pour, "_compute", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        convert(source, out, RECIPE, threads=4)
    assert threading.active_count() <= before[0] and len(os.listdir("/proc/self/fd")) <= before[1]


def test_the_first_tile_in_order_to_fail_is_the_error_told(tmp_path, out):
    """Two bad weights: whichever worker is faster, the same one is named."""
    bad = np.zeros((64, 64))
    bad[63, 63] = np.nan
    tensors = {"a.weight": of_values(bad), "b.weight": of_values(np.full((2, 2), np.nan))}
    source = save(tmp_path / "m.safetensors", tensors)
    for _ in range(10):
        with pytest.raises(errors.NonFiniteError, match=r"a\.weight\[63, 63\]"):
            convert(source, out, RECIPE, threads=4)


def test_a_failed_sync_is_an_error_however_late_it_comes(source, out, monkeypatch):
    """The kernel tells of a failed write once: if it tells the sync beside the work, the file must not be published."""
    calls = []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writer, "_data_sync", fail)
    with pytest.raises(errors.DestinationWriteError, match="Input/output error"):
        convert(source, out, RECIPE)
    assert calls and not out.exists() and the_partial(out.parent).exists()
