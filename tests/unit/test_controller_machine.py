"""Transcripts of the controller's machine: what agents and workers say, what is written and ordered."""

from __future__ import annotations

from typing import Any

import pytest

from controller.events import (
    AgentAttached,
    AgentGone,
    AgentSaid,
    DrainAsked,
    StopAsked,
    Tick,
)
from elastic.domain import (
    AgentHello,
    CollectiveFailed,
    Concluded,
    Failed,
    Goodbye,
    Heartbeat,
    Leaving,
    PeersProbed,
    Prepared,
    PrepareFailed,
    Registered,
    Resumed,
    TrainingSpec,
    Warm,
    WorkerMessage,
    WorkerStatus,
)
from tests.unit.controllers import SPEC, A, B, C, Job

# -- the first world -----------------------------------------------------------------------------------------------


def test_the_first_world_forms() -> None:
    job = Job()
    assert job.attach("n0") == [
        "ledger node-attached",
        "n0#1: welcome []",
        "ledger worker-started",
        "n0#1: start n0/0.1",
    ]
    job.attach("n1")
    assert job.say(A, Registered(SPEC)) == []
    assert job.say(B, Registered(SPEC)) == [
        "ledger job-fixed",
        f"{A}: found",
        f"{B}: found",
        "ledger generation-opened",
        f"{A}: prepare 1 FOUND [{A} {B}]",
        f"{B}: prepare 1 FOUND [{A} {B}]",
    ]
    assert job.prepare(1, 0, A) == []
    assert job.prepare(1, 0, B) == [
        "ledger generation-committed",
        f"{A}: commit 1 after 0, joiners []",
        f"{B}: commit 1 after 0, joiners []",
    ]
    assert job.switch(1, 0, A, B) == []
    assert job.machine.state == "running"


def test_fewer_nodes_than_wanted_are_waited_for_a_while() -> None:
    job = Job(nodes_min=1, nodes_max=2, join_timeout_s=5.0)
    job.attach("n0")
    assert job.say(A, Registered(SPEC)) == []
    assert job.tick(4.5) == []
    assert job.tick(1.0)[-1] == f"{A}: prepare 1 FOUND [{A}]"


def test_no_first_world_within_the_start_timeout_ends_the_job() -> None:
    job = Job(nodes_min=2)
    job.attach("n0")
    job.say(A, Registered(SPEC))
    assert job.tick(59.0) == []
    assert "END failed" in job.tick(2.0)
    assert "1 of 2 nodes attached" in job.machine.reason


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (TrainingSpec(slots=1, dataset_size=100, batch_size=1), "slots=1 cannot feed 2 workers"),
        (TrainingSpec(slots=4, virtual_replicas=5, dataset_size=100, batch_size=1), "virtual_replicas=5 exceeds"),
        (TrainingSpec(slots=4, dataset_size=3, batch_size=1), "the dataset holds 3 samples"),
    ],
)
def test_numbers_that_make_no_sense_end_the_job(spec: TrainingSpec, words: str) -> None:
    job = Job()
    job.attach("n0")
    job.attach("n1")
    job.say(A, Registered(spec))
    assert job.say(B, Registered(spec))[-1] == "END failed"
    assert words in job.machine.reason


def test_workers_that_train_different_things_end_the_job() -> None:
    job = Job()
    job.attach("n0")
    job.attach("n1")
    job.say(A, Registered(SPEC))
    assert job.say(B, Registered(TrainingSpec(slots=4, seed=9)))[-1] == "END failed"
    assert "the seeds differ" in job.machine.reason


def test_a_loss_before_the_first_world_stands_forms_it_anew_with_everybody() -> None:
    job = Job(nodes_max=3)
    job.attach("n0")
    job.attach("n1")
    job.say(A, Registered(SPEC))
    job.say(B, Registered(SPEC))
    job.tick(30.5)
    job.attach("n2")
    assert job.join(C) == [f"{C}: join"]  # told to join a world that never stands
    assert job.exits(B) == ["ledger workers-lost", "ledger worker-started", "n1#1: start n1/0.2"]
    assert job.say("n1/0.2", Registered(SPEC)) == [
        f"{A}: found",
        "n1/0.2: found",
        "ledger generation-opened",
        f"{A}: prepare 2 FOUND [{A} n1/0.2 {C}]",
        f"n1/0.2: prepare 2 FOUND [{A} n1/0.2 {C}]",
        f"{C}: prepare 2 FOUND [{A} n1/0.2 {C}]",
    ]
    job.prepare(2, 0, A, "n1/0.2")
    assert job.prepare(2, 0, C, has_state=False)[-1] == f"{C}: commit 2 after 0, joiners [2]"


# -- losses --------------------------------------------------------------------------------------------------------


