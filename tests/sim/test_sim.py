"""Whole clusters, thousands of faults: every seed keeps its promises. A failure prints the seed and how to replay it."""

from __future__ import annotations

import pytest

from tests.sim.cluster import run_seed

SEEDS = 300
HOSTILE_SEEDS = 100
CHUNK = 50


@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_cluster_keeps_its_promises_and_ends(first: int) -> None:
    outcomes = [run_seed(seed, hostile=False).outcome for seed in range(first, first + CHUNK)]
    assert outcomes.count("succeeded") > CHUNK // 2  # faults are survived, not only noticed


@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(0, HOSTILE_SEEDS, CHUNK))
def test_lost_doubled_and_reordered_messages_never_break_safety(first: int) -> None:
    for seed in range(first, first + CHUNK):
        run_seed(seed, hostile=True)


def test_a_seed_replays_itself() -> None:
    assert run_seed(7) == run_seed(7)
