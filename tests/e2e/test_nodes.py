"""Nodes that die, stand still, come, go and come back; and controllers that do."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import psutil
import pytest

from tests.e2e.jobs import ELASTIC, Job, Status, members_of, pids_of

pytestmark = pytest.mark.e2e

TRAINED = ("--epochs", 5)
STEPS = 5 * 51


def begin(job: Job, *options: object, train: tuple[object, ...] = TRAINED) -> Status:
    """Start a controller and two nodes of two workers each, and wait for their world."""
    job.controller("--nnodes", "1:2", *options)
    for node in ("a", "b"):
        job.agent(node, 2, "--record-samples", job.folder / "record", train=(*train, *job.held))
    return job.wait_for_world(4, beyond_step=3)


def finish(job: Job) -> Status:
    """Let the job run to its end, in order, and return its summary."""
    job.let_go()
    for name, process in job.started.items():
        if not name.startswith("call") and process.poll() is None:
            done = job.ended(process)
            assert done.code == 0, f"{name}: {done.err}"
    job.assert_nothing_is_left()
    summary = job.summary()
    assert summary["state"] == "succeeded" and summary["step"] == STEPS
    return summary


def pids_on(status: Status, node: str) -> set[int]:
    """Return the pids of a node's members."""
    return {worker["pid"] for worker in members_of(status).values() if worker["worker"].startswith(f"{node}/")}


def recorded(job: Job) -> int:
    """Return how many slots of steps have been recorded so far."""
    return sum(len(path.read_bytes().splitlines()) for path in (job.folder / "record").glob("*.jsonl"))


def test_a_node_that_is_lost_comes_back_while_the_other_goes_on(job: Job, undisturbed: Callable[..., str]) -> None:
    first = begin(job)
    job.kill_node("b")
    alone = job.wait_for(lambda s: s if s["world_size"] == 2 and s["state"] == "running" else None, "a world of two")
    assert pids_of(alone) == pids_on(first, "a")
    job.agent("b", 2, train=(*TRAINED, *job.held))
    again = job.wait_for_world(4, beyond_step=alone["step"])
    assert pids_on(again, "a") == pids_on(first, "a")
    # Several at once: the whole node, and a worker of the other one.
    one, other = sorted(pids_on(again, "a"))
    job.kill_node("b")
    job.kill(one)
    job.wait_for(lambda s: s["world_size"] == 1, "a world of one")
    job.agent("b", 2, train=(*TRAINED, *job.held))
    last = job.wait_for_world(4, beyond_step=again["step"])
    assert other in pids_of(last) and one not in pids_of(last)
    summary = finish(job)
    assert {incident["detected_by"] for incident in summary["incidents"]} <= {"stream", "pidfd"}
    assert job.fingerprint() == undisturbed(*TRAINED)


def test_an_agent_that_stands_still_loses_its_workers_and_gets_new_ones(
    job: Job, undisturbed: Callable[..., str]
) -> None:
    first = begin(job, "--failure-timeout", 1)
    agent = next(node["agent_pid"] for node in first["nodes"] if node["id"] == "b")
    job.kill(agent, signal.SIGSTOP)
    job.wait_for(lambda s: s["world_size"] == 2 and s["state"] == "running", "a world of two")
    step = job.wait_for_steps(3)
    job.kill(agent, signal.SIGCONT)
    again = job.wait_for_world(4, beyond_step=step)
    assert pids_on(again, "a") == pids_on(first, "a")
    assert not pids_on(again, "b") & pids_on(first, "b")
    summary = finish(job)
    assert "lease" in {incident["detected_by"] for incident in summary["incidents"]}
    assert job.fingerprint() == undisturbed(*TRAINED)


def test_a_fork_server_that_dies_takes_its_workers_with_it_and_both_are_replaced(
    job: Job, undisturbed: Callable[..., str]
) -> None:
    first = begin(job, "--max-restarts", 0)  # it is nobody's fault
    agent = next(node["agent_pid"] for node in first["nodes"] if node["id"] == "b")
    (standby,) = [child.pid for child in psutil.Process(agent).children() if "elastic.standby" in child.cmdline()]
    job.kill(standby)
    job.wait_for(lambda s: s["world_size"] == 2 and s["state"] == "running", "a world of two")
    again = job.wait_for_world(4, beyond_step=first["step"])
    assert pids_on(again, "a") == pids_on(first, "a")
    assert next(node["agent_pid"] for node in again["nodes"] if node["id"] == "b") == agent
    finish(job)
    assert job.fingerprint() == undisturbed(*TRAINED)