def test_survivors_of_a_lost_worker_are_fenced_and_it_is_replaced() -> None:
    job = Job()
    job.running("n0", "n1")
    assert job.exits(B) == [
        "ledger workers-lost",
        "ledger generation-opened",
        f"{A}: prepare 2 FENCE [{A}]",
        "ledger worker-started",
        "n1#1: start n1/0.2",
    ]
    assert job.prepare(2, 3, A) == ["ledger generation-committed", f"{A}: commit 2 after 3, joiners []"]
    assert job.switch(2, 3, A) == []
    assert job.say(A, Resumed(2, 4)) == ["ledger incident"]


def test_all_continue_after_the_newest_step_that_anybody_committed() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    job.exits(C)
    job.say(A, Prepared(2, 3, 4, True))
    assert job.say(B, Prepared(2, 4, 4, True))[-1] == f"{B}: commit 2 after 4, joiners []"


def test_a_step_that_only_the_dead_committed_is_finished_where_all_voted_for_it() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    job.heartbeat(C, 1, 4)
    job.exits(C)
    job.say(A, Prepared(2, 3, 4, True))
    assert job.say(B, Prepared(2, 3, 4, True))[-1] == f"{B}: commit 2 after 4, joiners []"


def test_a_step_that_all_voted_for_and_nobody_saw_committed_counts_as_redone() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    job.exits(C)
    job.say(A, Prepared(2, 3, 4, True))
    assert job.say(B, Prepared(2, 3, 4, True))[-1] == f"{B}: commit 2 after 3, joiners []"
    assert [incident.steps_redone for incident in job.machine.incidents.newest()] == [1]


def test_a_step_that_not_all_voted_for_is_redone() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    job.exits(C)
    job.say(A, Prepared(2, 3, 4, True))
    assert job.say(B, Prepared(2, 3, 3, True))[-1] == f"{B}: commit 2 after 3, joiners []"


@pytest.mark.parametrize("how", ["stream", "lease"])
def test_a_lost_node_is_fenced(how: str) -> None:
    job = Job()
    job.running("n0", "n1")
    if how == "stream":
        lines = job.feed(AgentGone("n1#1", "reset"))
        assert "close n1#1" not in lines, "it has ended already"
    else:
        job.silent = frozenset(["n1"])
        lines = job.tick(2.5)
        assert "close n1#1" in lines
    assert lines[0] == "ledger node-lost"
    assert lines[-1] == f"{A}: prepare 2 FENCE [{A}]"


def test_a_node_that_comes_back_keeps_nothing_of_what_was_lost() -> None:
    job = Job()
    job.running("n0", "n1")
    job.feed(AgentGone("n1#1", "reset"))
    assert job.attach("n1", WorkerStatus(B, generation=1, committed=3)) == [
        "ledger node-attached",
        "n1#1: welcome []",
        "ledger worker-started",
        "n1#1: start n1/0.2",
    ]


def test_an_agent_that_attaches_anew_is_not_closed() -> None:
    job = Job()
    job.running("n0", "n1")
    lines = job.attach("n1", WorkerStatus(B, generation=1, committed=3))
    assert lines[0] == "ledger node-lost"
    assert "close n1#1" not in lines
    assert f"{A}: prepare 2 FENCE [{A}]" in lines


def test_a_second_loss_in_the_middle_of_a_fence_opens_the_next() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    job.exits(C)
    job.prepare(2, 3, A)
    assert f"{A}: prepare 3 FENCE [{A}]" in job.exits(B)
    assert job.prepare(2, 3, A) == [], "what is said for an older generation counts for nothing"
    assert job.prepare(3, 3, A)[-1] == f"{A}: commit 3 after 3, joiners []"


def test_who_is_not_prepared_in_time_is_lost() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    job.exits(C)
    job.prepare(2, 3, A)
    lines = job.tick(5.5)
    assert f"n1#1: kill {B}, it was not prepared in time" in lines
    assert f"{A}: prepare 3 FENCE [{A}]" in lines


def test_a_broken_collective_waits_for_the_loss_that_explains_it() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    assert job.say(A, CollectiveFailed(1, 4, "reset")) == []
    assert f"{A}: prepare 2 FENCE [{A} {B}]" in job.exits(C)
    assert job.say(B, CollectiveFailed(1, 4, "reset")) == []
    assert job.tick(1.0) == [], "one fault, one fence"


def test_a_broken_collective_that_nothing_explains_is_fenced() -> None:
    job = Job()
    job.running("n0", "n1")
    job.say(A, CollectiveFailed(1, 4, "reset"))
    assert job.tick(0.5) == ["n0#1: probe n1", "n1#1: probe n0"]
    assert job.probed() == [
        "ledger generation-opened",
        f"{A}: prepare 2 FENCE [{A} {B}]",
        f"{B}: prepare 2 FENCE [{A} {B}]",
    ]
    job.prepare(2, 3, A, B)
    job.switch(2, 3, A)
    job.say(A, CollectiveFailed(2, 4, "again"))
    job.tick(0.5)
    assert f"{A}: prepare 3 FENCE [{A} {B}]" in job.probed(), "also before all have adopted it"


