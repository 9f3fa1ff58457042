"""Every sample exactly once per data epoch, whoever asks and in whatever order."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.errors import ConfigError
from elastic.sampler import Permutation, SlotSampler


@st.composite
def samplers(draw: st.DrawFn) -> SlotSampler:
    batch_size, slots = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return SlotSampler(
        dataset_size=draw(st.integers(batch_size * slots, 300)),
        batch_size=batch_size,
        slots=slots,
        seed=draw(st.integers(-(2**70), 2**70)),
        shuffle=draw(st.booleans()),
        drop_last=draw(st.booleans()),
    )


def ids_of_epoch(sampler: SlotSampler, epoch: int) -> list[int]:
    first = 1 + epoch * sampler.steps_per_epoch
    return [
        sample
        for step in range(first, first + sampler.steps_per_epoch)
        for slot in range(sampler.slots)
        for sample in sampler.ids(step, slot)
    ]


@given(samplers(), st.integers(0, 3))
def test_an_epoch_holds_every_sample_exactly_once_or_all_but_the_dropped_rest(
    sampler: SlotSampler, epoch: int
) -> None:
    ids = ids_of_epoch(sampler, epoch)
    if not sampler.drop_last:
        assert sorted(ids) == list(range(sampler.dataset_size))
    else:
        whole = sampler.dataset_size // sampler.global_batch_size * sampler.global_batch_size
        assert len(set(ids)) == len(ids) == whole
        assert set(ids) <= set(range(sampler.dataset_size))
        if not sampler.shuffle:
            assert ids == list(range(whole))


@given(samplers(), st.data())
def test_a_slot_depends_on_nothing_but_seed_epoch_step_and_slot(
    sampler: SlotSampler, data: st.DataObject
) -> None:
    step = data.draw(st.integers(1, 5 * sampler.steps_per_epoch))
    slot = data.draw(st.integers(0, sampler.slots - 1))
    twin = SlotSampler(
        sampler.dataset_size,
        sampler.batch_size,
        sampler.slots,
        sampler.seed,
        sampler.shuffle,
        sampler.drop_last,
    )
    for _ in range(3):  # Other questions in between leave no trace.
        sampler.ids(data.draw(st.integers(1, 40)), 0)
    assert twin.ids(step, slot) == sampler.ids(step, slot)


@given(samplers(), st.data())
def test_sizes_agree_with_ids_and_differ_by_at_most_one(sampler: SlotSampler, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, 3 * sampler.steps_per_epoch))
    sizes = sampler.sizes(step)
    assert sizes == tuple(len(sampler.ids(step, slot)) for slot in range(sampler.slots))
    assert sum(sizes) == sampler.samples(step)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    if step % sampler.steps_per_epoch or sampler.drop_last:
        assert sizes == (sampler.batch_size,) * sampler.slots


@given(samplers(), st.integers(1, 10_000))
def test_steps_count_from_one_and_epochs_from_zero(sampler: SlotSampler, step: int) -> None:
    assert sampler.epoch_of(step) == (step - 1) // sampler.steps_per_epoch
    assert sampler.epoch_of(1) == 0
    assert sampler.epoch_of(sampler.steps_per_epoch) == 0
    assert sampler.epoch_of(sampler.steps_per_epoch + 1) == 1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return ids_of_epoch(SlotSampler(1000, 10, 4, seed), epoch)

    orders = [order(seed, epoch) for seed in (0, 1, -1) for epoch in range(4)]
    assert len({tuple(ids) for ids in orders}) == len(orders)
    for one in orders:
        for other in orders:
            if one is not other:  # About one position in 1000 agrees by chance.
                assert sum(a == b for a, b in zip(one, other, strict=True)) < 12


def test_without_shuffling_every_epoch_is_in_order() -> None:
    sampler = SlotSampler(25, 2, 4, seed=9, shuffle=False)
    assert ids_of_epoch(sampler, 0) == ids_of_epoch(sampler, 3) == list(range(25))


def test_a_short_last_batch_is_spread_over_the_slots_earlier_ones_first() -> None:
    sampler = SlotSampler(26, 4, 4, seed=0)
    assert sampler.steps_per_epoch == 2
    assert (sampler.samples(1), sampler.sizes(1)) == (16, (4, 4, 4, 4))
    assert (sampler.samples(2), sampler.sizes(2)) == (10, (3, 3, 2, 2))
    assert SlotSampler(18, 4, 4, seed=0).sizes(2) == (1, 1, 0, 0)
    assert SlotSampler(18, 4, 4, seed=0).ids(2, 3) == ()
    assert SlotSampler(18, 4, 4, seed=0, drop_last=True).steps_per_epoch == 1


def test_the_order_is_the_same_in_every_version_of_the_runtime() -> None:
    # Written down once: a job that resumes on a newer runtime must get the samples that it has not had yet.
    sampler = SlotSampler(10_000_000, 4, 2, seed=1234)
    assert sampler.ids(1, 0) == (6195825, 3574611, 3513952, 5034391)
    assert sampler.ids(1_250_001, 1) == (3783558, 3027554, 8118107, 124677)


def test_the_order_is_uniform() -> None:
    # Where sample 0 lands, which sample comes first, and what follows what, over 4000 epochs.
    size, epochs = 37, 4000
    lands, first, gaps = Counter[int](), Counter[int](), Counter[int]()
    for epoch in range(epochs):
        order = Permutation(size, f"uniform {epoch}".encode()).take(0, size)
        lands[order.index(0)] += 1
        first[order[0]] += 1
        gaps[(order[1] - order[0]) % size] += 1
    assert gaps[0] == 0
    for counts, cells in ((lands, size), (first, size), (gaps, size - 1)):
        expected = epochs / cells
        chi_square = sum((counts[cell] - expected) ** 2 / expected for cell in range(size) if counts[cell])
        assert chi_square < cells + 4 * (2 * cells) ** 0.5  # Mean plus four standard deviations.


@settings(max_examples=60)
@given(st.integers(1, 400), st.binary(max_size=8))
def test_a_permutation_meets_every_element_once(size: int, key: bytes) -> None:
    assert sorted(Permutation(size, key).take(0, size)) == list(range(size))


def test_a_huge_permutation_needs_no_memory_of_its_size() -> None:
    size = 10**10
    permutation = Permutation(size, b"huge")
    images = permutation.take(size - 1000, size)
    assert len(set(images)) == 1000
    assert 0 <= min(images) < size / 4 and size * 3 / 4 < max(images) < size


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            (7, 2, 4, 0),
            "The dataset has 7 samples, fewer than one global batch of 8 (4 slots of 2): use fewer",
        ),
        ((7, 0, 4, 0), "batch_size is 0, but a step needs at least 1: raise it."),
        ((7, 1, 0, 0), "slots is 0, but a step needs at least 1: raise it."),
    ],
)
def test_impossible_sizes_are_refused_in_one_sentence(
    arguments: tuple[int, int, int, int], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        SlotSampler(*arguments)
    assert str(caught.value).startswith(sentence)


def test_steps_and_slots_outside_the_job_are_refused() -> None:
    sampler = SlotSampler(16, 2, 4, seed=0)
    for step, slot in ((0, 0), (1, 4), (1, -1)):
        with pytest.raises(ValueError):
            sampler.ids(step, slot)


def test_it_neither_imports_torch_nor_touches_the_global_random_state() -> None:
    program = (
        "import random, sys; before = random.getstate(); from elastic.sampler import SlotSampler; "
        "SlotSampler(100, 2, 4, 1).ids(3, 1); "
        "assert random.getstate() == before and not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
