"""Workers that die, stop and raise: the others go on, and nothing of it shows in what was learned."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import time
from collections.abc import Callable, Mapping

import pytest

from elastic.records import read_record
from elastic.sampler import SlotSampler
from tests.e2e.jobs import Job, Status, members_of, pids_of

pytestmark = pytest.mark.e2e

WORKERS = 4
KILLS = 50
LONG = ("--epochs", 18)  # more steps than the kills take
SHORT = ("--epochs", 5)
STEPS = 5 * 51
SAMPLES, BATCH_SIZE, SLOTS = 1217, 4, 6  # the script's defaults


def finish(job: Job, *, steps: int) -> Status:
    """Let the job run to its end and return its summary."""
    job.let_go()
    done = job.ended(job.started["run"])
    assert done.code == 0, done.err
    summary = job.summary()
    assert summary["state"] == "succeeded" and summary["step"] == steps
    assert all(result["step"] == steps for result in job.results())
    job.assert_nothing_is_left()
    return summary


def chance_of(members: Mapping[str, Status]) -> int:
    """Return the pid of any member."""
    return int(random.choice(list(members.values()))["pid"])


def test_fifty_kills_lose_no_survivor_no_sample_and_no_bit(job: Job, undisturbed: Callable[..., str]) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    record = job.folder / "record"
    job.run(
        WORKERS,
        *("--record-samples", record, "--max-restarts", 0),  # a kill is nobody's fault and uses up no restart
        train=(*LONG, *job.held, "--pause-ms", 20),
    )
    job.wait_for_world(WORKERS, beyond_step=2)
    killed: set[int] = set()
    entered: dict[int, int] = {}  # pid -> step of the job when it was first seen as a member

    def victims(status: Status) -> list[int]:
        # Some steps later a member surely holds the state; one that does must be left, or the job is rightly lost.
        members = members_of(status).values()
        holders = [m["pid"] for m in members if m["committed"] >= entered.setdefault(m["pid"], status["step"]) + 3]
        alive = [pid for pid in holders if pid not in killed]
        return alive if len(alive) > 1 else []

    for _ in range(KILLS):
        time.sleep(chance.choice((0.0, chance.uniform(0, 0.2), chance.uniform(0, 1.0))))  # a random moment
        victim = chance.choice(job.wait_for(victims, "two workers that hold the state"))
        job.kill(victim)
        killed.add(victim)
    job.wait_for_world(WORKERS)
    finish(job, steps=18 * 51)
    # Whoever ended before the job did was killed here: as many as were killed, and all of them by SIGKILL.
    ends = [line for line in job.said("run").splitlines() if re.match(r"\[controller\] worker \S+/\S+: ", line)]
    assert len(ends) == KILLS and all(line.endswith("killed by SIGKILL") for line in ends)
    sampler = SlotSampler(SAMPLES, BATCH_SIZE, SLOTS, 0, True, False)
    expected = {(step, slot): sampler.ids(step, slot) for step in range(1, 18 * 51 + 1) for slot in range(SLOTS)}
    assert read_record(record) == {key: ids for key, ids in expected.items() if ids}
    assert job.fingerprint() == undisturbed(*LONG)


def test_a_job_shrinks_to_one_worker_and_grows_again_to_the_same_bits(job: Job, undisturbed: Callable[..., str]) -> None:
    job.run(WORKERS, train=(*SHORT, *job.held))
    before = job.wait_for_world(WORKERS, beyond_step=3)
    survivor, *others = [worker["pid"] for worker in members_of(before).values()]
    for pid in others:
        job.kill(pid)
    job.wait_for(lambda status: status["world_size"] == 1, "a world of one")
    after = job.wait_for_world(WORKERS, beyond_step=before["step"])
    assert survivor in pids_of(after) and not pids_of(after) & set(others)
    summary = finish(job, steps=STEPS)
    assert 1 <= summary["incidents_total"] <= 3
    assert all(incident["detected_by"] == "pidfd" for incident in summary["incidents"])
    assert job.fingerprint() == undisturbed(*SHORT)


def test_epochs_may_end_while_a_worker_joins(job: Job, undisturbed: Callable[..., str]) -> None:
    train = ("--samples", 72, "--epochs", 80, "--per-epoch")  # three steps: an epoch is over before a joiner is ready
    job.run(3, train=(*train, *job.held))
    for _ in range(5):
        before = job.wait_for_world(3, beyond_step=3)
        job.kill(chance_of(members_of(before)))
        job.wait_for(lambda status: status["world_size"] == 2, "a world of two")
    job.wait_for_world(3, beyond_step=3)
    finish(job, steps=240)
    assert job.fingerprint() == undisturbed(*train)


def test_a_stopped_worker_is_replaced_and_does_no_harm_when_it_runs_again(
    job: Job, undisturbed: Callable[..., str]
) -> None:
    job.run(3, "--failure-timeout", 1, train=(*SHORT, *job.held))
    before = job.wait_for_world(3, beyond_step=3)
    stopped = chance_of(members_of(before))
    others = pids_of(before) - {stopped}
    job.kill(stopped, signal.SIGSTOP)
    without = job.wait_for(lambda s: s if s["world_size"] == 2 else None, "a world without it", timeout_s=10)
    with contextlib.suppress(ProcessLookupError, AssertionError):
        job.kill(stopped, signal.SIGCONT)
    after = job.wait_for_world(3, beyond_step=without["step"])
    assert others < pids_of(after) and stopped not in pids_of(after)
    summary = finish(job, steps=STEPS)
    (incident,) = summary["incidents"]
    assert incident["detected_by"] == "process state" and "stopped for 1." in incident["reason"]
    assert job.fingerprint() == undisturbed(*SHORT)


def test_a_worker_that_stops_for_less_than_the_timeout_is_waited_for(job: Job) -> None:
    job.run(3, "--failure-timeout", 3, train=(*SHORT, *job.held))
    before = job.wait_for_world(3, beyond_step=3)
    stopped = chance_of(members_of(before))
    job.kill(stopped, signal.SIGSTOP)
    time.sleep(1.0)
    job.kill(stopped, signal.SIGCONT)
    job.wait_for_steps(5)
    assert pids_of(job.wait_for_world(3)) == pids_of(before)
    assert finish(job, steps=STEPS)["incidents_total"] == 0


def test_an_exception_in_one_worker_restarts_that_worker_alone(job: Job, undisturbed: Callable[..., str]) -> None:
    job.run(3, train=(*SHORT, *job.held, "--fail", "30:1", "--failed", job.folder / "failed"))
    before = job.wait_for_world(3, beyond_step=3)
    job.wait_for(lambda status: status["incidents"], "the exception")
    after = job.wait_for_world(3, beyond_step=30)
    assert len(pids_of(before) & pids_of(after)) == 2
    summary = finish(job, steps=STEPS)
    (incident,) = summary["incidents"]
    assert incident["kind"] == "exception" and "RuntimeError: a fault of user code (step 30" in incident["reason"]
    assert "RuntimeError: a fault of user code" in (job.folder / "run/logs/a-1.1/stderr.log").read_text()
    assert job.fingerprint() == undisturbed(*SHORT)


def test_the_same_exception_on_a_second_worker_ends_the_job_with_its_sample_ids(job: Job) -> None:
    sampler = SlotSampler(SAMPLES, BATCH_SIZE, SLOTS, 0, True, False)
    step, slot = 20, 3
    ids = sampler.ids(step, slot)
    done = job.ended(job.run(3, train=("--rotten", ids[1])))
    assert done.code == 1
    summary = job.summary()
    assert summary["state"] == "failed" and f"step {step}, slot {slot}" in summary["reason"]
    assert "ValueError: this sample is rotten" in summary["reason"]
    assert summary["sample_ids"] == list(ids)
    assert "in __getitem__" in summary["traceback"]
    assert "in __getitem__" in done.err and str(ids[1]) in done.err
    job.assert_nothing_is_left()


def test_a_worker_that_always_fails_is_given_up_and_the_others_end_the_job(job: Job, undisturbed: Callable[..., str]) -> None:
    train = (*SHORT, *job.held, "--fail-worker", 1)
    job.run(3, "--max-restarts", 1, train=train)
    job.eventually(lambda: "is not restarted" in job.said("run"), "the end of patience")
    job.wait_for_world(2, beyond_step=3)
    summary = finish(job, steps=STEPS)
    assert len(job.results()) == 2 and summary["state"] == "succeeded"
    assert job.fingerprint() == undisturbed(*SHORT)


def test_a_job_whose_every_worker_fails_ends_with_the_traceback(job: Job) -> None:
    done = job.ended(job.run(1, "--max-restarts", 0, train=("--fail-worker", 0)))
    assert done.code == 1
    summary = job.summary()
    assert summary["state"] == "failed" and "this worker cannot train" in summary["reason"]
    assert "RuntimeError: this worker cannot train" in summary["traceback"]
    job.assert_nothing_is_left()
