"""Jobs that lose every worker at once and go on from the memory of their agents: no file, the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable

import pytest

from elastic.records import read_record
from elastic.sampler import SlotSampler
from tests.e2e.jobs import Job, Status, members_of, pids_of

pytestmark = pytest.mark.e2e

STEPS = 5 * 51
SHORT = ("--epochs", 5)
SAMPLES, BATCH_SIZE, SLOTS = 1217, 4, 6  # the script's defaults


def kill_all(status: Status) -> None:
    """Kill every worker of the world at once."""
    for pid in pids_of(status):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_worker_killed_at_once_costs_one_step_and_no_bit(
    job: Job, undisturbed: Callable[..., str], workers: int
) -> None:
    record = job.folder / "record"
    job.run(
        workers,
        *("--snapshot-every", 1, "--max-restarts", 0, "--record-samples", record),
        train=(*SHORT, *job.held, "--pause-ms", 20),
    )
    for _ in range(3):
        before = job.wait_for_world(workers, beyond_step=(job.status() or {"step": 0})["step"] + 3)
        kill_all(before)
        after = job.wait_for_world(workers, beyond_step=before["step"] + 2)
        assert not pids_of(before) & pids_of(after)
    assert {worker.rpartition(".")[2] for worker in members_of(after)} == {"4"}
    job.let_go()
    done = job.ended(job.started["run"])
    assert done.code == 0, done.err
    summary = job.summary()
    assert summary["state"] == "succeeded" and summary["step"] == STEPS
    assert max(incident["steps_redone"] for incident in summary["incidents"]) <= 2, summary["incidents"]
    sampler = SlotSampler(SAMPLES, BATCH_SIZE, SLOTS, 0, True, False)
    expected = {(step, slot): sampler.ids(step, slot) for step in range(1, STEPS + 1) for slot in range(SLOTS)}
    assert read_record(record) == {key: ids for key, ids in expected.items() if ids}
    assert job.fingerprint() == undisturbed(*SHORT)
    job.assert_nothing_is_left()


def start_nodes(job: Job, nodes: str, *options: object) -> Status:
    """Start a controller and an agent with one worker for each letter."""
    job.controller("--nnodes", f"1:{len(nodes)}", "--snapshot-every", 1, "--join-timeout", 60, *options)
    for node in nodes:
        job.agent(node, 1, train=(*SHORT, *job.held, "--pause-ms", 30))
    return job.wait_for_world(len(nodes), beyond_step=3)


def finish_nodes(job: Job, undisturbed: Callable[..., str], not_before: int) -> None:
    """Let the job run to its end; it went on from a step that is not before this one."""
    job.let_go()
    done = job.ended(job.started["controller"])
    assert done.code == 0, done.err
    summary = job.summary()
    assert summary["state"] == "succeeded" and summary["step"] == STEPS
    assert min(incident["step"] for incident in summary["incidents"]) >= not_before, summary["incidents"]
    assert job.fingerprint() == undisturbed(*SHORT)


def test_workers_of_two_nodes_read_each_others_slices(job: Job, undisturbed: Callable[..., str]) -> None:
    before = start_nodes(job, "ab")
    kill_all(before)
    after = job.wait_for_world(2, beyond_step=before["step"] + 2)
    assert not pids_of(before) & pids_of(after)
    finish_nodes(job, undisturbed, not_before=before["step"] - 1)


def test_a_lost_nodes_slice_is_decoded_from_parity(job: Job, undisturbed: Callable[..., str]) -> None:
    before = start_nodes(job, "abc", "--redundancy", "2+1")
    stable = job.wait_for(lambda s: s if s["stable"] >= 3 else None, "a protected snapshot")
    job.kill_node("c")
    kill_all(before)
    after = job.wait_for_world(2, beyond_step=stable["step"] + 2)
    assert not pids_of(before) & pids_of(after)
    assert "decoded" in job.said("controller")
    finish_nodes(job, undisturbed, not_before=stable["stable"])


def test_with_a_join_token_what_passes_between_keepers_is_encrypted(job: Job, undisturbed: Callable[..., str]) -> None:
    job.token = "a secret of this job"
    before = start_nodes(job, "abc", "--redundancy", "2+1")
    stable = job.wait_for(lambda s: s if s["stable"] >= 3 else None, "a protected snapshot")
    job.kill_node("c")
    kill_all(before)
    job.wait_for_world(2, beyond_step=stable["step"] + 2)
    assert "decoded" in job.said("controller")
    job.agent("c", 1, train=(*SHORT, *job.held, "--pause-ms", 30))
    again = job.wait_for_world(3, beyond_step=stable["step"] + 4)
    job.wait_for(lambda s: s if s["stable"] > again["step"] else None, "a snapshot that three nodes protect")
    opened = [json.loads(line) for line in job.ask("events", "--json").out.splitlines()]
    keys = {
        node["data_key"]
        for event in opened
        if event["kind"] == "generation-opened"
        for node in event["data"]["plan"]["nodes"]
    }
    assert len(keys) == 4 and "" not in keys, "three agents, and the one that came back, each with a key of its own"
    finish_nodes(job, undisturbed, not_before=stable["stable"])
