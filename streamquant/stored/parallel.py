"""Work handed to threads and taken back in order, with a bounded number of pieces in flight."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from functools import partial
from typing import TypeVar

from streamquant.errors import InterruptedRunError

T = TypeVar("T")
POLL_SECONDS = 0.2  # between two looks at `stop`


def in_order(jobs: Iterable[Callable[[], T]], threads: int, stop: threading.Event | None = None) -> Iterator[T]:
    """The jobs' results, in the order of the jobs; `threads` work at once. Raises InterruptedRunError when `stop` is set.

    Jobs are taken from the iterable only as fast as they are done, so that their number costs no memory.
    """
    pending: deque = deque()
    pool = ThreadPoolExecutor(threads, "tile")
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > 2 * threads:
                yield _next(pending, stop)
        while pending:
            yield _next(pending, stop)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def together(
    jobs: Iterable[tuple[int, Callable[[], T]]], most_bytes: int = 256 << 10, most_jobs: int = 512
) -> Iterator[Callable[[], list[T]]]:
    """Jobs, each with the bytes it goes through, as fewer: small ones in a row become one, whose result is all of theirs."""
    row: list[Callable[[], T]] = []
    total = 0
    for nbytes, job in jobs:
        if row and (total + nbytes > most_bytes or len(row) == most_jobs):
            yield partial(_in_a_row, row)
            row, total = [], 0
        row.append(job)
        total += nbytes
    if row:
        yield partial(_in_a_row, row)


def _in_a_row(jobs: list[Callable[[], T]]) -> list[T]:
    return [job() for job in jobs]


def _next(pending: deque, stop: threading.Event | None):
    future = pending.popleft()
    while not wait_for([future], timeout=POLL_SECONDS).done:
        pass
    if stop is not None and stop.is_set():
        raise InterruptedRunError("Interrupted.")
    return future.result()
