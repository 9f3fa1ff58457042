"""Rounds that are dealt by speed, with real workers: nobody waits for a slow one, and each sample is used once."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path

import pytest

from elastic.records import read_record
from tests.e2e.jobs import Job, Status, members_of, pids_of
from tests.e2e.test_pipelines import finish
from tests.e2e.train_dynamic import BATCH_SIZE, EVERY, SAMPLES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("train_dynamic.py")


def assert_each_sample_was_used_once(record: Path, epochs: int) -> None:
    used = Counter(sample for ids in read_record(record).values() for sample in ids)
    assert used == Counter({sample: epochs for sample in range(SAMPLES)})


@pytest.mark.parametrize("sync", ["diloco", "streaming", "noloco", "async"])
def test_whoever_is_killed_each_sample_is_used_once_and_no_round_is_computed_twice(job: Job, sync: str) -> None:
    record, train = job.folder / "record", ("--log", job.folder / "log", "--go", job.folder / "go", "--sync", sync)
    job.run(3, "--max-restarts", 20, "--record-samples", record, train=train, script=SCRIPT)
    after = job.wait_for_world(3, beyond_step=2)
    for rank in (1, 0, 2):
        before = job.wait_for_world(3, beyond_step=after["step"] + 1)
        job.kill(next(worker["pid"] for worker in members_of(before).values() if worker["rank"] == rank))
        after = job.wait_for_world(3, beyond_step=before["step"] + 2)
        assert len(pids_of(before) & pids_of(after)) == 2
    summary = finish(job, "run")
    lines = job.lines()
    epochs = max(line["epoch"] for line in lines) + 1
    assert_each_sample_was_used_once(record, epochs)
    if sync != "async":  # there what a lost one had not given counts twice
        assert summary["samples"] == epochs * SAMPLES
    by_step: dict[int, set[str]] = {}
    for line in lines:
        by_step.setdefault(line["step"], set()).add(f"{line['digest']} {line['lr']} {line['loss']}")
    assert all(len(found) == 1 for found in by_step.values()), "all see the same model, loss and learning rate"
    # A survivor's local steps go on through a loss: it takes no more of them than were dealt to it, but where a worker died as
    # the round was being dealt (then it is dealt anew), or in an epoch's last round.
    dealt_anew = {line["step"] for line in lines if line["taken"] > line["dealt"] and not line["is_short"]}
    assert len(dealt_anew) < 3, dealt_anew


def test_a_slow_worker_takes_fewer_local_steps_and_nobody_waits_for_it(job: Job) -> None:
    train = ("--log", job.folder / "log", "--go", job.folder / "go", "--slow-rank", 1, "--pause-ms", 12)
    job.run(3, train=train, script=SCRIPT)
    job.wait_for_world(3, beyond_step=14)
    finish(job, "run")
    settled = [line for line in job.lines() if line["step"] > 4 and not line["is_short"]]
    taken = {rank: statistics.median(line["taken"] for line in settled if line["rank"] == rank) for rank in range(3)}
    # It is four times as slow: 4/9, 1/9 and 4/9 of a round, give or take what else its steps and the machine's do.
    assert taken[1] < 0.5 * min(taken[0], taken[2]), taken
    assert sum(taken.values()) == pytest.approx(3 * EVERY, abs=3)
    # Beside three equal workers a round takes 4 x EVERY pauses with equal shares, and 4/3 x EVERY with these.
    seconds = statistics.median(line["seconds"] for line in settled)
    assert seconds < 0.7 * 4 * EVERY * 0.012, f"{seconds} s"


def test_a_worker_that_stands_still_for_a_while_is_not_waited_for(job: Job) -> None:
    """Its local steps suddenly take very long: it gives what it has, and the rest is dealt with the next round."""
    record = job.folder / "record"
    train = ("--log", job.folder / "log", "--go", job.folder / "go", "--stall-at", 5, "--stall-s", 1.0)
    job.run(3, "--record-samples", record, train=train, script=SCRIPT)
    job.wait_for_world(3, beyond_step=9)
    finish(job, "run")
    lines = job.lines()
    late = [line for line in lines if line["step"] == 5 and line["taken"] < line["dealt"]]
    assert len(late) == 1, "one of the three has not come to all of it"
    dealt = {step: sum(line["dealt_samples"] for line in lines if line["step"] == step) for step in (4, 5, 6)}
    assert dealt[4] == dealt[5] == 3 * EVERY * BATCH_SIZE
    assert dealt[6] == dealt[4] + late[0]["dealt_samples"] - late[0]["taken_samples"]
    assert_each_sample_was_used_once(record, max(line["epoch"] for line in lines) + 1)


def numbers_of(nodes: dict[str, int], sync: str) -> tuple[list[float], Status]:
    """Train with one island of these nodes, by their workers; returns the model's numbers, and the job's summary."""
    with Job() as job:
        job.let_go()
        out = job.folder / "numbers"
        train = ("--log", job.folder / "log", "--go", job.folder / "go", "--sync", sync, "--plain", "--slots", 1, "--out", out)
        job.controller("--nnodes", len(nodes))
        for node, workers in nodes.items():
            job.agent(node, workers, "--label", "island=x", train=(*train, "--pause-ms", 0), script=SCRIPT)
        assert job.ended(job.started["controller"]).code == 0, job.said("controller")
        return json.loads(out.read_text()), job.summary()


@pytest.mark.parametrize("sync", ["diloco", "async"])
def test_the_workers_of_an_island_train_what_one_worker_would(sync: str) -> None:
    alone, summary = numbers_of({"a": 1}, sync)
    together, other = numbers_of({"a": 2, "b": 1}, sync)
    assert together == pytest.approx(alone, rel=1e-3, abs=1e-5)
    assert other["step"] == summary["step"] and other["samples"] == summary["samples"] == SAMPLES


def test_islands_lose_members_and_get_them_back_and_each_sample_is_used_once(job: Job) -> None:
    """Its local steps of the round are lost with a member of an island, and dealt again; those of other islands go on."""
    record = job.folder / "record"
    train = ("--log", job.folder / "log", "--go", job.folder / "go", "--sync", "streaming")
    job.controller("--nnodes", 3, "--max-restarts", 20)
    for node, island in (("a", "x"), ("b", "y"), ("c", "")):
        label = ("--label", f"island={island}") if island else ()
        job.agent(node, 2 if island else 1, *label, "--record-samples", record, train=train, script=SCRIPT)
    after = job.wait_for_world(5, beyond_step=2)
    for victim in ("a/1", "b/0", "c/0", "a/0"):
        before = job.wait_for_world(5, beyond_step=after["step"] + 1)
        job.kill(next(worker["pid"] for name, worker in members_of(before).items() if name.startswith(victim)))
        after = job.wait_for_world(5, beyond_step=before["step"] + 2)
        assert len(pids_of(before) & pids_of(after)) == 4
    summary = finish(job, "controller")
    lines = job.lines()
    epochs = max(line["epoch"] for line in lines) + 1
    assert_each_sample_was_used_once(record, epochs)
    assert summary["samples"] == epochs * SAMPLES
    by_step: dict[int, set[str]] = {}
    for line in lines:
        by_step.setdefault(line["step"], set()).add(f"{line['digest']} {line['lr']} {line['loss']}")
    assert all(len(found) == 1 for found in by_step.values())


def test_islands_need_rounds_that_are_dealt_by_speed(job: Job) -> None:
    train = ("--diloco", 5, "--slots", 4, "--epochs", 1)
    job.controller("--nnodes", 1)
    job.agent("a", 2, "--label", "island=x", train=train)
    done = job.ended(job.started["controller"])
    assert done.code == 1 and "pass dynamic=True" in done.err, done.err
