"""Three hundred random clusters, a hundred with garbled streams, and the seeds that once found something."""

from __future__ import annotations

import pytest

from tests.sim.cluster import run_seed
from tests.sim.kept_seeds import KEPT_SEEDS

BATCH = 25


@pytest.mark.parametrize("first", range(0, 300, BATCH))
def test_every_promise_holds_whatever_fails(first: int) -> None:
    for seed in range(first, first + BATCH):
        run_seed(seed)


@pytest.mark.parametrize("first", range(0, 100, BATCH))
def test_garbled_streams_break_no_promise_of_safety(first: int) -> None:
    for seed in range(first, first + BATCH):
        run_seed(seed, hostile=True)


@pytest.mark.parametrize("seed", KEPT_SEEDS, ids=lambda seed: f"{seed}: {KEPT_SEEDS[seed]}")
def test_what_was_once_found_stays_found(seed: int) -> None:
    run_seed(seed)


def test_a_seed_is_the_same_run_every_time() -> None:
    assert run_seed(11) == run_seed(11)