def test_a_broken_collective_that_a_dead_link_explains_costs_one_of_its_nodes() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    job.say(A, CollectiveFailed(1, 4, "reset"))
    job.tick(0.5)
    assert job.probed(n0=("n2",)) == [
        "ledger link-dead",
        "n2#1: kill n2/0.1, it cannot reach n0",
        "ledger workers-lost",
        "ledger generation-opened",
        f"{A}: prepare 2 FENCE [{A} {B}]",
        f"{B}: prepare 2 FENCE [{A} {B}]",
    ]
    job.prepare(2, 3, A, B)
    job.switch(2, 3, A, B)
    assert job.tick(0.5) == ["n0#1: probe n1 n2", "n1#1: probe n0 n2", "n2#1: probe n0 n1"]
    assert job.probed(n2=("n0",)) == [], "it is still dead"
    job.tick(2.5)
    assert job.probed() == ["ledger link-healed", "ledger worker-started", "n2#1: start n2/0.2"]


def test_a_peer_that_only_answers_late_is_not_left_out() -> None:
    job = Job()
    job.running("n0", "n1")
    job.say(A, CollectiveFailed(1, 4, "reset"))
    job.tick(0.5)
    for node, unreachable in (("n0", ("n1",)), ("n1", ())):
        lines = job.feed(AgentSaid(f"{node}#1", PeersProbed(1, unreachable)))
    assert lines == ["n0#1: probe n1", "n1#1: probe n0"]
    assert f"{A}: prepare 2 FENCE [{A} {B}]" in job.probed()


def waiting(job: Job, generation: int, committed: int, *workers: str) -> None:
    """All say by their heartbeats that they wait."""
    for worker in workers:
        node = job.machine.nodes[worker.split("/")[0]]
        status = WorkerStatus(worker, generation=generation, committed=committed, progress=9, waits=True)
        job.feed(AgentSaid(node.incarnation, Heartbeat(1, (status,))))


def test_a_world_that_stands_still_is_probed_and_left_alone_unless_a_link_is_dead() -> None:
    job = Job()
    job.running("n0", "n1")
    waiting(job, 1, 3, A)
    assert job.tick(5.0) == [], "B computes"
    waiting(job, 1, 3, B)
    assert job.tick(1.5) == ["n0#1: probe n1", "n1#1: probe n0"]
    assert job.probed() == []
    assert job.tick(1.0) == ["n0#1: probe n1", "n1#1: probe n0"]
    assert f"{A}: prepare 2 FENCE [{A}]" in job.probed(n1=("n0",))


def test_a_world_that_stands_still_for_too_long_is_fenced_anew() -> None:
    job = Job(hang_timeout_s=6.0)
    job.running("n0", "n1")
    waiting(job, 1, 3, A, B)
    lines: list[str] = []
    for _ in range(10):
        lines += job.tick(1.0)
        if job.machine.probing is not None:
            lines += job.probed()
    assert f"{A}: prepare 2 FENCE [{A} {B}]" in lines


def _a_joiner_is_awaited(**settings: Any) -> Job:
    """Two train, a third one joins, and its world is committed."""
    job = Job(nodes_max=3, **settings)
    job.running("n0", "n1")
    job.attach("n2")
    job.join(C)
    job.prepare(2, 3, A, B, C)
    assert job.machine.attempt is not None and job.machine.attempt.committed
    return job


def _stands_still(job: Job, seconds: int) -> list[str]:
    lines: list[str] = []
    for _ in range(seconds):
        lines += job.tick(1.0)
        if job.machine.probing is not None:
            lines += job.probed()
    return lines


def test_a_world_that_stands_still_before_it_adopts_the_next_one_is_fenced_anew() -> None:
    job = _a_joiner_is_awaited(hang_timeout_s=6.0)
    waiting(job, 1, 3, A, B)
    waiting(job, 2, 3, C)
    assert f"{A}: prepare 3 FENCE [{A} {B} {C}]" in _stands_still(job, 10)


def test_a_dead_link_is_found_also_before_a_joiner_has_its_state() -> None:
    job = _a_joiner_is_awaited(hang_timeout_s=6.0)
    waiting(job, 1, 3, A, B)
    waiting(job, 2, 3, C)
    job.tick(1.5)
    assert f"{A}: prepare 3 FENCE [{A} {C}]" in job.probed(n1=("n0",))


def test_a_joiner_may_be_given_its_state_for_as_long_as_it_takes() -> None:
    job = _a_joiner_is_awaited(hang_timeout_s=6.0)
    job.switch(2, 3, A, B)
    waiting(job, 2, 3, A, B, C)
    assert not any("FENCE" in line for line in _stands_still(job, 20))


