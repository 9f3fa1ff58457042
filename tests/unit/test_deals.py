"""Rounds that are dealt by speed: each sample is used once, whoever is lost, late or comes, and a worker keeps its number."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.domain import Member, Plan, PlanKind
from elastic.sampler import SlotSampler
from elastic.sync.dealer import Dealer
from elastic.sync.deals import NOBODY, Books, Deals, DealtSampler, deal, expected_s, shares

SLOTS, BATCH, EVERY = 4, 2, 3


def sampler_of(dataset_size: int = 61) -> SlotSampler:
    return SlotSampler(dataset_size, BATCH * EVERY, SLOTS, 7, True, False)


def plan_of(members: list[str], generation: int, kind: PlanKind = PlanKind.FENCE) -> Plan:
    return Plan(
        generation=generation,
        kind=kind,
        members=tuple(Member(worker=name, node="n", rank=rank) for rank, name in enumerate(members)),
        owners=tuple(slot % len(members) for slot in range(SLOTS)),
    )


@given(st.integers(0, 60), st.lists(st.one_of(st.just(0.0), st.floats(0.01, 100)), min_size=1, max_size=6))
def test_shares_are_whole_and_all_of_it(total: int, weights: list[float]) -> None:
    if not any(weights):
        return
    found = shares(total, weights)
    assert sum(found) == total
    assert all(part == 0 for part, weight in zip(found, weights, strict=True) if not weight)
    weighing = [part for part, weight in zip(found, weights, strict=True) if weight]
    assert min(weighing) >= min(1, total // len(weighing))


def test_the_faster_takes_more_and_a_newcomer_as_much_as_all_together() -> None:
    books = Books(1, workers=("a", "b", "c", NOBODY), seconds=(0.1, 0.2, 0.0, 0.0), unreported=((), (), (), ()))
    dealer = Dealer(sampler_of(10_000), EVERY)
    dealt = deal(books, ["c", "b", "a"], dealer.sampler, 1, BATCH)
    assert dealt.workers == ("a", "b", "c", NOBODY)
    batches = [size // BATCH for size in dealt.sizes]
    assert sum(batches) == SLOTS * EVERY and batches[3] == 0
    assert batches == [5, 3, 4, 0]  # by 10, 5 and (10 + 5) / 2 a second
    assert expected_s(books, dealt, BATCH) == pytest.approx(3 * 0.2)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_each_sample_is_used_once_whatever_happens(data: st.DataObject) -> None:
    """Workers are lost in a round or between two, come, are late, and some give what they have learnt only now and then."""
    dealer = Dealer(sampler_of(), EVERY)
    nominal = sampler_of()
    members, born, generation = ["w0", "w1", "w2"], 3, 1
    used_by: Counter[int] = Counter()
    seats: dict[str, int] = {}
    rounds = 2 * nominal.steps_per_epoch
    for step in range(1, rounds + 1):
        if data.draw(st.booleans()) and len(members) < SLOTS:
            members.append(f"w{born}")
            born, generation = born + 1, generation + 1
        assert not dealer.take_up(plan_of(members, generation, PlanKind.SWITCH), step, 0)
        dealt = dealer.deals.present
        assert dealt is not None and sum(dealt.sizes) == sum(dealer.sampler.sizes(step))
        for worker in members:
            slot = dealt.slot_of(worker)
            assert slot is not None and seats.setdefault(worker, slot) == slot
        if len(members) > 1 and data.draw(st.booleans()):
            members.pop(data.draw(st.integers(0, len(members) - 1)))
            generation += 1
            assert not dealer.take_up(plan_of(members, generation), step, dealer.generation)
        owners = dealer.owners(plan_of(members, generation), step)
        is_last = step % nominal.steps_per_epoch == 0
        used, weights = [], []
        for slot, size in enumerate(dealer.sampler.sizes(step)):
            pieces = dealer.pieces(step, slot)
            assert sum(len(ids) for _, ids in pieces) == size and owners[slot] < len(members)
            done = len(pieces) if is_last or not size else data.draw(st.integers(1, len(pieces)))
            used.append(sum(len(ids) for _, ids in pieces[:done]))
            weights.append(float(is_last or data.draw(st.booleans())))
        seconds = [0.1 * (1 + slot) if count else 0.0 for slot, count in enumerate(used)]
        before = copy.deepcopy(dealer.deals)
        dealer.sampler.close(used, seconds, [bool(weight) for weight in weights])
        for slot in range(SLOTS):
            used_by.update(dealer.sampler.ids(step, slot))
        assert dealer.sampler.samples(step) == sum(dealer.sampler.sizes(step))
        again = Deals()
        again.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert (again.books, again.present) == (before.books, before.present)
    books = dealer.deals.books
    left = Counter(books.owed) + Counter(sample for ids in books.unreported for sample in ids)
    assert used_by + left == Counter({sample: 2 for sample in range(61)})
    assert dealer.sampler.samples_until(rounds) == used_by.total()


def test_a_round_stays_dealt_through_a_loss_only_if_all_have_it_so() -> None:
    dealer = Dealer(sampler_of(10_000), EVERY)
    dealer.take_up(plan_of(["a", "b", "c"], 1, PlanKind.FOUND), 1, 0)
    first = dealer.deals.present
    assert first is not None and dealer.generation == 1
    assert not dealer.take_up(plan_of(["a", "c"], 2), 1, 1)
    assert dealer.generation == 1 and dealer.sampler.sizes(1) == (first.sizes[0], 0, first.sizes[2], 0)
    assert dealer.owners(plan_of(["a", "c"], 2), 1)[::2] == (0, 1)
    assert not dealer.take_up(plan_of(["a", "c"], 2), 1, 1), "the same world again"
    assert dealer.take_up(plan_of(["a"], 3), 1, 0), "somebody has not, or does not know"
    assert dealer.generation == 3 and sum(dealer.sampler.sizes(1)) == sum(first.sizes)
    assert dealer.take_up(plan_of(["a", "d"], 4, PlanKind.SWITCH), 1, 3), "all who join begin with a deal of their own"
    assert dealer.generation == 4


def test_nothing_is_owed_at_the_end_of_an_epoch() -> None:
    nominal = sampler_of()
    dealer = Dealer(nominal, EVERY)
    for step in range(1, nominal.steps_per_epoch):
        dealer.take_up(plan_of(["a", "b"], 1, PlanKind.FOUND), step, 0)
        sizes = dealer.sampler.sizes(step)
        dealer.sampler.close(sizes, [0.1] * SLOTS, [True] * SLOTS)
    step = nominal.steps_per_epoch
    dealer.take_up(plan_of(["a", "b"], 1, PlanKind.FOUND), step, 0)
    sizes = dealer.sampler.sizes(step)
    dealer.take_up(plan_of(["b"], 2), step, 1)
    assert dealer.sampler.sizes(step) == sizes, "another one computes what was lost"
    assert set(dealer.owners(plan_of(["b"], 2), step)) == {0}
    dealer.begin(step, 0.0)
    assert not dealer.stepped(1e9), "nor is anybody too late then"


def test_schedules_take_as_many_steps_whatever_the_local_ones() -> None:
    dealer = Dealer(sampler_of(10_000), EVERY)
    dealer.take_up(plan_of(["a", "b"], 1, PlanKind.FOUND), 1, 0)
    for count in (1, 2, 3, 5, 12):
        assert sum(dealer.ticks(1, done, count, is_last=done == count) for done in range(1, count + 1)) == EVERY
    assert [dealer.ticks(1, done, 5, is_last=done == 2) for done in (1, 2)] == [0, 3], "it stops after two of five"


def test_a_replica_stops_when_the_others_have_waited_long_enough() -> None:
    dealer = Dealer(sampler_of(10_000), EVERY)
    members = ["a", "b"]
    dealer.take_up(plan_of(members, 1, PlanKind.FOUND), 1, 0)
    dealer.begin(1, 0.0)
    assert not dealer.stepped(1e9), "nothing is known of anybody"
    dealer.sampler.close(dealer.sampler.sizes(1), (0.1, 0.1, 0.0, 0.0), [True] * SLOTS)
    dealer.take_up(plan_of(members, 1, PlanKind.FOUND), 2, 0)
    dealer.begin(2, 10.0)  # six local steps of a tenth of a second for each
    assert not dealer.stepped(11.0)
    assert dealer.stepped(11.2)
    assert dealer.report(1, 4, 4.0).view(3, SLOTS)[:, 1].tolist() == pytest.approx([4, 0.6, 4])
    dealer.sampler.close(dealer.sampler.sizes(2), (1.0, 1.0, 0.0, 0.0), [True] * SLOTS)
    dealer.take_up(plan_of(members, 1, PlanKind.FOUND), 3, 0)
    dealer.begin(3, 20.0)
    assert not dealer.stepped(27.4)
    assert dealer.stepped(27.6)
    dealer.take_up(plan_of(members[:1], 2), 3, 1)
    dealer.begin(3, 20.0)
    assert not dealer.stepped(1e9), "nobody waits"


def test_a_plain_sampler_says_what_is_not_dealt() -> None:
    nominal, dealt = sampler_of(), Dealer(sampler_of(), EVERY).sampler
    assert isinstance(dealt, DealtSampler)
    for step in (1, 2, nominal.steps_per_epoch):
        assert dealt.sizes(step) == nominal.sizes(step) and dealt.ids(step, 1) == nominal.ids(step, 1)
