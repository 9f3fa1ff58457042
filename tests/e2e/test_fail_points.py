"""Deaths at every named place of the protocol, in worlds of two and of four: no survivor lost, the same bits, exactly once.

The times that a place is hit here are few; `python -m tests.e2e.test_fail_points [WORKERS ...]` hits each twenty times.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from elastic.failpoints import FailPoint
from elastic.records import read_record
from elastic.sampler import SlotSampler
from tests.e2e.jobs import Job, pids_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ELSEWHERE = (FailPoint.LAYERS_MOVING, FailPoint.STATE_FOLLOWING, FailPoint.PAIR_EXCHANGING, FailPoint.LOCAL_STEP)
"""Places that this job does not pass; the tests of those that do have them."""

HITS = 1
AFTER_A_LOSS = (FailPoint.JOINER_COPYING, FailPoint.JOINER_READY, FailPoint.COMMIT_HALF_SENT, FailPoint.PREPARED)
"""Places that are only reached when somebody has been lost and another one joins."""
SAMPLES, BATCH_SIZE, SLOTS = 1217, 4, 6


def hit(job: Job, workers: int, place: FailPoint) -> None:
    """Let one process die there, and wait until the world is whole again."""
    before = job.wait_for_world(workers, beyond_step=(job.status() or {"step": 0})["step"] + 3)
    if place in AFTER_A_LOSS:
        job.kill(next(iter(pids_of(before))))
    trigger = job.fail_points / place
    trigger.touch()
    job.eventually(lambda: not trigger.exists(), f"somebody to reach {place}")
    after = job.wait_for_world(workers, beyond_step=before["step"] + 3)
    lost = pids_of(before) - pids_of(after)
    allowed = 2 if place is FailPoint.PREPARED else 1  # there the second to die is a survivor of the first
    assert len(lost) <= allowed, f"{place} cost {len(lost)} members"


def strike(job: Job, workers: int, undisturbed: Callable[..., str], hits: int, epochs: int) -> None:
    """Hit every place so many times in one job."""
    train = ("--epochs", epochs)
    record = job.folder / "record"
    job.fail_points.mkdir()
    job.run(workers, "--record-samples", record, "--max-restarts", 0, train=(*train, *job.held, "--pause-ms", 10))
    for place in FailPoint:
        if place in ELSEWHERE:
            continue  # these workers each hold the whole model, and all the same
        if workers == 2 and place in (FailPoint.COMMIT_HALF_SENT, FailPoint.PREPARED):
            continue  # one member is left: there is nobody else to tell, or it is the last that holds the state
        for number in range(hits):
            hit(job, workers, place)
            print(f"{workers} workers, {place}: {number + 1} of {hits}", flush=True)
    job.let_go()
    done = job.ended(job.started["run"], timeout_s=60 + 0.1 * epochs * 51)
    assert done.code == 0, done.err
    summary = job.summary()
    assert summary["state"] == "succeeded" and summary["step"] == epochs * 51
    sampler = SlotSampler(SAMPLES, BATCH_SIZE, SLOTS, 0, True, False)
    steps = range(1, epochs * 51 + 1)
    expected = {(step, slot): sampler.ids(step, slot) for step in steps for slot in range(SLOTS)}
    assert read_record(record) == {key: ids for key, ids in expected.items() if ids}
    assert job.fingerprint() == undisturbed(*train)
    job.assert_nothing_is_left()


@pytest.mark.parametrize("workers", [2, 4])
def test_a_death_at_any_place_costs_nobody_else_no_sample_and_no_bit(
    job: Job, undisturbed: Callable[..., str], workers: int
) -> None:
    strike(job, workers, undisturbed, HITS, epochs=20)


def main() -> int:
    """Hit each place twenty times."""
    from tests.e2e.conftest import fingerprint_of

    for workers in [int(argument) for argument in sys.argv[1:]] or [2, 4]:
        with Job() as job:
            strike(job, workers, fingerprint_of, 20, epochs=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
