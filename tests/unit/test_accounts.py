"""Where a job's time went: every second once, in agreement with the ledger, also after a restart of the controller."""

from __future__ import annotations

import random

import pytest

from monitoring.accounts import HOUR_S, Accounts, Reason


def charge(accounts: Accounts, *spans: tuple[float, Reason | None], recovery: bool = False) -> None:
    now = accounts.charged_at or 0.0
    accounts.charge(now, None, is_recovery=False, steps=0)
    for seconds, reason in spans:
        now += seconds
        accounts.charge(now, reason, is_recovery=recovery, steps=0)


def test_every_second_is_charged_once() -> None:
    accounts = Accounts()
    charge(accounts, (8.0, Reason.STARTUP), (90.0, None))
    accounts.found(1.5)
    charge(accounts, (0.5, Reason.REGROUP), (0.25, Reason.MOVE), (3.0, Reason.REDO), recovery=True)
    assert accounts.elapsed_s == pytest.approx(101.75)
    assert accounts.productive_s == 0.0 and accounts.badput_s == {Reason.STARTUP: 8.0}, "the rest is not settled yet"
    accounts.committed()
    cost = accounts.recovered(step_s=2.0)
    assert cost == {Reason.DETECT: 1.5, Reason.REGROUP: 0.5, Reason.MOVE: 0.25, Reason.REDO: 1.0}
    assert accounts.elapsed_s == pytest.approx(101.75) and accounts.productive_s == pytest.approx(90.5)
    assert accounts.unsettled_s == 0.0
    assert sum(cost.values()) == pytest.approx(1.5 + 3.75 - 2.0)  # what the ledger says of the incident


def test_a_recovery_shorter_than_a_step_costs_nothing() -> None:
    accounts = Accounts()
    charge(accounts, (10.0, None))
    charge(accounts, (0.2, Reason.REGROUP), recovery=True)
    accounts.committed()
    assert sum(accounts.recovered(step_s=1.0).values()) == 0.0
    assert accounts.productive_s == pytest.approx(10.2)


def test_an_evaluation_is_no_step() -> None:
    accounts = Accounts()
    charge(accounts, (10.0, None))
    accounts.committed()
    charge(accounts, (30.0, None))
    accounts.went_aside(Reason.EVALUATION, 28.0)
    accounts.committed()
    accounts.went_aside(Reason.EVALUATION, 28.0)  # as another worker says it of the same time
    assert accounts.productive_s == pytest.approx(12.0) and accounts.badput_s == {Reason.EVALUATION: pytest.approx(28.0)}


def test_steps_trained_while_no_controller_was_here_were_productive() -> None:
    accounts = Accounts()
    charge(accounts, (100.0, None))
    accounts.committed()
    charge(accounts, (1.5, None))
    after = Accounts()
    after.restore(accounts.written(step=50, step_s=2.0, unix_s=1000.0))
    after.went_away(30.0)
    charge(after, (1.0, Reason.CONTROLLER_AWAY))
    assert after.elapsed_s == pytest.approx(132.5)
    after.came_back(step=60)
    after.committed()
    assert after.productive_s == pytest.approx(121.5) and after.badput_s[Reason.CONTROLLER_AWAY] == pytest.approx(11.0)
    assert after.elapsed_s == pytest.approx(132.5)


def test_what_is_settled_never_becomes_less() -> None:
    """Whatever happens in whatever order: a counter that falls would be taken for one that began anew."""
    for seed in range(200):
        chance = random.Random(seed)
        accounts = Accounts(charged_at=0.0)
        before: dict[str, float] = {}
        now = 0.0
        for _ in range(60):
            now += chance.random() * 5
            accounts.charge(now, chance.choice([None, *Reason]), is_recovery=chance.random() < 0.5, steps=0)
            match chance.randrange(6):
                case 0:
                    accounts.committed()
                case 1:
                    accounts.found(chance.random() * 5)
                case 2:
                    accounts.recovered(chance.random() * 3)
                case 3:
                    accounts.came_back(chance.randrange(3))
                case 4:
                    accounts.went_aside(Reason.BUSY, chance.random() * 4)
                case 5:
                    written = accounts.written(1, 1.0, 0.0)
                    accounts = Accounts(charged_at=now)
                    accounts.restore(written)
            settled = {"productive": accounts.productive_s, **accounts.badput_s}
            assert all(settled.get(key, 0.0) >= value - 1e-4 for key, value in before.items()), seed
            assert accounts.elapsed_s == pytest.approx(now, abs=1e-3), seed
            before = dict(settled)
        accounts.ended()
        assert accounts.unsettled_s == 0.0 and accounts.elapsed_s == pytest.approx(now, abs=1e-3)


def test_the_last_hour_shows_what_the_whole_hides() -> None:
    accounts = Accounts()
    charge(accounts, *[(60.0, None)] * 600, *[(60.0, Reason.RESTORE)] * 60)
    assert accounts.goodput() == pytest.approx(600 / 660)
    assert accounts.goodput(last_hour=True) == pytest.approx(0.0, abs=0.02)
    assert accounts.elapsed_s - accounts.marks[0].elapsed_s <= HOUR_S + 60.0
