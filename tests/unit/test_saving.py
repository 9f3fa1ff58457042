"""Transcripts of the controller with a durable tier."""

from __future__ import annotations

from typing import Any

from controller.events import AgentSaid, SaveAsked, StopAsked
from elastic.domain import AgentMessage, CheckpointFound, CheckpointSaved, Registered
from tests.unit.controllers import SPEC, A, B, Job

A2, B2 = "n0/0.2", "n1/0.2"
FOUND = CheckpointFound(1, "disk/40", 40, 7)


def durable(**settings: Any) -> Job:
    return Job(**{"snapshot_every": 1, "checkpoint_target": "disk", **settings})


def hear(job: Job, node: str, message: AgentMessage) -> list[str]:
    return job.feed(AgentSaid(job.machine.nodes[node].incarnation, message))


def registered(found: CheckpointFound, **settings: Any) -> Job:
    """Two nodes whose workers have registered, and one agent has looked for a checkpoint."""
    job = durable(**settings)
    job.attach("n0")
    job.attach("n1")
    job.say(A, Registered(SPEC))
    assert job.say(B, Registered(SPEC))[-1] == "n0#1: find checkpoint"
    hear(job, "n0", found)
    return job


def trained(**settings: Any) -> Job:
    """A job that began without a checkpoint and has a stable snapshot of step 3."""
    job = registered(CheckpointFound(1), **settings)
    job.tick(0.5)
    job.prepare(1, 0, A, B)
    job.switch(1, 0, A, B)
    job.train(1, 5, A, B)
    job.heartbeat(A, 1, 5, stable=3)
    return job


def saved(job: Job, refusal: str = "") -> list[str]:
    saving = job.machine.saving
    assert saving is not None
    answer = CheckpointSaved(saving.number, 3, "disk/3") if not refusal else CheckpointSaved(saving.number, refusal=refusal)
    return hear(job, "n0", answer)


def test_without_a_checkpoint_the_first_world_begins_at_step_0() -> None:
    job = registered(CheckpointFound(1, passed_over=("disk/9 is half-written.",)))
    assert f"{A}: prepare 1 FOUND [{A} {B}]" in job.tick(0.5)
    assert [data for kind, data in job.ledger if kind == "checkpoint-passed-over"] != []


def test_a_first_world_begins_with_the_newest_checkpoint_once_all_nodes_have_read_it() -> None:
    job = registered(FOUND)
    assert job.assembled("n0") == []
    assert job.tick(0.5) == []
    job.assembled("n1")
    assert f"{A}: prepare 1 FOUND [{A} {B}]" in job.tick(0.5)
    assert f"{B}: commit 1 from memory, step 40 of generation 7" in job.prepare(1, 0, A, B)
    assert job.machine.step_committed == 40


def test_a_node_that_cannot_read_the_checkpoint_ends_the_job_before_it_begins() -> None:
    job = registered(FOUND)
    job.assembled("n0", refusal="disk/40 is not seen from this node")
    assert "END failed" in job.tick(0.5)
    assert "not seen from this node" in job.machine.reason


def test_another_jobs_checkpoints_end_the_job_before_it_begins() -> None:
    job = registered(CheckpointFound(1, refusal="disk holds the checkpoints of job 'x'"))
    assert job.machine.outcome == "failed" and "job 'x'" in job.machine.reason


def test_a_controller_that_restarts_before_the_first_world_looks_again() -> None:
    job = registered(FOUND).restarted()
    assert not job.machine.looked and job.machine.saved_step == 40


def test_members_that_never_read_the_checkpoint_hold_no_state() -> None:
    job = registered(FOUND)
    job.assembled("n0", "n1")
    job.tick(0.5)
    job.prepare(1, 0, A, B)
    job.exits(B)
    assert "ledger restoring" in job.prepare(2, 0, A)


def test_a_checkpoint_is_written_when_it_is_due() -> None:
    job = trained(checkpoint_every=3)
    assert job.tick(0.5) == ["ledger redundancy-restored", "n0#1: save checkpoint"]
    assert job.tick(0.5) == []
    assert saved(job) == ["ledger checkpoint-saved"]
    job.heartbeat(A, 1, 8, stable=5)
    assert job.tick(0.5) == []
    job.heartbeat(A, 1, 9, stable=6)
    assert job.tick(0.5) == ["n0#1: save checkpoint"]


def test_a_failure_is_told_and_tried_again_later() -> None:
    job = trained(checkpoint_every=3)
    job.tick(0.5)
    assert saved(job, "the disk is full") == ["ledger checkpoint-failed"]
    assert job.machine.save_fault == "the disk is full" and job.machine.state == "running"
    assert job.tick(10.0) == []
    assert job.tick(15.0) == ["n0#1: save checkpoint"]


def test_a_node_that_is_lost_while_it_writes_is_a_failure_too() -> None:
    job = trained(checkpoint_every=3)
    job.tick(0.5)
    job.silent = frozenset(("n0",))
    assert "ledger checkpoint-failed" in job.tick(4.0)


def test_a_person_gets_one_on_demand_and_a_reason_where_that_cannot_be() -> None:
    job = trained()
    assert job.feed(SaveAsked()) == ["n0#1: save checkpoint"]
    assert job.feed(SaveAsked()) == []  # it is on its way
    assert "--checkpoint-dir" in Job().machine.save_refusal()
    assert "not running" in durable().machine.save_refusal()


def test_a_stop_writes_a_checkpoint_first() -> None:
    job = trained()
    assert job.feed(StopAsked("enough")) == ["n0#1: save checkpoint"]
    assert saved(job)[-1] == "END stopped"
    assert job.machine.reason == "enough; a checkpoint of step 3 is at disk/3"


def test_a_stop_does_not_wait_for_ever() -> None:
    job = trained()
    job.feed(StopAsked("enough"))
    assert "END stopped" in job.tick(31.0)


def test_a_job_that_loses_everything_goes_on_from_its_checkpoint() -> None:
    job = trained()
    job.feed(SaveAsked())
    saved(job)
    job.exits(A)
    job.exits(B)
    job.holds("n0")
    assert job.holds("n1") == ["n0#1: find checkpoint"]
    assert job.machine.restoring is not None
    answer = CheckpointFound(job.machine.restoring.number, "disk/3", 3, 1)
    assert hear(job, "n0", answer)[1:] == ["n0#1: assemble step 3 from disk/3", "n1#1: assemble step 3 from disk/3"]
    job.join(A2)
    job.join(B2)
    assert f"{A2}: prepare 3 FENCE [{A2} {B2}]" in job.assembled("n0", "n1")
    job.prepare(3, 0, A2, B2, has_state=False)
    assert job.machine.step_committed == 3
