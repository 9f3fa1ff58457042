"""Jobs whose replicas train by themselves for some steps: however many workers there are, and whoever is lost or comes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastic.records import read_record
from elastic.sampler import SlotSampler
from tests.e2e.jobs import Job, members_of, pids_of
from tests.e2e.test_pipelines import finish

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SAMPLES, BATCH_SIZE, REPLICAS, EVERY = 1217, 4, 4, 5
ROUNDS_PER_EPOCH = 16
LOCAL = ("--diloco", EVERY, "--slots", REPLICAS, "--virtual-replicas", REPLICAS, "--model-only")


@pytest.mark.parametrize(
    ("workers", "fragments", "options"),
    [(2, 0, ()), (3, 0, ("--quantize", "fp4")), (3, 2, ("--quantize", "int8"))],
)
def test_any_number_of_workers_comes_to_the_bits_of_one_process(
    job: Job, undisturbed: Callable[..., str], workers: int, fragments: int, options: tuple[str, ...]
) -> None:
    """Batch norm and dropout, AdamW, clipping and a schedule: each replica has its own, whoever computes it."""
    train = (*LOCAL, "--epochs", 2, *options)
    if fragments:
        train = (*train, "--diloco", fragments * EVERY, "--fragments", fragments)
    job.run(workers, train=(*train, "--out", job.folder / "out"))
    summary = finish(job, "run")
    assert summary["step"] == 2 * ROUNDS_PER_EPOCH
    assert job.fingerprint() == undisturbed(*train)


def test_a_replica_that_is_lost_is_computed_again_and_a_joiner_is_given_what_is_agreed(
    job: Job, undisturbed: Callable[..., str]
) -> None:
    """With an inner optimizer that learns nothing, so that nothing is lost with a replica: the same bits."""
    record = job.folder / "record"
    train = (*LOCAL, "--optimizer", "plain", "--epochs", 6)
    held = (*train, *job.held, "--pause-ms", 15)
    job.run(3, "--max-restarts", 9, "--record-samples", record, train=held)
    after = job.wait_for_world(3, beyond_step=2)
    for _ in range(3):
        before = job.wait_for_world(3, beyond_step=after["step"] + 2)
        job.kill(next(worker["pid"] for worker in members_of(before).values() if worker["rank"] == 1))
        after = job.wait_for_world(3, beyond_step=before["step"] + 2)
        assert len(pids_of(before) & pids_of(after)) == 2
    summary = finish(job, "run")
    assert summary["step"] == 6 * ROUNDS_PER_EPOCH
    assert [incident["steps_redone"] for incident in summary["incidents"]] == [1, 1, 1]
    sampler = SlotSampler(SAMPLES, BATCH_SIZE * EVERY, REPLICAS, 0, True, False)
    steps = range(1, summary["step"] + 1)
    expected = {(step, slot): sampler.ids(step, slot) for step in steps for slot in range(REPLICAS)}
    assert read_record(record) == {key: ids for key, ids in expected.items() if ids}
    assert job.fingerprint() == undisturbed(*train)


def test_workers_run_ahead_of_an_exchange_and_lose_no_sample_when_it_breaks(job: Job) -> None:
    record = job.folder / "record"
    train = (*LOCAL, "--epochs", 8, "--diloco", 2 * EVERY, "--fragments", 2, "--overlap", 3)
    held = (*train, *job.held, "--pause-ms", 15)
    job.run(3, "--max-restarts", 9, "--snapshot-every", 1, "--record-samples", record, train=held)
    after = job.wait_for_world(3, beyond_step=2)
    for rank in (1, 0, 2, 1, 2):
        before = job.wait_for_world(3, beyond_step=after["step"] + 2)
        job.kill(next(worker["pid"] for worker in members_of(before).values() if worker["rank"] == rank))
        after = job.wait_for_world(3, beyond_step=before["step"] + 2)
        assert len(pids_of(before) & pids_of(after)) == 2
    summary = finish(job, "run")
    assert summary["step"] == 8 * ROUNDS_PER_EPOCH
    assert all(incident["steps_redone"] <= 1 for incident in summary["incidents"])
    sampler = SlotSampler(SAMPLES, BATCH_SIZE * EVERY, REPLICAS, 0, True, False)
    steps = range(1, summary["step"] + 1)
    expected = {(step, slot): sampler.ids(step, slot) for step in steps for slot in range(REPLICAS)}
    assert read_record(record) == {key: ids for key, ids in expected.items() if ids}
    assert len({str(result["fingerprint"]) for result in job.results()}) == 1


def test_all_die_and_a_snapshot_of_what_was_agreed_is_gone_on_from(
    job: Job, undisturbed: Callable[..., str]
) -> None:
    train = (*LOCAL, "--optimizer", "plain", "--epochs", 3)
    job.run(2, "--snapshot-every", 1, train=(*train, *job.held, "--pause-ms", 15))
    before = job.wait_for_world(2, beyond_step=3)
    for pid in pids_of(before):
        job.kill(pid)
    job.wait_for_world(2, beyond_step=before["step"] + 2)
    finish(job, "run")
    assert job.fingerprint() == undisturbed(*train)
