"""Reading ahead: in order, by a bounded distance, and never in the way."""

from __future__ import annotations

import os
import threading
import time

import pytest

from streamquant import prefetch
from streamquant.prefetch import STEP, Prefetcher

RANGES = [(3, 0, 5 * STEP + 7), (3, 10 * STEP, 0), (4, 100, 3 * STEP)]


@pytest.fixture
def requests(monkeypatch):
    """What the system is asked to read ahead: (descriptor, offset, bytes)."""
    made = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, count, advice: made.append((fd, offset, count)))
    return made


def count(requests: list, expected: int) -> int:
    """How many requests there are once `expected` have come, and a little later."""
    deadline = time.monotonic() + 10
    while len(requests) < expected and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.02)
    return len(requests)


def test_everything_is_asked_for_in_order_in_small_steps(requests):
    with Prefetcher(RANGES):
        count(requests, 9)
    assert requests == [
        *((3, step * STEP, STEP) for step in range(5)), (3, 5 * STEP, 7),
        *((4, 100 + step * STEP, STEP) for step in range(3)),
    ]  # fmt: skip


def test_it_stays_a_bounded_distance_ahead_of_the_work(requests, monkeypatch):
    monkeypatch.setattr(prefetch, "DISTANCE", 2 * STEP)
    with Prefetcher(RANGES) as prefetcher:
        assert count(requests, 2) == 2
        prefetcher.advance(STEP)
        assert count(requests, 3) == 3
        prefetcher.advance(100 * STEP)
        assert count(requests, 3) == 3, "what lies behind the work is not asked for any more"


def test_it_ends_at_once_when_the_work_does(requests, monkeypatch):
    monkeypatch.setattr(prefetch, "DISTANCE", 1)
    before = threading.active_count()
    with Prefetcher(RANGES):
        assert count(requests, 1) == 1
    assert threading.active_count() == before and count(requests, 1) == 1, "the rest is not asked for any more"


def test_a_system_that_refuses_or_cannot_is_left_alone(monkeypatch):
    def refuse(*_):
        raise OSError(29, "Illegal seek")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    with Prefetcher(RANGES):
        time.sleep(0.02)
    monkeypatch.delattr(os, "posix_fadvise")
    with Prefetcher(RANGES) as prefetcher:
        prefetcher.advance(1)


@pytest.mark.parametrize("recipe", ["fp8-row", "fp8-tensor"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_conversion_tells_it_of_every_byte_exactly_once(tmp_path, monkeypatch, recipe, resumed):
    """Else it would fall behind for good: also where a resume skips a first pass, or starts inside a tensor."""
    from conversions import interrupt
    from small_checkpoints import EVERY_FORMAT, sample, save

    from streamquant import budget
    from streamquant.transcode import convert

    monkeypatch.setattr(budget, "TARGET_TILE_BYTES", 4096)
    source = save(tmp_path / "m.safetensors", sample())
    if resumed:
        interrupt(source, tmp_path / "o.safetensors", EVERY_FORMAT[recipe], 9, threads=1)
    told, ranges = [], []
    advance, begin = Prefetcher.advance, Prefetcher.__init__
    monkeypatch.setattr(Prefetcher, "advance", lambda self, nbytes: told.append(nbytes) or advance(self, nbytes))
    monkeypatch.setattr(Prefetcher, "__init__", lambda self, given: ranges.extend(given) or begin(self, given))
    convert(source, tmp_path / "o.safetensors", EVERY_FORMAT[recipe], resume=resumed)
    assert sum(told) == sum(length for _, _, length in ranges) > 0