def test_a_rank_that_leaves_the_loop_alone_is_named() -> None:
    job = Job()
    job.running("n0", "n1")
    waiting(job, 1, 3, A, B)
    job.say(B, Leaving(3, "d", 12))
    assert "END failed" in job.tick(1.5)
    assert f"worker {B} left the training loop after step 3 while {A} went on" in job.machine.reason


def test_what_must_run_once_runs_on_the_first_worker_and_elsewhere_if_that_one_is_lost() -> None:
    job = Job()
    job.running("n0", "n1")
    job.say(A, Leaving(9, "d", 36, concludes=True))
    assert job.say(B, Leaving(9, "d", 36, concludes=True)) == [
        "ledger loop-ended",
        "ledger concluding",
        f"{A}: conclude",
    ]
    assert job.exits(A) == ["ledger workers-lost", "ledger concluding", f"{B}: conclude"]
    assert job.say(B, Concluded(9)) == ["ledger job-concluded", f"{B}: finish, the job is done"]
    assert "END succeeded" in job.exits(B, 0)


def test_a_node_that_comes_back_after_the_loop_may_do_what_must_be_done_once() -> None:
    job = Job()
    job.running("n0", "n1")
    leaving = Leaving(9, "d", 36, concludes=True)
    job.say(A, leaving)
    job.say(B, leaving)
    job.feed(AgentGone("n1#1", "reset"))
    status = WorkerStatus(B, generation=1, committed=9, messages=(Registered(SPEC), leaving))
    assert f"n1#1: welcome [{B}]" in job.attach("n1", status)
    assert job.exits(A) == ["ledger workers-lost", "ledger concluding", f"{B}: conclude"]
    assert job.say(B, Concluded(9)) == ["ledger job-concluded", f"{B}: finish, the job is done"]



def test_a_job_fails_if_nobody_finishes_what_must_run_once() -> None:
    job = Job()
    job.running("n0")
    job.say(A, Leaving(9, "d", 36, concludes=True))
    job.say(A, Failed(9, -1, "OSError: disk full", "trace"))
    assert job.exits(A, 1, blameless=False)[-1] == "END failed"
    assert "on_end() asked for: OSError: disk full" in job.machine.reason


def test_who_has_seen_the_verdict_knows_whether_the_loop_ends() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    job.exits(C)
    job.say(A, Prepared(2, 4, 4, True, True))
    assert job.say(B, Prepared(2, 3, 4, True))[-1] == f"{B}: commit 2 after 4, stop"


def test_a_step_stays_as_it_was_dealt_only_if_all_who_are_left_have_it_so() -> None:
    for one, other, words in (
        (Prepared(2, 4, 4, True, dealt=1), Prepared(2, 4, 4, True, dealt=1), ", as dealt for 1"),
        (Prepared(2, 4, 4, True, dealt=1), Prepared(2, 4, 5, True, dealt=1), ", as dealt for 1"),
        (Prepared(2, 4, 4, True, dealt=1), Prepared(2, 4, 4, True), ""),
        (Prepared(2, 4, 4, True, dealt=1), Prepared(2, 3, 4, True, dealt=1), ""),  # it is about step 4 there
    ):
        job = Job(nodes_max=3)
        job.running("n0", "n1", "n2")
        job.exits(C)
        job.say(A, one)
        assert job.say(B, other)[-1] == f"{B}: commit 2 after 4, joiners []{words}"


def test_generations_that_fail_with_nobody_lost_end_the_job() -> None:
    job = Job()
    job.running("n0", "n1")
    job.say(A, CollectiveFailed(1, 4, "reset"))
    for generation in range(2, 7):
        job.tick(0.5)
        job.probed()
        job.say(B, PrepareFailed(generation, "no route"))
    job.tick(0.5)
    assert "END failed" in job.probed()
    assert "5 generations in a row failed with nobody lost" in job.machine.reason


def test_the_same_exception_on_two_workers_ends_the_job() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    failure = Failed(4, 2, "ValueError: bad", "trace", (7, 8))
    job.say(A, failure)
    assert "END failed" not in job.exits(A, 1, blameless=False)
    job.say(B, failure)
    assert job.exits(B, 1, blameless=False)[-1] == "END failed"
    assert "step 4, slot 2" in job.machine.reason and "sample ids [7, 8]" in job.machine.reason


def test_a_place_that_fails_too_often_is_given_up_and_the_others_go_on() -> None:
    job = Job()
    job.running("n0", "n1")
    assert "n1#1: start n1/0.2" in job.exits(B, 1, blameless=False)
    lines = job.exits("n1/0.2", 1, blameless=False)
    assert lines == ["ledger workers-lost", "ledger worker-given-up"]
    assert job.machine.outcome == ""


def test_a_job_whose_every_place_is_given_up_ends() -> None:
    job = Job(nodes_max=1)
    job.attach("n0")
    job.exits(A, 3, blameless=False)
    assert job.exits("n0/0.2", 3, blameless=False)[-1] == "END failed"
    assert "--max-restarts 1" in job.machine.reason


