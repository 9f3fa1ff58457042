"""Pipelines that agree in rounds: stages whose workers train by themselves, and what comes of it when one is lost."""

from __future__ import annotations

import math
import sys

import pytest

from elastic.failpoints import FailPoint
from elastic.records import read_record
from elastic.sampler import SlotSampler
from tests.e2e.jobs import Job, members_of, pids_of
from tests.e2e.test_fail_points import hit
from tests.e2e.test_pipelines import BATCH_SIZE, SAMPLES, SCRIPT, finish

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EVERY, SLOTS = 4, 4
ROUNDS_PER_EPOCH = -(-SAMPLES // (EVERY * SLOTS * BATCH_SIZE))
LOCAL = ("--diloco", EVERY, "--slots", SLOTS, "--virtual-replicas", 2)


@pytest.mark.parametrize(("train", "off"), [((), 2e-3), (("--autocast", "--quantize", "int8", "--evaluate"), 2e-2)])
def test_one_chain_of_stages_comes_to_what_one_process_does(job: Job, train: tuple[object, ...], off: float) -> None:
    train = (*LOCAL, "--epochs", 1, "--plain", *train)
    with Job() as alone:
        done = alone.call(sys.executable, SCRIPT, *train, "--out", alone.folder / "out", timeout_s=300)
        assert done.code == 0, done.err
        (expected,) = alone.results()
    job.run(3, train=(*train, "--stages", 3, "--out", job.folder / "out"), script=SCRIPT)
    assert finish(job, "run")["step"] == ROUNDS_PER_EPOCH
    for result in job.results():
        assert result["loss"] == pytest.approx(expected["loss"], rel=off)
        assert result["losses"] == pytest.approx(expected["losses"], rel=off)


def test_two_workers_of_each_stage_agree_and_any_of_them_may_be_lost(job: Job) -> None:
    """With random routing, dropout and batch norm; a death in the middle of a round costs the round, and no sample."""
    record = job.folder / "record"
    train = (*LOCAL, "--random-routing", "--epochs", 3, *job.held, "--pause-ms", 20)
    job.fail_points.mkdir()
    options = ("--snapshot-every", 1, "--max-restarts", 20, "--record-samples", record)
    job.run(4, *options, train=(*train, "--stages", 2), script=SCRIPT)
    for place in (FailPoint.LOCAL_STEP, FailPoint.VERDICT_SEEN):
        hit(job, 4, place)
    after = job.wait_for_world(4, beyond_step=4)
    for rank in (3, 1):
        before = job.wait_for_world(4, beyond_step=after["step"] + 1)
        job.kill(next(worker["pid"] for worker in members_of(before).values() if worker["rank"] == rank))
        after = job.wait_for_world(4, beyond_step=before["step"] + 2)
        assert len(pids_of(before) & pids_of(after)) == 3
    summary = finish(job, "run")
    assert summary["step"] == 3 * ROUNDS_PER_EPOCH and summary["digest"]
    results = job.results()
    assert len({result["fingerprint"] for result in results}) == 1
    assert math.isfinite(results[0]["loss"])
    sampler = SlotSampler(SAMPLES, BATCH_SIZE * EVERY, SLOTS, 0, True, False)
    steps = range(1, summary["step"] + 1)
    expected = {(step, slot): sampler.ids(step, slot) for step in steps for slot in range(SLOTS)}
    found = {key: ids for key, ids in read_record(record).items() if ids}
    assert found == {key: ids for key, ids in expected.items() if ids}
