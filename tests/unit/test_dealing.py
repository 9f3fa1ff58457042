"""Dealing slots: what must hold for every deal, and brute force where the cases are small."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.folds import blocks, plan_fold
from recovery.dealing import deal_afresh, deal_by_speed, deal_orphans

NAMES = tuple(f"w{i}" for i in range(12))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, tuple[str, ...]]:
    """Slots, virtual replicas, workers."""
    slots = draw(st.integers(1, 24))
    replicas = draw(st.integers(1, slots))
    workers = draw(st.integers(1, min(slots, len(NAMES))))
    return slots, replicas, NAMES[:workers]


def loads(owners: tuple[str, ...], workers: tuple[str, ...]) -> list[int]:
    count = Counter(owners)
    return [count[worker] for worker in workers]


@given(layouts())
def test_a_fresh_deal_gives_every_slot_to_a_worker_and_balances_within_one(
    layout: tuple[int, int, tuple[str, ...]],
) -> None:
    slots, replicas, workers = layout
    owners = deal_afresh(slots, replicas, workers)
    assert len(owners) == slots and set(owners) == set(workers)
    assert max(loads(owners, workers)) - min(loads(owners, workers)) <= 1


@given(st.integers(1, 24).flatmap(lambda slots: st.tuples(st.just(slots), st.integers(1, min(slots, 12)))))
def test_a_whole_world_exchanges_one_partial_sum_each(layout: tuple[int, int]) -> None:
    slots, replicas = layout
    owners = deal_afresh(slots, replicas, NAMES[:replicas])
    for block, worker in zip(blocks(slots, replicas), NAMES, strict=False):
        assert {owners[slot] for slot in block} == {worker}
    assert len(plan_fold([NAMES.index(owner) for owner in owners], replicas).terms) == replicas


@given(layouts(), st.data())
def test_after_a_loss_survivors_keep_their_slots_and_balance_within_one(
    layout: tuple[int, int, tuple[str, ...]], data: st.DataObject
) -> None:
    slots, replicas, workers = layout
    owners = deal_afresh(slots, replicas, workers)
    while len(workers) > 1:
        lost = data.draw(st.sets(st.sampled_from(workers), min_size=1, max_size=len(workers) - 1))
        survivors = tuple(worker for worker in workers if worker not in lost)
        dealt = deal_orphans(owners, survivors)
        assert all(new == old for new, old in zip(dealt, owners, strict=True) if old in survivors)
        assert max(loads(dealt, survivors)) - min(loads(dealt, survivors)) <= 1
        owners, workers = dealt, survivors


@given(layouts(), st.data())
def test_newcomers_to_a_broken_step_take_their_share(
    layout: tuple[int, int, tuple[str, ...]], data: st.DataObject
) -> None:
    slots, replicas, workers = layout
    owners = deal_afresh(slots, replicas, workers)
    survivors = tuple(data.draw(st.sets(st.sampled_from(workers), min_size=1)))
    newcomers = tuple(f"new{i}" for i in range(data.draw(st.integers(0, slots - len(survivors)))))
    dealt = deal_orphans(owners, (*survivors, *newcomers))
    assert max(loads(dealt, (*survivors, *newcomers))) - min(loads(dealt, (*survivors, *newcomers))) <= 1


@pytest.mark.parametrize(
    ("slots", "workers"), [(slots, n) for slots in range(1, 7) for n in range(1, min(slots, 4) + 1)]
)
def test_the_longest_worker_is_as_short_as_any_deal_can_make_it(slots: int, workers: int) -> None:
    names = NAMES[:workers]
    best = min(max(loads(deal, names)) for deal in itertools.product(names, repeat=slots))
    for replicas in range(1, slots + 1):
        assert max(loads(deal_afresh(slots, replicas, names), names)) == best


@pytest.mark.parametrize("owners", sorted(set(itertools.product(NAMES[:3], repeat=5)))[::7])
def test_orphans_make_no_worker_longer_than_any_deal_that_keeps_what_is_owned(owners: tuple[str, ...]) -> None:
    if max(loads(owners, NAMES[:3])) - min(loads(owners, NAMES[:3])) > 1:
        return  # no deal of ours looks like this
    survivors = NAMES[1:3]
    orphans = [slot for slot, owner in enumerate(owners) if owner not in survivors]
    best = min(
        max(Counter([*(o for o in owners if o in survivors), *deal]).values())
        for deal in itertools.product(survivors, repeat=len(orphans))
    )
    assert max(Counter(deal_orphans(owners, survivors)).values()) == best


def test_orphans_go_to_the_least_loaded_and_then_to_the_lowest_rank() -> None:
    assert deal_orphans(("a", "a", "b", "c", "c", "c"), ("a", "b")) == ("a", "a", "b", "b", "a", "b")


@given(st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=1, max_size=4), st.integers(1, 9))
def test_by_speed_the_last_one_ends_as_early_as_can_be(found: list[float], slots: int) -> None:
    speeds = dict(zip(NAMES, found, strict=False))
    names = tuple(speeds)
    dealt = deal_by_speed(slots, speeds)
    assert len(dealt) == slots and set(dealt) <= set(names)

    def ends(owners: tuple[str, ...]) -> float:
        return max(owners.count(name) / speeds[name] for name in names)

    counts = (c for c in itertools.product(range(slots + 1), repeat=len(names)) if sum(c) == slots)
    best = min(max(count / speed for count, speed in zip(c, found, strict=True)) for c in counts)
    assert ends(dealt) == best