def test_workers_killed_from_outside_are_replaced_for_ever() -> None:
    job = Job(nodes_max=1)
    job.attach("n0")
    for serial in range(1, 9):
        assert f"n0#1: start n0/0.{serial + 1}" in job.exits(f"n0/0.{serial}")


def test_too_few_nodes_wait_for_new_ones_and_take_them_in_at_once() -> None:
    job = Job(nodes_min=2)
    job.running("n0", "n1")
    job.feed(AgentGone("n1#1", "reset"))
    assert job.prepare(2, 3, A) == ["ledger job-waits"]
    job.attach("n1", number=2)
    assert job.join("n1/0.2") == [
        "n1/0.2: join",
        "ledger generation-opened",
        f"{A}: prepare 3 FENCE [{A} n1/0.2]",
        f"n1/0.2: prepare 3 FENCE [{A} n1/0.2]",
    ]
    job.prepare(3, 3, A)
    assert job.prepare(3, 0, "n1/0.2", has_state=False)[-1] == "n1/0.2: commit 3 after 3, joiners [1]"


def test_too_few_nodes_for_too_long_end_the_job() -> None:
    job = Job(nodes_min=2)
    job.running("n0", "n1")
    job.feed(AgentGone("n1#1", "reset"))
    job.prepare(2, 3, A)
    assert "END failed" in job.tick(61.0)
    assert "--nnodes MIN (2)" in job.machine.reason


# -- when nobody who holds the state can be reached ----------------------------------------------------------------


def test_a_state_that_died_with_its_workers_ends_the_job() -> None:
    job = Job(nodes_max=1)
    job.running("n0")
    assert job.exits(A)[-1] == "END failed"
    assert "every copy of the training state was lost after step 3" in job.machine.reason


def test_before_the_first_step_a_lost_state_only_forms_the_world_anew() -> None:
    job = Job(nodes_max=1)
    job.attach("n0")
    job.say(A, Registered(SPEC))
    job.prepare(1, 0, A)
    lines = job.exits(A)
    assert "ledger job-unfounded" in lines and "n0#1: start n0/0.2" in lines
    assert job.say("n0/0.2", Registered(SPEC))[-1] == "n0/0.2: prepare 2 FOUND [n0/0.2]"


def test_nodes_that_fall_silent_together_may_come_back_with_the_state() -> None:
    job = Job()
    job.running("n0", "n1")
    job.silent = frozenset(["n0", "n1"])
    lines = job.tick(2.5)
    assert lines.count("ledger node-lost") == 2 and "ledger job-waits" in lines
    job.silent = frozenset()
    assert job.attach("n0", WorkerStatus(A, generation=1, committed=5)) == [
        "ledger node-attached",
        f"n0#1: welcome [{A}]",
    ]
    assert job.attach("n1", WorkerStatus(B, generation=1, committed=5)) == [
        "ledger node-attached",
        f"n1#1: welcome [{B}]",
        "ledger generation-opened",
        f"{A}: prepare 3 FENCE [{A} {B}]",
        f"{B}: prepare 3 FENCE [{A} {B}]",
    ]


def test_a_node_that_comes_back_empty_ends_the_wait() -> None:
    job = Job(nodes_max=1)
    job.running("n0")
    job.feed(AgentGone("n0#1", "reset"))
    assert job.machine.outcome == ""
    assert job.attach("n0", number=2)[-1] == "END failed"


def test_the_wait_for_lost_nodes_has_an_end() -> None:
    job = Job(nodes_max=1)
    job.running("n0")
    job.feed(AgentGone("n0#1", "reset"))
    assert job.tick(59.0) == []
    assert "END failed" in job.tick(2.0)


# -- joining and leaving -------------------------------------------------------------------------------------------


def test_a_joiner_is_taken_in_by_a_switch() -> None:
    job = Job()
    job.running("n0")
    job.attach("n1")
    assert job.say(B, Registered(SPEC)) == [
        f"{B}: join",
        "ledger generation-opened",
        f"{A}: prepare 2 SWITCH [{A} {B}]",
        f"{B}: prepare 2 SWITCH [{A} {B}]",
    ]
    assert job.say(B, Warm()) == []  # and B says Prepared, which it does not before
    job.prepare(2, 0, B, has_state=False)
    assert job.prepare(2, 5, A) == [
        "ledger generation-committed",
        f"{A}: commit 2 after 5, joiners [1]",
        f"{B}: commit 2 after 5, joiners [1]",
    ]
    assert job.switch(2, 0, B) == []
    assert job.switch(2, 6, A) == ["ledger generation-adopted"]


