"""Networks that fail, for real: hosts in namespaces, cables that are cut, links that die, and what the job makes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks.netlab import Lab, Wire, obstacle
from tests.e2e.jobs import Job, Status, members_of, pids_of

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "no obstacle"),
    pytest.mark.timeout(240),
]

PORT = 29400
NODES = ("a", "b", "c")
TRAINED = ("--epochs", 8)  # longer than the faults take
STEPS = 8 * 51
DEAD_LINK_S = 4.0  # two failure timeouts


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("ctl", *NODES) as built:
        yield built


@pytest.fixture
def job(job: Job, lab: Lab) -> Job:
    """A job of three nodes on hosts of their own, which trains."""
    job.lab_start(lab, "ctl", PORT, NODES, "--nnodes", "1:3", train=(*TRAINED, *job.held))
    job.wait_for_world(3, beyond_step=3)
    return job


def finish(job: Job, undisturbed: Callable[..., str]) -> Status:
    job.let_go()
    done = job.ended(job.started["controller"], timeout_s=90)
    assert done.code == 0, done.err
    summary = job.summary()
    assert summary["state"] == "succeeded" and summary["step"] == STEPS
    assert job.fingerprint() == undisturbed(*TRAINED)
    return summary


def nodes_of(status: Status) -> set[str]:
    return {worker.partition("/")[0] for worker in members_of(status)}


def test_a_node_that_is_cut_off_is_left_out_and_rejoins_by_itself(
    job: Job, lab: Lab, undisturbed: Callable[..., str]
) -> None:
    before = job.wait_for_world(3)
    lab.cut("b")
    without = job.wait_for_world(2, beyond_step=before["step"] + 3)
    assert nodes_of(without) == {"a", "c"} and pids_of(without) < pids_of(before)
    lab.heal("b")
    after = job.wait_for_world(3, beyond_step=without["step"])
    assert pids_of(without) < pids_of(after)
    (incident,) = finish(job, undisturbed)["incidents"]
    assert incident["detected_by"] == "lease" and incident["seconds_lost"] < 4.0


def test_a_dead_link_between_two_nodes_costs_one_of_them_until_it_is_mended(
    job: Job, lab: Lab, undisturbed: Callable[..., str]
) -> None:
    before = job.wait_for_world(3)
    began = time.monotonic()
    lab.part("b", "c")
    without = job.wait_for(lambda s: s if s["world_size"] == 2 and s["state"] == "running" else None, "one to leave")
    assert time.monotonic() - began < DEAD_LINK_S + 2.0  # and what the test itself takes to see it
    assert len({"b", "c"} & nodes_of(without)) == 1 and "a" in nodes_of(without)
    job.wait_for_steps(5)
    lab.join("b", "c")
    after = job.wait_for_world(3, beyond_step=without["step"])
    assert pids_of(without) < pids_of(before) and pids_of(without) < pids_of(after)
    (incident,) = finish(job, undisturbed)["incidents"]
    assert incident["kind"] == "link dead" and incident["detected_by"] == "probe"
    assert incident["seconds_lost"] < DEAD_LINK_S


def test_a_link_that_is_dead_in_one_direction_is_found_too(
    job: Job, lab: Lab, undisturbed: Callable[..., str]
) -> None:
    lab.drop("c", "a")
    without = job.wait_for(lambda s: s if s["world_size"] == 2 and s["state"] == "running" else None, "one to leave")
    job.wait_for_steps(5)
    assert "b" in nodes_of(without)
    lab.undrop("c", "a")
    job.wait_for_world(3, beyond_step=without["step"])
    finish(job, undisturbed)


def test_a_cut_that_heals_in_time_costs_nobody(job: Job, lab: Lab, undisturbed: Callable[..., str]) -> None:
    before = job.wait_for_world(3)
    for _ in range(3):
        lab.cut("b")
        time.sleep(0.7)
        lab.heal("b")
        job.wait_for_steps(4)
    assert pids_of(job.wait_for_world(3)) == pids_of(before)
    assert finish(job, undisturbed)["incidents_total"] == 0


def test_connections_that_are_torn_cost_a_regroup_and_no_survivor(
    job: Job, lab: Lab, undisturbed: Callable[..., str]
) -> None:
    before = job.wait_for_world(3)
    lab.reset("a", "b")
    job.wait_for(lambda s: s["incidents_total"] > 0, "the broken connection to be noticed")
    after = job.wait_for_world(3, beyond_step=before["step"] + 3)
    # Whoever's own sockets were torn may be ended by gloo, which does not expect that; nobody else is.
    assert pids_of(before) - pids_of(after) <= {members_of(before)["a/0.1"]["pid"]}
    incident, *_ = finish(job, undisturbed)["incidents"]
    assert incident["kind"] in ("collective broken", "worker lost") and incident["seconds_lost"] < 4.0


def test_slow_and_lossy_wires_raise_no_alarm(undisturbed: Callable[..., str]) -> None:
    wires = {node: Wire(delay_ms=3, jitter_ms=2, loss=0.01) for node in NODES}
    with Lab("ctl", *NODES, wires=wires) as lab, Job() as job:
        lab.rate("a", "50mbit")
        job.lab_start(lab, "ctl", PORT, NODES, "--nnodes", "1:3", train=(*TRAINED, *job.held))
        before = job.wait_for_world(3, beyond_step=20)
        assert finish(job, undisturbed)["incidents_total"] == 0
        assert len(pids_of(before)) == 3


def test_an_intact_world_trains_on_without_its_controller(
    job: Job, lab: Lab, undisturbed: Callable[..., str]
) -> None:
    before = job.wait_for_world(3)
    lab.cut("ctl")
    time.sleep(5.0)
    lab.heal("ctl")
    after = job.wait_for_world(3, beyond_step=before["step"] + 10)
    assert pids_of(after) == pids_of(before)
    finish(job, undisturbed)


def test_a_node_that_only_the_controller_cannot_reach_leaves_and_comes_back(
    job: Job, lab: Lab, undisturbed: Callable[..., str]
) -> None:
    before = job.wait_for_world(3)
    lab.part("a", "ctl")
    without = job.wait_for_world(2, beyond_step=before["step"] + 3)
    assert nodes_of(without) == {"b", "c"}
    lab.join("a", "ctl")
    job.wait_for_world(3, beyond_step=without["step"])
    finish(job, undisturbed)


def test_the_side_without_a_controller_waits_at_its_first_loss(
    job: Job, lab: Lab, undisturbed: Callable[..., str]
) -> None:
    before = job.wait_for_world(3)
    victim = next(pid for pid in pids_of(before))
    lab.cut("ctl")
    job.kill(victim)
    time.sleep(3.0)
    lab.heal("ctl")
    after = job.wait_for_world(3, beyond_step=before["step"])
    assert len(pids_of(after) & pids_of(before)) <= 2
    finish(job, undisturbed)
