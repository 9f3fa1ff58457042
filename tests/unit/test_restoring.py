"""Transcripts of the controller when no worker holds the state any more."""

from __future__ import annotations

from elastic.domain import Prepared
from tests.unit.controllers import A, B, Job

A2, B2 = "n0/0.2", "n1/0.2"


def lost(**settings: int) -> Job:
    """Two nodes whose workers have committed step 3, and both have died."""
    job = Job(**{"snapshot_every": 1, **settings})
    job.running("n0", "n1")
    job.exits(A)
    assert job.exits(B)[:4] == [
        "ledger workers-lost",
        "ledger restoring",
        "n0#1: find snapshots",
        "n1#1: find snapshots",
    ]
    return job


def chosen(job: Job) -> None:
    """Both nodes hold all slices of their workers of step 3."""
    assert job.holds("n0", (3, 1, (0,)), (2, 1, (0,))) == []
    assert job.holds("n1", (3, 1, (1,)), (2, 1, (1,))) == [
        "ledger snapshot-chosen",
        "n0#1: assemble step 3 of generation 1",
        "n1#1: assemble step 3 of generation 1",
    ]


def test_all_workers_die_and_new_ones_go_on_from_memory() -> None:
    job = lost()
    assert job.machine.state == "restoring"
    chosen(job)
    job.join(A2)
    job.join(B2)
    assert job.assembled("n0") == []
    assert job.assembled("n1") == [
        "ledger generation-opened",
        f"{A2}: prepare 3 FENCE [{A2} {B2}]",
        f"{B2}: prepare 3 FENCE [{A2} {B2}]",
    ]
    assert job.prepare(3, 0, A2, B2, has_state=False) == [
        "ledger generation-committed",
        f"{A2}: commit 3 from memory, step 3 of generation 1",
        f"{B2}: commit 3 from memory, step 3 of generation 1",
    ]
    job.switch(3, 0, A2, B2)
    job.train(3, 4, A2, B2)
    assert job.machine.state == "running" and job.machine.step_committed == 4
    assert [incident.steps_redone for incident in job.machine.incidents.newest()] == [1, 1]


def test_slices_of_different_steps_are_not_mixed_and_what_came_later_is_redone() -> None:
    job = lost()
    job.holds("n0", (3, 1, (0,)), (2, 1, (0,)))
    assert job.holds("n1", (2, 1, (1,)))[1:] == [
        "n0#1: assemble step 2 of generation 1",
        "n1#1: assemble step 2 of generation 1",
    ]
    job.join(A2)
    job.join(B2)
    job.assembled("n0", "n1")
    job.prepare(3, 0, A2, B2, has_state=False)
    assert job.machine.step_committed == 2
    assert job.machine.incidents.newest()[-1].steps_redone == 2


def test_without_any_snapshot_the_job_ends_and_says_so() -> None:
    job = lost()
    job.holds("n0", (3, 1, (0,)))
    assert job.holds("n1")[-1] == "END failed"
    assert "every copy of the training state was lost after step 3" in job.machine.reason
    assert "cannot be had" in job.machine.reason


def test_where_snapshots_are_off_nobody_is_asked() -> None:
    job = Job()
    job.running("n0", "n1")
    job.exits(A)
    assert job.exits(B)[-1] == "END failed"
    assert "no snapshot was taken" in job.machine.reason


def test_before_the_first_committed_step_the_world_forms_anew() -> None:
    job = Job(snapshot_every=1)
    job.attach("n0")
    job.attach("n1")
    job.join(A)
    job.join(B)
    job.prepare(1, 0, A, B)
    job.exits(A)
    assert "ledger job-unfounded" in job.exits(B)


def test_an_agent_that_does_not_answer_is_waited_for_as_long_as_it_is_there() -> None:
    job = lost()
    job.holds("n0", (3, 1, (0, 1)))
    assert "ledger snapshot-chosen" not in job.tick(5.0)
    job.silent = frozenset(("n1",))
    assert "ledger snapshot-chosen" in job.tick(2.5)


def test_a_node_that_cannot_assemble_does_not_keep_the_others() -> None:
    job = lost()
    chosen(job)
    job.join(A2)
    job.join(B2)
    job.assembled("n1", refusal="a slice is gone")
    assert job.assembled("n0")[1:] == [f"{A2}: prepare 3 FENCE [{A2}]"]


def test_what_nobody_can_assemble_gives_way_to_an_older_one_and_the_search_ends() -> None:
    job = lost()
    for step in (3, 3, 2, 2):
        job.holds("n0", (3, 1, (0,)), (2, 1, (0,)))
        assert f"n0#1: assemble step {step} of generation 1" in job.holds("n1", (3, 1, (1,)), (2, 1, (1,)))
        assert job.assembled("n0", refusal="a slice is gone") == ["ledger snapshot-refused"]
        assert "n0#1: find snapshots" in job.assembled("n1", refusal="a slice is gone")
    chosen(job)  # there is nothing else
    job.assembled("n0", refusal="a slice is gone")
    assert job.assembled("n1", refusal="a slice is gone")[-1] == "END failed"
    assert "no agent could restore what was found, 5 times in a row" in job.machine.reason


def test_a_loss_while_the_world_forms_begins_the_search_again() -> None:
    job = lost()
    chosen(job)
    job.join(A2)
    job.join(B2)
    job.assembled("n0", "n1")
    job.say(A2, Prepared(3, 0, 0, False))
    assert "n0#1: find snapshots" in job.exits(B2)


def test_an_agent_that_attaches_anew_is_asked_again() -> None:
    job = lost()
    job.holds("n0", (3, 1, (0,)))
    assert "n0#1: find snapshots" in job.attach("n0") + job.tick(0.5)


def test_a_world_that_may_be_whole_out_of_reach_is_waited_for_first() -> None:
    job = Job(snapshot_every=1)
    job.running("n0", "n1")
    job.silent = frozenset(("n0", "n1"))
    lines = job.tick(4.0)
    assert "ledger job-waits" in lines and "ledger restoring" not in lines


def test_a_controller_that_restarts_remembers_that_steps_were_lost() -> None:
    job = lost()
    job.holds("n0", (2, 1, (0,)))
    job.holds("n1", (2, 1, (1,)))
    job.join(A2)
    job.join(B2)
    job.assembled("n0", "n1")
    job.prepare(3, 0, A2, B2, has_state=False)
    assert job.restarted().machine.step_committed == 2


def test_a_world_that_is_protected_less_well_than_was_asked_for_is_told_of_once() -> None:
    def told(**code: int) -> list[list[str]]:
        job = Job(snapshot_every=1, **code)
        job.running("n0", "n1")
        return [data["gaps"] for kind, data in job.ledger if kind == "protection-changed"]

    assert told() == told(data_shards=1, parity_shards=1) == []
    ((gap,),) = told(data_shards=2, parity_shards=1)
    assert "2 nodes are no groups of 3" in gap
