"""A call fails: the old file is intact, the exit code and one sentence say what happened, --resume gives the same bytes.

Here a sample; `make faults` strikes at every call.
"""

from __future__ import annotations

import random

import pytest
from faults.scenarios import SCENARIOS
from faults.striking import FAULTS, struck_calls, survive

SAMPLE = 2  # of each fault and scenario


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_that_fails(ordeals, fault):
    """Each fault in two scenarios, at its first call and at some others."""
    dice = random.Random(fault)
    for name in dice.sample(sorted(SCENARIOS), 2):
        ordeal = ordeals(name)
        calls = struck_calls(ordeal, fault)
        for at in {1, *(dice.randint(1, calls) for _ in range(SAMPLE))}:
            survive(ordeal, fault, at)


@pytest.mark.parametrize(("name", "fault"), [("one pass", "EIO, though it was done"), ("over old shards", "EIO")])
def test_the_last_calls_of_all(ordeals, name, fault):
    """Where a name is given and the journal removed most is at stake."""
    ordeal = ordeals(name)
    calls = struck_calls(ordeal, fault)
    for at in range(max(calls - 10, 1), calls + 1):
        survive(ordeal, fault, at)


def test_beyond_the_last_call_nothing_is_struck(ordeals):
    ordeal = ordeals("one pass")
    assert not survive(ordeal, "EIO", struck_calls(ordeal, "EIO") + 10)
