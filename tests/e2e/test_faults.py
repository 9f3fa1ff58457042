"""Workers that die, stop and raise: the others go on, and nothing of it shows in what was learned."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable

import pytest

from elastic.records import read_record
from elastic.sampler import SlotSampler
from tests.e2e.jobs import Job, Status, members_of, pids_of

pytestmark = pytest.mark.e2e

WORKERS = 4
KILLS = 40
LONG = ("--epochs", 14)  # 714 steps: more than the kills take
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


def test_forty_kills_lose_no_survivor_no_sample_and_no_bit(job: Job, undisturbed: Callable[..., str]) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    record = job.folder / "record"
    job.run(
        WORKERS,
        *("--record-samples", record, "--max-restarts", 0),  # a kill is nobody's fault and uses up no restart
        train=(*LONG, *job.held),
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
    finish(job, steps=14 * 51)
    # Whoever ended before the job did was killed here: as many as were killed, and all of them by SIGKILL.
    ends = [line for line in job.said("run").splitlines() if re.match(r"\[controller\] worker \S+/\S+: ", line)]
    assert len(ends) == KILLS and all(line.endswith("killed by SIGKILL") for line in ends)
    sampler = SlotSampler(SAMPLES, BATCH_SIZE, SLOTS, 0, True, False)
    expected = {(step, slot): sampler.ids(step, slot) for step in range(1, 14 * 51 + 1) for slot in range(SLOTS)}
    assert read_record(record) == {key: ids for key, ids in expected.items() if ids}
    assert job.fingerprint() == undisturbed(*LONG)
