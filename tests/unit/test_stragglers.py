"""Which workers are slow, and when it pays to relieve them."""

from __future__ import annotations

import pytest

from monitoring.stragglers import CALM_STEPS, SEEN_STEPS, WINDOW_STEPS, ComputeClock, Rental, speeds


def test_a_worker_is_measured_over_a_whole_window_of_one_world() -> None:
    clock = ComputeClock()
    for step in range(1, WINDOW_STEPS):
        clock.note(1, step, 2.0)
    assert clock.median_s(1) is None
    clock.note(1, WINDOW_STEPS - 1, 9.0)  # said again
    assert clock.median_s(1) is None
    clock.note(1, WINDOW_STEPS, 50.0)
    assert clock.median_s(1) == 2.0, "one slow step is noise"
    for step in range(1, SEEN_STEPS):
        clock.note(1, WINDOW_STEPS + step, 3.0 if step == 1 else 4.0)
    assert (clock.median_s(1), clock.newest_s()) == (3.0, 4.0), "it became slow in the midst of a step"
    clock.note(2, 2 * WINDOW_STEPS, 1.0)
    assert clock.median_s(1) is None and clock.median_s(2) is None, "another world, another share of the work"


def test_what_a_worker_has_to_do_is_divided_out_before_it_is_compared() -> None:
    assert speeds({0: 1.0, 1: 4.0, 2: 2.0}, {0: 0.5, 1: 2.0, 2: 1.0}) == {}
    found = speeds({0: 1.0, 1: 1.0, 2: 3.0, 3: 1.1}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0})
    assert found == {2: pytest.approx(1 / 3)}, "a tenth more is unremarkable"
    assert speeds({0: 5.0}, {0: 1.0}) == {}, "nobody to compare with"
    assert speeds({0: 5.0, 1: 1.0, 2: 1.0}, {0: 0.0, 1: 1.0, 2: 1.0}) == {}, "who has nothing to do is not slow"


def test_layers_move_once_waiting_has_cost_as_much() -> None:
    rental = Rental()
    assert not rental.is_due(100, gain_s=0.1, cost_s=1.0)
    assert not rental.is_due(109, gain_s=0.1, cost_s=1.0)
    assert rental.is_due(110, gain_s=0.1, cost_s=1.0)
    rental.buy(110)
    assert not rental.is_due(120, gain_s=0.1, cost_s=1.0), "it begins anew"
    assert not rental.is_due(135, gain_s=0.1, cost_s=1.0), "and the second time costs twice as much"
    assert rental.is_due(140, gain_s=0.1, cost_s=1.0)
    rental.end()
    assert not rental.is_due(200, gain_s=0.1, cost_s=1.0)


def test_moves_of_long_ago_are_forgotten() -> None:
    rental = Rental()
    for step in (10, 20, 30):
        rental.buy(step)
    assert not rental.is_due(80, gain_s=0.1, cost_s=1.0)
    assert not rental.is_due(129, gain_s=0.1, cost_s=1.0), "three times: eight times as dear"
    assert rental.is_due(130, gain_s=0.1, cost_s=1.0), "two are left: four times"
    rental.buy(30 + 3 * CALM_STEPS)
    assert (rental.bought, rental.bought_step) == (1, 30 + 3 * CALM_STEPS)


def test_what_was_lost_before_it_was_seen_counts() -> None:
    rental = Rental()
    assert not rental.is_due(100, 0.1, 1.0, seen_steps=6)
    assert not rental.is_due(103, 0.1, 1.0, seen_steps=6)
    assert rental.is_due(104, 0.1, 1.0, seen_steps=6)


def test_it_is_looked_at_every_few_steps_and_after_the_job_went_back() -> None:
    rental = Rental()
    assert [step for step in range(4, 17) if rental.looks(step)] == [4, 8, 12, 16]
    assert rental.looks(3), "the job went back"
    assert not rental.looks(4)
    assert rental.looks(4, is_news=True), "others are slow"
    assert [rental.measures(step) for step in (4, 4, 5, 3)] == [True, False, True, True], "each step once"
