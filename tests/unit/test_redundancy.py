"""Transcripts of the controller: how long no snapshot of the present world is safe, and what waits for one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.events import DrainAsked
from controller.redundancy import DRAIN_PATIENCE_S, restores_per_s
from controller.views import status
from elastic.cli.options import AUTO_REDUNDANCY, Redundancy, automatic_redundancy
from elastic.domain import CollectiveFailed, Leaving, Prepared
from tests.unit import controllers
from tests.unit.controllers import A, B, Job

A2 = "n0/0.2"
C = "n2/0.1"


def drained(**settings: int) -> Job:
    """The only worker of a node that is drained has left."""
    job = Job(**settings)
    job.running("n0", "n1")
    job.feed(DrainAsked("n1"))
    job.prepare(2, 3, A, B)
    job.switch(2, 4, A)
    return job


def test_a_drained_node_stays_until_the_others_have_a_safe_snapshot() -> None:
    job = drained(snapshot_every=1)
    job.heartbeat(A, 2, 5, stable=4)  # of the world before
    assert job.tick(5.0) == []
    job.heartbeat(A, 2, 6, stable=5)
    assert job.tick(0.5) == ["ledger redundancy-restored", "n1#1: shut down with 0, drained"]


def test_a_drained_node_does_not_stay_for_ever() -> None:
    job = drained(snapshot_every=1)
    lines = job.tick(DRAIN_PATIENCE_S + 2.0)
    assert lines == ["n1#1: shut down with 0, drained"]


def test_without_snapshots_there_is_nothing_to_wait_for() -> None:
    assert drained(snapshot_every=0).tick(0.5) == ["n1#1: shut down with 0, drained"]


def test_vulnerable_seconds_are_counted_and_survive_a_restart() -> None:
    job = Job(snapshot_every=1)
    job.running("n0", "n1")
    began = job.now
    job.tick(2.0)
    reply = status(job.machine, job.now)
    assert reply.is_vulnerable and reply.vulnerable_s == pytest.approx(job.now - began)
    job.heartbeat(A, 1, 4, stable=3)
    job.tick(0.5)
    seconds = status(job.machine, job.now).vulnerable_s
    assert not status(job.machine, job.now).is_vulnerable and seconds == pytest.approx(2.5)
    job.tick(3.0)
    assert status(job.machine, job.now).vulnerable_s == seconds
    job.exits(B)
    assert status(job.machine, job.now).vulnerable_s == seconds, "until the loss is settled nothing has changed"
    job.prepare(2, 4, A)
    job.tick(1.0)
    assert status(job.machine, job.now).vulnerable_s == pytest.approx(seconds + 1.0)
    assert job.restarted().machine.vulnerable_s == seconds


def test_a_stable_step_of_before_a_restore_is_not_taken_for_a_new_one() -> None:
    job = Job(snapshot_every=1)
    job.running("n0", "n1")
    job.heartbeat(A, 1, 9, stable=8)
    job.tick(0.5)
    job.exits(A)
    job.exits(B)
    job.holds("n0", (5, 1, (0,)))
    job.holds("n1", (5, 1, (1,)))
    job.join(A2)
    job.join("n1/0.2")
    job.assembled("n0", "n1")
    job.prepare(3, 0, A2, "n1/0.2", has_state=False)
    job.tick(1.0)
    assert job.machine.vulnerable_since is not None
    assert status(job.machine, job.now).stable == -1 or status(job.machine, job.now).stable <= 5


def test_a_job_that_goes_back_often_takes_snapshots_more_often() -> None:
    job = Job(snapshot_every=1)
    job.running("n0", "n1")
    assert restores_per_s(job.machine, job.now) == pytest.approx(1 / 3600, rel=0.01)
    job.machine.restores = 3
    assert restores_per_s(job.machine, job.now + 3600) == pytest.approx(4 / 7200, rel=0.01)


def test_auto_takes_the_code_that_the_nodes_allow() -> None:
    assert Redundancy().convert("auto", None, None) == AUTO_REDUNDANCY
    codes = [automatic_redundancy(nodes) for nodes in (1, 2, 3, 5, 6, 40)]
    assert codes == [(0, 0), (1, 1), (2, 1), (4, 1), (4, 2), (4, 2)]


# -- state that is cut over the workers ------------------------------------------------------------------------------


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controllers, "SPEC", replace(controllers.SPEC, shard_optimizer=True))


def lost_one(committed: int = 3) -> Job:
    job = Job(snapshot_every=1)
    job.running("n0", "n1")
    assert f"{A}: prepare 2 FENCE [{A}]" in job.exits(B)
    lines = job.prepare(2, committed, A)
    assert lines == ["ledger restoring", "n0#1: find snapshots", "n1#1: find snapshots"]
    return job


@pytest.mark.usefixtures("sharded")
def test_a_survivor_goes_back_to_a_snapshot_with_all_others() -> None:
    job = lost_one()
    job.holds("n0", (3, 1, (0,)), (2, 1, (0,)))
    job.holds("n1", (2, 1, (1,)))
    job.join("n1/0.2")
    job.assembled("n0")
    assert f"{A}: prepare 3 FENCE [{A} n1/0.2]" in job.assembled("n1")
    job.say(A, Prepared(3, 3, 3, True))
    lines = job.prepare(3, 0, "n1/0.2", has_state=False)
    assert f"{A}: commit 3 from memory, step 2 of generation 1" in lines
    assert job.machine.step_committed == 2
    job.switch(3, 2, A, "n1/0.2")
    job.train(3, 3, A, "n1/0.2")
    assert [incident.steps_redone for incident in job.machine.incidents.newest()] == [2]


@pytest.mark.usefixtures("sharded")
def test_a_break_with_nobody_lost_goes_back_too() -> None:
    job = Job(snapshot_every=1)
    job.running("n0", "n1")
    job.say(A, CollectiveFailed(1, 4, "reset"))
    job.tick(0.5)
    assert f"{A}: prepare 2 FENCE [{A} {B}]" in job.probed()
    assert "ledger restoring" in job.prepare(2, 3, A, B)


@pytest.mark.usefixtures("sharded")
def test_before_the_first_step_nothing_is_lost() -> None:
    job = Job(snapshot_every=1)
    for node in ("n0", "n1"):
        job.attach(node)
    for worker in (A, B):
        job.say(worker, controllers.Registered(controllers.SPEC))
    job.prepare(1, 0, A, B)
    job.switch(1, 0, A, B)
    job.exits(B)
    assert job.prepare(2, 0, A)[-1] == f"{A}: commit 2 after 0, joiners []"


@pytest.mark.usefixtures("sharded")
def test_after_the_last_step_nothing_is_needed() -> None:
    job = Job(snapshot_every=1)
    job.running("n0", "n1")
    job.say(A, Leaving(3, "digest", 12))
    job.exits(B)
    assert job.machine.attempt is None or job.prepare(2, 3, A)[-1].startswith(f"{A}: commit 2 after 3")


@pytest.mark.usefixtures("sharded")
def test_what_is_not_enough_is_not_looked_at_again_before_more_is_there() -> None:
    job = Job(nodes_max=3, snapshot_every=1)
    job.running("n0", "n1", "n2")
    job.silent = frozenset(("n2",))
    job.tick(3.0)
    job.prepare(2, 3, A, B)
    job.holds("n0", (3, 1, (0,)))
    assert "ledger job-waits" in [*job.holds("n1", (3, 1, (1,))), *job.tick(3.0)]
    assert job.tick(10.0) == []
    lines = job.attach("n2", number=2)
    assert f"{A}: prepare 3 FENCE [{A} {B}]" in [*lines, *job.tick(3.0)]
