"""`kill -9` and power cuts: a resumed run gives the same bytes, a final name is never partial.

Here a sample; `make faults` kills hundreds of times.
"""

from __future__ import annotations

import random

from faults.killing import HOW, killed_at, killed_by_a_timer, random_moments, without_power


def test_killed_at_any_call_and_resumed(ordeal):
    dice = random.Random(ordeal.name)
    for _ in range(4):
        assert killed_at(ordeal, random_moments(ordeal, dice, 1)) == 1


def test_killed_at_one_of_the_last_calls(ordeal):
    """There names are given and the journal goes."""
    dice = random.Random(ordeal.name)
    assert sum(killed_at(ordeal, [(at, dice.choice(HOW))]) for at in dice.sample(range(ordeal.calls - 20, ordeal.calls), 4))


def test_the_resume_is_killed_too_and_its_resume(ordeal):
    dice = random.Random(ordeal.name)
    assert sum(killed_at(ordeal, random_moments(ordeal, dice, 4)) for _ in range(2)) > 2


def test_power_cuts(ordeal):
    for seed in range(4):
        assert without_power(ordeal, seed, 1 + seed % 3)


def test_killed_from_outside(ordeals):
    """The real program, killed by a timer."""
    killed_by_a_timer(ordeals("shards"), [0.45, 0.6, 0.8])
    killed_by_a_timer(ordeals("learned"), [0.7])
