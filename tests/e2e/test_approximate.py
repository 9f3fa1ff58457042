"""Jobs that may go on with a lost stage made from its neighbours, and say so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from elastic.records import read_record
from elastic.sampler import SlotSampler
from tests.e2e.jobs import Job, members_of, pids_of
from tests.e2e.test_pipelines import BATCH_SIZE, SAMPLES, SLOTS, STEPS_PER_EPOCH, finish

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("train_pipeline.py")
ALLOWED = ("--snapshot-every", 0, "--approximate-recovery")
WIDE = ("--blocks", 12, "--plain", "--stages", 4)


def stages_by_rank(job: Job) -> dict[int, tuple[int, int]]:
    shown = job.elastic("plan", "show", "--controller", job.address, "--json")
    assert shown.code == 0, shown.err
    return {rank: (first, last) for first, last, ranks in json.loads(shown.out)["layout"]["stages"] for rank in ranks}


def test_a_stage_between_two_others_is_made_from_them_and_nothing_is_rolled_back(job: Job) -> None:
    record, train = job.folder / "record", (*WIDE, "--epochs", 3)
    job.controller("--nnodes", "1:4", "--join-timeout", 5, *ALLOWED)
    for node in "abcd":
        job.agent(node, 1, "--record-samples", record, train=(*train, *job.held, "--pause-ms", 30), script=SCRIPT)
    before = job.wait_for_world(4, beyond_step=5)
    stages = stages_by_rank(job)
    (victim,) = (worker for worker in members_of(before).values() if worker["rank"] == 1)
    first, last = stages[1]
    job.kill(victim["pid"])
    after = job.wait_for(lambda s: s if s["approximations"] else None, "an approximation")
    (words,) = after["approximations"]
    assert f"{first} = 0." in words and f"; {last - 1} = 0." in words, words
    step = int(words.split()[2])
    assert before["step"] <= step <= after["step"]
    # The survivors go on, and the worker that takes the lost one's place is given layers by them.
    later = job.wait_for_world(4, beyond_step=step + 10)
    assert len(pids_of(before) & pids_of(later)) == 3
    assert "approximate" in job.ask("status").out
    summary = finish(job, "controller")
    assert summary["step"] == 3 * STEPS_PER_EPOCH and summary["digest"] and math.isfinite(summary["loss"])
    (incident,) = summary["incidents"]
    assert incident["steps_redone"] == 1, "the interrupted one"
    assert summary["approximations"] == [words]
    sampler = SlotSampler(SAMPLES, BATCH_SIZE, SLOTS, 0, True, False)
    steps = range(1, summary["step"] + 1)
    expected = {(step, slot): sampler.ids(step, slot) for step in steps for slot in range(SLOTS)}
    assert read_record(record) == {key: ids for key, ids in expected.items() if ids}, "no sample is used twice"


def test_the_first_stage_cannot_be_made_and_snapshots_come_first(job: Job) -> None:
    """With snapshots nothing is approximated; without, the loss of the first stage ends the job with the reason."""
    job.run(4, "--snapshot-every", 1, "--approximate-recovery", train=(*WIDE, *job.held, "--pause-ms", 30), script=SCRIPT)
    before = job.wait_for_world(4, beyond_step=3)
    job.kill(next(worker["pid"] for worker in members_of(before).values() if worker["rank"] == 2))
    after = job.wait_for_world(4, beyond_step=before["step"] + 3)
    assert after["approximations"] == [] and after["incidents_total"] == 1
    assert job.ask("stop").code == 0
    job.ended(job.started["run"])
    with Job() as other:
        other.run(4, *ALLOWED, train=(*WIDE, *other.held, "--pause-ms", 30), script=SCRIPT)
        before = other.wait_for_world(4, beyond_step=3)
        other.kill(next(worker["pid"] for worker in members_of(before).values() if worker["rank"] == 0))
        assert other.ended(other.started["run"]).code != 0
        assert "the first stage has one neighbour only" in other.summary()["reason"]


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (("--stages", 2), "there are 2 stage(s)"),
        (("--stages", 4, "--blocks", 1), "has no like in the neighbouring stages"),
    ],
)
def test_what_cannot_be_made_is_said_before_anything_is_trained(
    job: Job, train: tuple[object, ...], sentence: str
) -> None:
    job.run(4, *ALLOWED, train=(*train, *job.held), script=SCRIPT)
    assert job.ended(job.started["run"]).code != 0
    summary = job.summary()
    assert summary["step"] == 0 and "--approximate-recovery: " in summary["reason"] and sentence in summary["reason"], summary
