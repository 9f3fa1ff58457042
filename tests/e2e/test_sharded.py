"""Jobs whose optimizer state is there once: whoever is lost, it comes back from memory with the bits of a whole one.

    python -m tests.e2e.test_sharded    loses all fifteen pairs of six nodes
"""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable, Sequence

import pytest

from elastic.failpoints import FailPoint
from elastic.records import read_record
from elastic.sampler import SlotSampler
from tests.e2e.conftest import fingerprint_of
from tests.e2e.jobs import DEADLINE_S, Job, Status, members_of, pids_of
from tests.e2e.test_fail_points import hit
from tests.e2e.test_snapshots import BATCH_SIZE, SAMPLES, SLOTS, STEPS, kill_all

pytestmark = pytest.mark.e2e

MODEL = ("--epochs", 5, "--model-only")
SHARDED = (*MODEL, "--shard-optimizer")
ROUNDS_DEADLINE_S = 2 * DEADLINE_S  # thirteen processes on two cores


def finish(job: Job, process: str) -> Status:
    job.let_go()
    done = job.ended(job.started[process], ROUNDS_DEADLINE_S)
    assert done.code == 0, done.err
    summary = job.summary()
    assert summary["state"] == "succeeded", summary
    return summary


@pytest.mark.parametrize("reduction", ["ordered", "fast"])
def test_without_a_fault_the_bits_are_those_of_whole_state(
    job: Job, undisturbed: Callable[..., str], reduction: str
) -> None:
    job.run(3, train=(*SHARDED, "--reduction", reduction, "--out", job.folder / "out"))
    finish(job, "run")
    if reduction == "ordered":
        assert job.fingerprint() == undisturbed(*MODEL)
    else:
        assert job.fingerprint()  # the same everywhere


def test_lost_workers_cost_no_bit_with_everything_that_a_loop_may_hold(
    job: Job, undisturbed: Callable[..., str]
) -> None:
    features = ("--with", "amp", "average", "odd")
    record = job.folder / "record"
    job.run(
        3,
        *("--snapshot-every", 1, "--max-restarts", 9, "--record-samples", record),
        train=(*SHARDED, *job.held, "--pause-ms", 20, *features),
    )
    after = job.wait_for_world(3, beyond_step=3)
    for number in range(4):
        before = job.wait_for_world(3, beyond_step=after["step"] + 3)
        if number == 3:
            kill_all(before)
        else:
            job.kill(sorted(pids_of(before))[number])
        after = job.wait_for_world(3, beyond_step=before["step"] + 2)
        assert not members_of(before).keys() <= members_of(after).keys()
    summary = finish(job, "run")
    assert summary["step"] == STEPS
    assert max(incident["steps_redone"] for incident in summary["incidents"]) <= 2, summary["incidents"]
    sampler = SlotSampler(SAMPLES, BATCH_SIZE, SLOTS, 0, True, False)
    expected = {(step, slot): sampler.ids(step, slot) for step in range(1, STEPS + 1) for slot in range(SLOTS)}
    assert read_record(record) == {key: ids for key, ids in expected.items() if ids}
    assert job.fingerprint() == undisturbed(*MODEL, *features)
    job.assert_nothing_is_left()


PLACES = (FailPoint.BEFORE_VOTE, FailPoint.VOTED, FailPoint.VERDICT_SEEN, FailPoint.APPLYING, FailPoint.STEP_ENDED)


@pytest.mark.timeout(300)
def test_a_death_at_any_place_of_a_step_costs_nobody_else_and_no_bit(job: Job, undisturbed: Callable[..., str]) -> None:
    features = ("--with", "amp", "average", "odd")
    job.fail_points.mkdir()
    job.run(3, "--snapshot-every", 1, "--max-restarts", 0, train=(*SHARDED, *job.held, "--pause-ms", 10, *features))
    for place in PLACES:
        hit(job, 3, place)
    finish(job, "run")
    assert job.fingerprint() == undisturbed(*MODEL, *features)


def test_who_joins_takes_its_part_and_who_leaves_hands_it_over(job: Job, undisturbed: Callable[..., str]) -> None:
    train = (*SHARDED, *job.held, "--pause-ms", 30)
    job.controller("--nnodes", "1:4", "--join-timeout", 5, "--snapshot-every", 1)
    for node in "abc":
        job.agent(node, 1, train=train)
    step = job.wait_for_world(3, beyond_step=3)["step"]
    for node, size in (("d", 4), ("b", 3), ("e", 4), ("a", 3)):
        if size == 4:
            job.agent(node, 1, train=train)
        else:
            drained = job.ask("drain", node)
            assert drained.code == 0, drained.err
        step = job.wait_for_world(size, beyond_step=step + 3)["step"]
    summary = finish(job, "controller")
    assert summary["step"] == STEPS and summary["incidents_total"] == 0, summary["incidents"]
    assert job.fingerprint() == undisturbed(*MODEL)


def test_a_stopped_node_is_left_behind(job: Job, undisturbed: Callable[..., str]) -> None:
    job.controller("--nnodes", "1:3", "--snapshot-every", 1, "--redundancy", "2+1")
    for node in "abc":
        job.agent(node, 1, train=(*SHARDED, *job.held, "--pause-ms", 60))
    before = job.wait_for(lambda s: s if s["stable"] >= 3 else None, "a protected snapshot")
    (stopped,) = (worker for name, worker in members_of(before).items() if name.startswith("b/"))
    job.kill(stopped["pid"], signal.SIGSTOP)
    after = job.wait_for_world(3, beyond_step=before["step"] + 4)
    assert stopped["pid"] not in pids_of(after)
    finish(job, "controller")
    assert job.fingerprint() == undisturbed(*MODEL)