def test_a_joiner_that_warms_up_slowly_is_waited_for_before_another_switch_is_prepared() -> None:
    job = Job()
    job.running("n0")
    job.attach("n1")
    job.say(B, Registered(SPEC))
    job.prepare(2, 5, A)
    assert job.tick(job.settings.prepare_timeout_s + 1.0) == [
        "ledger generation-abandoned",
        f"{A}: abandon 2",
        f"{B}: abandon 2",
    ]
    assert job.tick(60.0) == []
    assert f"{B}: prepare 3 SWITCH [{A} {B}]" in job.say(B, Warm())


def test_a_joiner_with_another_model_is_refused() -> None:
    job = Job()
    job.running("n0")
    job.attach("n1")
    (written, killed) = job.say(
        B, Registered(TrainingSpec(slots=4, layout_digest="other", dataset_size=100, batch_size=1))
    )
    assert written == "ledger worker-refused" and "names, shapes or dtypes" in killed
    assert job.machine.outcome == ""


def test_a_joiner_that_dies_before_the_commit_costs_the_others_nothing() -> None:
    job = Job()
    job.running("n0")
    job.attach("n1")
    job.join(B)
    assert job.exits(B) == [
        "ledger workers-lost",
        "ledger generation-abandoned",
        f"{A}: abandon 2",
        "ledger worker-started",
        "n1#1: start n1/0.2",
    ]


def test_a_joiner_that_is_never_prepared_is_replaced() -> None:
    job = Job()
    job.running("n0")
    job.attach("n1")
    job.join(B)
    job.prepare(2, 3, A)
    lines = job.tick(5.5)
    assert f"{A}: abandon 2" in lines and f"n1#1: kill {B}, it was not prepared in time" in lines


def test_who_has_joined_before_is_given_nothing_by_the_next_switch() -> None:
    job = Job(nodes_max=3)
    job.running("n0")
    job.attach("n1")
    job.join(B)
    job.prepare(2, 3, A)
    job.prepare(2, 0, B, has_state=False)
    job.switch(2, 4, A, B)
    job.attach("n2")
    job.join(C)
    job.prepare(3, 4, A)
    job.prepare(3, 0, B, has_state=False)  # it is still being given the state
    assert job.prepare(3, 0, C, has_state=False)[-1] == f"{C}: commit 3 after 4, joiners [2]"


def test_there_are_never_more_members_than_slots() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", nproc=2)
    job.attach("n2")
    assert job.join(C) == [f"{C}: join"], "it stays warm until a slot is free"
    job.exits("n1/1.1")
    workers = ("n0/0.1", "n0/1.1", "n1/0.1")
    job.prepare(2, 3, *workers)
    assert f"{C}: prepare 3 SWITCH [{' '.join(workers)} {C}]" in job.switch(2, 3, *workers)


def test_a_drained_node_leaves_at_a_boundary() -> None:
    job = Job()
    job.running("n0", "n1")
    assert job.feed(DrainAsked("n1")) == [
        "ledger node-draining",
        "ledger generation-opened",
        f"{A}: prepare 2 SWITCH [{A}]",
        f"{B}: prepare 2 SWITCH [{A}]",
    ]
    assert job.prepare(2, 3, A, B)[-1] == f"{B}: commit 2 after 3, joiners []"
    assert job.switch(2, 4, A) == ["ledger generation-adopted", f"{B}: finish, drained"]
    assert job.tick(0.5) == ["n1#1: shut down with 0, drained"]
    assert job.tick(1.0) == []
    assert job.feed(AgentSaid("n1#1", Goodbye("drained"))) == ["ledger node-left"]


def test_the_loss_of_who_is_leaving_fences_while_the_switch_is_not_adopted() -> None:
    job = Job()
    job.running("n0", "n1")
    job.feed(DrainAsked("n1"))
    job.prepare(2, 3, A, B)
    assert f"{A}: prepare 3 FENCE [{A}]" in job.exits(B)


def test_who_is_leaving_is_called_back_by_a_fence() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    job.feed(DrainAsked("n1"))
    job.prepare(2, 3, A, B, C)
    assert f"{B}: prepare 3 FENCE [{C} {B}]" in job.exits(A)


def test_a_world_that_breaks_while_it_is_being_left_is_fenced() -> None:
    job = Job()
    job.running("n0", "n1")
    job.feed(DrainAsked("n1"))
    job.prepare(2, 3, A, B)
    job.say(A, CollectiveFailed(1, 4, "reset"))
    job.tick(0.5)
    assert f"{B}: prepare 3 FENCE [{A} {B}]" in job.probed()


def test_the_last_node_is_not_drained() -> None:
    job = Job()
    job.running("n0")
    assert "is the last one" in job.machine.drain_refusal("n0")
    assert "no node 'n7'" in job.machine.drain_refusal("n7")
    assert job.feed(DrainAsked("n0")) == []


