"""Random numbers follow from logical coordinates, and looking elsewhere leaves no trace."""

from __future__ import annotations

import random
import time

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.seeding import preserved, seed_everything, seed_of

COORDINATES = st.lists(st.one_of(st.integers(), st.text()), max_size=4).map(tuple)


def draws() -> tuple[list[float], float, list[float]]:
    return torch.rand(3).tolist(), random.random(), numpy.random.rand(3).tolist()


@given(COORDINATES, COORDINATES)
def test_different_places_have_different_seeds(
    one: tuple[int | str, ...], other: tuple[int | str, ...]
) -> None:
    assert 0 <= seed_of(0, *one) < 2**64
    assert (seed_of(0, *one) == seed_of(0, *other)) == (one == other)


def test_places_that_look_alike_are_told_apart() -> None:
    places = [(), (1,), ("1",), ("",), ("ab", "c"), ("a", "bc"), ("a\n1",), ("a", 1), (1, 0), (0, 1)]
    assert len({seed_of(7, *place) for place in places}) == len(places)


def test_seeds_are_the_same_in_every_version_of_the_runtime() -> None:
    assert seed_of(0) == 0x75DFCD439D7D2B84
    assert seed_of(-1, 12, 3, "slot", "ü") == 0x70E269213B3FEC8A


def test_equal_coordinates_give_equal_draws_in_torch_random_and_numpy() -> None:
    seed_everything(5, 10, 3, "slot")
    first = draws()
    draws()
    seed_everything(5, 10, 3, "slot")
    assert draws() == first
    for place in ((6, 10, 3, "slot"), (5, 11, 3, "slot"), (5, 10, 4, "slot"), (5, 10, 3, "fetch")):
        seed_everything(*place)
        for mine, others in zip(first, draws(), strict=True):
            assert mine != others


def test_torch_and_numpy_do_not_draw_the_same_words() -> None:
    seed_everything(5, 10, 3, "slot")
    by_torch = {int(word) & 0x7FFFFFFF for word in torch.randint(0, 2**31, (64,))}
    by_numpy = {int(word) & 0x7FFFFFFF for word in numpy.random.randint(0, 2**32, 128, dtype=numpy.uint32)}
    assert not by_torch & by_numpy


def test_preserved_leaves_every_generator_as_it_was() -> None:
    seed_everything(5, 10, 3, "slot")
    with preserved():
        first = draws()
    assert draws() == first
    seed_everything(5, 10, 3, "slot")
    with pytest.raises(KeyError), preserved():
        seed_everything(0, 0, 0, "evaluation")
        raise KeyError
    assert draws() == first


def test_seeding_costs_little() -> None:
    best_s = 1.0
    for _ in range(20):
        start_s = time.perf_counter()
        for step in range(50):
            seed_everything(1, step, 0, "slot")
        best_s = min(best_s, (time.perf_counter() - start_s) / 50)
    assert best_s < 30e-6