def test_training_goes_on_while_the_controller_is_dead_and_it_resumes_from_its_ledger(
    job: Job, undisturbed: Callable[..., str]
) -> None:
    first = begin(job)
    refused = job.elastic("controller", "--port", 0, "--ledger", job.folder / "ledger.sqlite")
    assert refused.code == 2
    assert refused.err.count("\n") == 1 and "is held by another controller" in refused.err
    port = int(job.address.rpartition(":")[2])
    job.kill(first["controller_pid"])
    job.started["controller"].wait(10)
    seen = recorded(job)
    job.eventually(lambda: recorded(job) >= seen + 20 * 6, "twenty steps without a controller")
    job.controller("--nnodes", "1:2", name="controller2", port=port)
    again = job.wait_for_world(4, beyond_step=first["step"] + 20)
    assert again["controller_pid"] != first["controller_pid"]
    assert pids_of(again) == pids_of(first) and again["generation"] == first["generation"]
    # What it knows it can use: a node is lost, and the next world is formed.
    job.kill_node("b")
    job.wait_for(lambda s: s["world_size"] == 2 and s["state"] == "running", "a world of two")
    job.wait_for_steps(3)
    summary = finish(job)
    assert summary["incidents_total"] == 1
    assert job.fingerprint() == undisturbed(*TRAINED)


def test_a_worker_that_dies_while_there_is_no_controller_is_replaced_when_it_is_back(
    job: Job, undisturbed: Callable[..., str]
) -> None:
    first = begin(job)
    port = int(job.address.rpartition(":")[2])
    job.kill(first["controller_pid"])
    victim = min(pids_on(first, "b"))
    job.kill(victim)
    job.eventually(lambda: victim not in job.processes(), "its end")
    job.controller("--nnodes", "1:2", name="controller2", port=port)
    again = job.wait_for_world(4, beyond_step=first["step"])
    assert pids_of(first) - pids_of(again) == {victim}
    finish(job)
    assert job.fingerprint() == undisturbed(*TRAINED)


def test_a_run_takes_a_second_node_in_replaces_its_own_daemons_and_lets_the_node_go(
    job: Job, undisturbed: Callable[..., str]
) -> None:
    job.run(2, "--nnodes", "1:2", "--join-timeout", 0, train=(*TRAINED, *job.held))
    first = job.wait_for_world(2, beyond_step=2)
    # `elastic run --controller` is an agent like any other.
    joined = job.agent("b", 2, train=(*TRAINED, *job.held), verb="run")
    both = job.wait_for_world(4, beyond_step=first["step"])
    assert pids_on(both, "a") == pids_of(first)

    job.kill(both["controller_pid"])
    after = job.wait_for(lambda s: s if s["controller_pid"] != both["controller_pid"] else None, "another controller")
    after = job.wait_for_world(4, beyond_step=after["step"])
    assert pids_of(after) == pids_of(both)

    job.kill(next(node["agent_pid"] for node in after["nodes"] if node["id"] == "a"))
    replaced = job.wait_for_world(4, beyond_step=after["step"])
    assert pids_on(replaced, "b") == pids_on(both, "b") and not pids_on(replaced, "a") & pids_on(both, "a")

    drained = job.ask("drain", "b")
    assert drained.code == 0 and "node b has left" in drained.out
    assert job.ended(joined).code == 0
    without = job.wait_for_world(2, beyond_step=replaced["step"])
    assert pids_of(without) == pids_on(replaced, "a")
    summary = finish(job)
    assert {incident["subject"] for incident in summary["incidents"]} == {"node a"}  # a drained node is none
    assert job.fingerprint() == undisturbed(*TRAINED)


def test_people_are_told_what_they_ask_for(job: Job) -> None:
    job.run(2, train=(*TRAINED, *job.held))
    job.wait_for_world(2, beyond_step=2)
    done = job.ask("status", "--json")
    assert done.code == 0 and not done.err
    status = json.loads(done.out)
    assert status["job"] == "job" and status["generation"] == 1 and status["world_size"] == 2 and status["step"] > 0
    (node,) = status["nodes"]
    assert (node["id"], node["state"]) == ("a", "attached") and node["agent_pid"] in job.processes()
    assert [(w["rank"], w["state"]) for w in node["workers"]] == [(0, "member"), (1, "member")]
    assert {w["pid"] for w in node["workers"]} <= set(job.processes())
    shown = job.ask("status").out
    assert all(str(w["pid"]) in shown for w in node["workers"])

    done = job.ask("events", "--json")
    assert done.code == 0
    events = [json.loads(line) for line in done.out.splitlines()]
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert "generation-committed" in {event["kind"] for event in events}
    assert len(job.ask("events", "--after", len(events) - 1).out.splitlines()) == 1

    refused = job.ask("drain", "a")
    assert refused.code == 2 and refused.err.count("\n") == 1 and "the last one" in refused.err
    refused = job.ask("drain", "nobody")
    assert refused.code == 2 and refused.err.count("\n") == 1 and "no node 'nobody' is attached" in refused.err

    follower = job.start("follower", ELASTIC, "events", "--controller", job.address, "--follow")
    job.eventually(lambda: "generation 1 committed" in job.said("follower", "out"), "the follower follows")
    assert job.ask("stop", "--reason", "enough seen").code == 0
    done = job.ended(job.started["run"])
    assert done.code != 0 and "enough seen" in done.err
    assert job.summary()["state"] == "stopped"
    followed = job.ended(follower)
    assert followed.code == 0 and "stopped: enough seen" in followed.out
    job.assert_nothing_is_left()