def test_the_only_holder_leaves_after_its_successor_has_the_state() -> None:
    job = Job()
    job.running("n0", "n1")
    job.feed(AgentGone("n1#1", "reset"))
    job.prepare(2, 3, A)
    job.switch(2, 3, A)
    job.attach("n1", number=2)
    job.feed(DrainAsked("n0"))
    assert job.join("n1/0.2")[-1] == f"n1/0.2: prepare 3 SWITCH [{A} n1/0.2]"
    job.prepare(3, 3, A)
    job.prepare(3, 0, "n1/0.2", has_state=False)
    assert job.switch(3, 4, A, "n1/0.2") == ["ledger generation-adopted"]
    assert f"{A}: prepare 4 SWITCH [n1/0.2]" in [*job.say("n1/0.2", Resumed(3, 5)), *job.tick(0.5)]


# -- the end -------------------------------------------------------------------------------------------------------


def test_the_job_ends_when_all_have_left_the_loop_and_finished() -> None:
    job = Job()
    job.running("n0", "n1")
    assert job.say(A, Leaving(9, "d", 36)) == []
    assert job.say(B, Leaving(9, "d", 36)) == [
        "ledger loop-ended",
        f"{A}: finish, the job is done",
        f"{B}: finish, the job is done",
    ]
    assert job.exits(A, 0, blameless=False) == ["ledger worker-finished"]
    assert job.exits(B, 0, blameless=False) == [
        "ledger worker-finished",
        "ledger job-ended",
        "n0#1: shut down with 0, finished after step 9",
        "n1#1: shut down with 0, finished after step 9",
        "END succeeded",
    ]


def test_replicas_that_end_differently_fail_the_job() -> None:
    job = Job()
    job.running("n0", "n1")
    job.say(A, Leaving(9, "d", 36))
    assert job.say(B, Leaving(9, "e", 36))[-1] == "END failed"


def test_the_end_does_not_wait_for_a_joiner_without_state() -> None:
    job = Job()
    job.running("n0")
    job.attach("n1")
    job.join(B)
    job.prepare(2, 3, A)
    job.prepare(2, 0, B, has_state=False)
    assert job.say(A, Leaving(9, "d", 36)) == [
        "ledger loop-ended",
        f"{A}: finish, the job is done",
        f"n1#1: kill {B}, the job is done",
    ]


def test_who_has_not_committed_the_last_step_is_waited_for() -> None:
    job = Job(nodes_max=3)
    job.running("n0", "n1", "n2")
    job.say(A, Leaving(4, "d", 16))
    assert f"{A}: prepare 2 FENCE [{A} {B}]" in job.exits(C)
    job.say(A, Prepared(2, 4, 4, True))
    assert job.say(B, Prepared(2, 3, 4, True))[-1] == f"{B}: commit 2 after 4, joiners []"
    job.switch(2, 4, A, B)
    assert "ledger loop-ended" in job.say(B, Leaving(4, "d", 16))


def test_scripts_that_never_train_end_well() -> None:
    job = Job(nodes_max=1)
    job.attach("n0")
    assert job.exits(A, 0, blameless=False)[-1] == "END succeeded"


def test_a_person_can_stop_the_job() -> None:
    job = Job()
    job.running("n0")
    assert job.feed(StopAsked("enough")) == ["ledger job-ended", "n0#1: shut down with 1, enough", "END stopped"]
    assert job.attach("n1") == ["n1#1: refused, job 'j' is over: enough", "close n1#1"]


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (AgentHello(job="k", node="n1", incarnation="x"), "belongs to job 'k'"),
        (AgentHello(job="j", node="n1", incarnation="x", protocol_version=9), "speaks protocol version 9"),
        (AgentHello(job="j", node="n0", incarnation="x"), "already attached"),
        (AgentHello(job="j", node="n1", incarnation="x"), "has its 1 nodes already"),
    ],
)
def test_agents_that_do_not_belong_are_refused(hello: AgentHello, words: str) -> None:
    job = Job(nodes_max=1)
    job.running("n0")
    refused, closed = job.feed(AgentAttached(hello))
    assert words in refused and closed == "close x"


# -- a controller that comes back ----------------------------------------------------------------------------------


def said(worker: str, generation: int, committed: int, *messages: WorkerMessage) -> WorkerStatus:
    return WorkerStatus(worker, generation=generation, committed=committed, messages=(Registered(SPEC), *messages))


def test_an_intact_world_is_left_alone_by_a_new_controller() -> None:
    before = Job()
    before.running("n0", "n1")
    job = before.restarted()
    assert job.tick(0.5) == []
    assert job.attach("n0", said(A, 1, 8)) == ["ledger node-attached", f"n0#1: welcome [{A}]"]
    assert job.attach("n1", said(B, 1, 8)) == [
        "ledger node-attached",
        f"n1#1: welcome [{B}]",
        "ledger controller-restarted",
    ]
    assert job.machine.state == "running" and job.machine.step_committed == 8