def test_without_snapshots_a_lost_worker_ends_the_job_with_the_reason(job: Job) -> None:
    job.run(2, "--snapshot-every", 0, train=(*SHARDED, *job.held, "--pause-ms", 20))
    before = job.wait_for_world(2, beyond_step=3)
    assert job.said("run").count("no snapshots are taken: the loss of any worker") == 1
    job.kill(min(pids_of(before)))
    done = job.ended(job.started["run"])
    assert done.code != 0
    assert "no survivor holds all of the state" in done.err and "no snapshot was taken" in done.err


LONG = ("--epochs", 18, "--model-only")
PACE_MS = 350
PAIRS = tuple(itertools.combinations("abcdef", 2))
"""All that there are; the test takes each node once, and each way of losing two once."""
TESTED_PAIRS = tuple(tuple(pair) for pair in ("ab", "cd", "ef"))


def start_six(job: Job, *options: object) -> Status:
    job.controller("--nnodes", "1:6", "--snapshot-every", 1, "--join-timeout", 60, "--redundancy", "4+2", *options)
    for node in "abcdef":
        start_node(job, node)
    return job.wait_for_world(6, beyond_step=1, timeout_s=ROUNDS_DEADLINE_S)


def start_node(job: Job, node: str) -> None:
    job.agent(node, 1, train=(*LONG, "--shard-optimizer", *job.held, "--pause-ms", PACE_MS))


def protected_world(job: Job, size: int, beyond_step: int) -> Status:
    """A world of this size whose snapshots are protected as fast as they are taken."""

    def there(status: Status) -> Status | None:
        at_risk = status["step"] - status["stable"]
        is_so = status["world_size"] == size and status["stable"] > beyond_step and at_risk <= 2
        return status if is_so else None

    return job.wait_for(there, f"a protected world of {size}", ROUNDS_DEADLINE_S)


def count_restores(job: Job) -> int:
    return job.said("controller").count("is restored: ")


def lose_at_once(job: Job, pair: tuple[str, ...]) -> int:
    for node in pair:
        job.kill_node(node)
    return 6 - len(pair)


def lose_one_while_the_other_is_decoded(job: Job, pair: tuple[str, ...]) -> int:
    before = count_restores(job)
    job.kill_node(pair[0])
    job.eventually(lambda: count_restores(job) > before or None, "a choice")
    job.kill_node(pair[1])
    return 4


def lose_a_third_when_parity_is_rebuilt(job: Job, pair: tuple[str, ...]) -> int:
    step = (job.status() or {"step": 0})["step"]
    protected_world(job, lose_at_once(job, pair), step)
    job.kill_node(min(set("abcdef") - set(pair)))
    return 3


WAYS = (lose_at_once, lose_one_while_the_other_is_decoded, lose_a_third_when_parity_is_rebuilt)


@pytest.mark.timeout(600)
def test_any_two_of_six_nodes_may_be_lost_at_once(job: Job, undisturbed: Callable[..., str]) -> None:
    lose_pairs(job, undisturbed, TESTED_PAIRS)


def lose_pairs(job: Job, undisturbed: Callable[..., str], pairs: Sequence[tuple[str, ...]]) -> None:
    step = start_six(job)["step"]
    for number, pair in enumerate(pairs):
        before = protected_world(job, 6, step)
        left = WAYS[number % len(WAYS)](job, pair)
        after = job.wait_for_world(left, beyond_step=before["step"] + 1, timeout_s=ROUNDS_DEADLINE_S)
        for node in set("abcdef") - {node["id"] for node in after["nodes"] if node["state"] == "attached"}:
            start_node(job, node)
        step = after["step"]
    protected_world(job, 6, step)
    summary = finish(job, "controller")
    # Two committed ones and the interrupted one.
    assert max(incident["steps_redone"] for incident in summary["incidents"]) <= 3, summary["incidents"]
    assert "decoded with (4,2)" in job.said("controller")
    assert job.fingerprint() == undisturbed(*LONG)


def test_three_of_six_at_once_are_the_next_rungs(job: Job, undisturbed: Callable[..., str]) -> None:
    target = job.folder / "saved"
    started = start_six(job, "--checkpoint-dir", target, "--checkpoint-every", 5)
    saved = job.wait_for(lambda s: s if s["saved"] > 0 else None, "a checkpoint", ROUNDS_DEADLINE_S)
    before = protected_world(job, 6, max(started["step"], saved["step"]))
    lose_at_once(job, ("a", "c", "e"))
    job.wait_for_world(3, beyond_step=before["step"] - 8, timeout_s=ROUNDS_DEADLINE_S)
    said = job.said("controller")
    assert "1 more than the 2 of 6 that the protection group survives" in said
    assert "The checkpoint of step" in said and "is read" in said
    finish(job, "controller")
    assert job.fingerprint() == undisturbed(*LONG)


def main() -> int:
    """Lose every pair of six nodes."""
    with Job() as job:
        lose_pairs(job, fingerprint_of, PAIRS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