def test_what_was_lost_with_the_controller_is_fenced_when_it_is_back() -> None:
    before = Job()
    before.running("n0", "n1")
    job = before.restarted()
    job.attach("n0", said(A, 1, 8, CollectiveFailed(1, 9, "reset")))
    assert job.attach("n1")[2:] == [
        "ledger controller-restarted",
        "ledger generation-opened",
        f"{A}: prepare 2 FENCE [{A}]",
        "ledger worker-started",
        "n1#1: start n1/0.2",
    ]


def test_nodes_that_do_not_come_back_have_as_long_as_a_lease() -> None:
    before = Job()
    before.running("n0", "n1")
    job = before.restarted()
    job.tick(10.0)
    job.attach("n0", said(A, 1, 8))
    assert job.tick(1.5) == []
    assert f"{A}: prepare 2 FENCE [{A}]" in job.tick(1.0)


def test_a_generation_that_was_not_committed_is_replaced_by_a_higher_one() -> None:
    before = Job(nodes_max=3)
    before.running("n0", "n1", "n2")
    before.exits(C)
    job = before.restarted()
    job.attach("n0", said(A, 1, 8))
    job.attach("n1", said(B, 1, 8))
    assert f"{A}: prepare 3 FENCE [{A} {B}]" in job.attach("n2")


def test_a_commit_that_nobody_heard_is_replaced_too() -> None:
    before = Job(nodes_max=3)
    before.running("n0", "n1", "n2")
    before.exits(C)
    before.prepare(2, 3, A, B)
    job = before.restarted()
    job.attach("n0", said(A, 1, 3))
    assert f"{A}: prepare 3 FENCE [{A} {B}]" in job.attach("n1", said(B, 1, 3))


def test_who_was_leaving_is_called_back_by_a_new_controller_and_leaves_later() -> None:
    before = Job()
    before.running("n0", "n1")
    before.feed(DrainAsked("n1"))
    before.prepare(2, 3, A, B)
    job = before.restarted()
    job.attach("n0", said(A, 2, 7))
    assert f"{B}: prepare 3 FENCE [{A} {B}]" in job.attach("n1", said(B, 1, 4))
    job.say(A, Prepared(3, 7, 7, True))
    assert job.say(B, Prepared(3, 4, 4, True))[-1] == f"{B}: commit 3 after 7, joiners [1]", "it is too far behind"
    assert f"{B}: prepare 4 SWITCH [{A}]" in job.switch(3, 7, A, B)


def test_a_worker_that_a_later_world_left_out_is_not_taken_back() -> None:
    before = Job(nodes_max=3)
    before.running("n0", "n1", "n2")
    before.feed(AgentGone("n2#1", "reset"))
    before.prepare(2, 3, A, B)
    before.switch(2, 3, A, B)
    job = before.restarted()
    assert job.attach("n2", said(C, 1, 3))[:2] == ["ledger node-attached", "n2#1: welcome []"]


def test_numbers_go_on_where_the_ledger_ends() -> None:
    before = Job()
    before.running("n0", "n1")
    before.exits(B)
    job = before.restarted()
    job.attach("n0", said(A, 1, 8))
    lines = job.attach("n1")
    assert "n1#1: start n1/0.3" in lines and f"{A}: prepare 3 FENCE [{A}]" in lines


def test_an_end_that_had_begun_goes_on() -> None:
    before = Job()
    before.running("n0", "n1")
    before.say(A, Leaving(9, "d", 36))
    before.say(B, Leaving(9, "d", 36))
    before.exits(B, 0, blameless=False)
    job = before.restarted()
    job.attach("n1")
    assert job.attach("n0", said(A, 1, 9, Leaving(9, "d", 36)))[-1] == f"{A}: finish, the job is done"
    assert job.exits(A, 0, blameless=False)[-1] == "END succeeded"
    assert job.machine.digest == "d"


def test_an_end_that_all_have_reached_needs_nobody_any_more() -> None:
    before = Job()
    before.running("n0")
    before.say(A, Leaving(9, "d", 36))
    job = before.restarted()
    assert job.tick(1.5) == []
    assert "END succeeded" in job.tick(1.0)


def test_a_founding_that_had_begun_begins_again() -> None:
    before = Job()
    before.attach("n0")
    before.attach("n1")
    before.say(A, Registered(SPEC))
    before.say(B, Registered(SPEC))
    job = before.restarted()
    job.attach("n0", said(A, 0, 0))
    lines = job.attach("n1", said(B, 0, 0))
    assert f"n1#1: welcome [{B}]" not in lines, "the founding has been open since the first came back"
    assert "n1#1: start n1/0.2" in lines
    assert job.say("n1/0.2", Registered(SPEC))[-1] == f"n1/0.2: prepare 2 FOUND [{A} n1/0.2]"


def test_a_slow_controller_blames_nobody_for_its_own_silence() -> None:
    job = Job()
    job.running("n0", "n1")
    job.feed(Tick())
    job.now += 30.0
    assert job.feed(Tick()) == []
