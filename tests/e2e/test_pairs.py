"""NoLoCo with real workers: both sides of a pair take its step or neither, whoever is killed when, or comes."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from elastic.failpoints import FailPoint
from elastic.records import read_record
from elastic.sampler import SlotSampler
from elastic.sync import NoLoCo
from elastic.sync.pairs import ALONE, partners_of
from tests.e2e.jobs import Job, pids_of
from tests.e2e.test_fail_points import hit
from tests.e2e.test_pipelines import finish
from tests.e2e.train_pairs import EVERY, MEAN_EVERY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("train_pairs.py")
SYNC = NoLoCo(EVERY, mean_every=MEAN_EVERY)
ROUNDING = 1e-5

Line = dict[str, Any]


def assert_pairs_are_whole(lines: list[Line], seed: int = 0) -> int:
    """Of each pair of which both wrote a step down, both took the pair's; returns how many.

    delta_i' - delta_j' = alpha (delta_i - delta_j) - gamma (phi_i - phi_j), whatever they learnt; and all took the step of the
    same world, so that none took one by itself.
    """
    by_step: dict[int, list[Line]] = {}
    for line in lines:
        by_step.setdefault(line["step"], []).append(line)
    pairs = 0
    for step, several in by_step.items():
        generations = {line["generation"] for line in several}
        assert len(generations) == 1, f"step {step} was committed in the worlds {generations}"
        by_rank = {line["rank"]: line for line in several}
        partners = partners_of(seed, several[0]["generation"], step, several[0]["world"])
        for rank, partner in enumerate(partners):
            if partner == ALONE or rank > partner or rank not in by_rank or partner not in by_rank:
                continue
            mine, theirs = by_rank[rank], by_rank[partner]
            pairs += 1
            for before, after in zip(
                zip(*mine["before"], *theirs["before"], strict=True),
                zip(*mine["after"], *theirs["after"], strict=True),
                strict=True,
            ):
                phi, delta, their_phi, their_delta = before
                expected = SYNC.alpha * (delta - their_delta) - SYNC.gamma * (phi - their_phi)
                assert after[1] - after[3] == pytest.approx(expected, abs=ROUNDING)
                assert after[0] == pytest.approx(phi + after[1], abs=ROUNDING)
    return pairs


def assert_means_are(lines: list[Line]) -> None:
    """What user code sees is the mean of all as of the newest round whose mean was made, weighted by slots."""
    by_step: dict[int, list[Line]] = {}
    for line in lines:
        by_step.setdefault(line["step"], []).append(line)
    seen = 0
    for step, several in by_step.items():
        assert all(line["mean"] == several[0]["mean"] for line in several), f"after step {step}"
        if step % MEAN_EVERY or len(several) < several[0]["world"]:
            continue
        weight = sum(len(line["slots"]) for line in several)
        for place, mean in enumerate(several[0]["mean"]):
            total = sum(line["after"][0][place] * len(line["slots"]) for line in several)
            assert mean == pytest.approx(total / weight, abs=ROUNDING)
        seen += 1
    assert seen


@pytest.mark.parametrize(("workers", "options"), [(4, ()), (3, ("--quantize", "int8"))])
def test_pairs_come_nearer_and_the_mean_is_that_of_all(job: Job, workers: int, options: tuple[str, ...]) -> None:
    job.let_go()
    job.run(workers, train=("--log", job.folder / "log", "--go", job.folder / "go", "--steps", 40, *options), script=SCRIPT)
    assert finish(job, "run")["step"] == 40
    lines = job.lines()
    assert {(line["step"], line["rank"]) for line in lines} == {(s, r) for s in range(1, 41) for r in range(workers)}
    assert assert_pairs_are_whole(lines) == 40 * (workers // 2)
    if workers == 4:  # a step of three deals four slots, the last of an epoch fewer
        assert_means_are([line for line in lines if line["step"] % 20])
    spreads = [line["spread"] for line in lines if line["step"] > MEAN_EVERY]
    assert min(spreads) > 0 and max(spreads) < 0.5
    losses = {line["step"]: line["loss"] for line in lines}
    assert losses[40] < 0.7 * losses[1]


PLACES = (
    FailPoint.PAIR_EXCHANGING,
    FailPoint.BEFORE_VOTE,
    FailPoint.VOTED,
    FailPoint.VERDICT_SEEN,
    FailPoint.APPLYING,
    FailPoint.STEP_ENDED,
)


def test_wherever_one_dies_no_pair_is_half_applied_and_each_sample_is_used_once(job: Job) -> None:
    record = job.folder / "record"
    train = ("--log", job.folder / "log", "--go", job.folder / "go")
    job.fail_points.mkdir()
    job.run(5, "--max-restarts", 20, "--record-samples", record, train=(*train, "--slots", 6), script=SCRIPT)
    for place in PLACES:
        hit(job, 5, place)
    dice = random.Random(3)
    after = job.wait_for_world(5)
    for _ in range(2):
        job.kill(dice.choice(sorted(pids_of(after))))
        after = job.wait_for_world(5, beyond_step=after["step"] + dice.randrange(1, 4))
    summary = finish(job, "run")
    lines = job.lines()
    assert assert_pairs_are_whole(lines) > summary["step"]
    for step in {line["step"] for line in lines}:
        assert len({str(line["mean"]) for line in lines if line["step"] == step}) == 1
    assert all(math.isfinite(value) for line in lines for value in line["after"][0])
    assert max(line["spread"] for line in lines if not math.isnan(line["spread"])) < 0.5
    sampler = SlotSampler(1217, 4 * EVERY, 6, 0, True, False)
    steps = range(1, summary["step"] + 1)
    expected = {(step, slot): sampler.ids(step, slot) for step in steps for slot in range(6)}
    assert read_record(record) == {key: ids for key, ids in expected.items() if ids}


def test_a_joiner_begins_as_a_copy_of_another_replica(job: Job) -> None:
    train = ("--log", job.folder / "log", "--go", job.folder / "go")
    job.run(2, "--max-restarts", 9, train=train, script=SCRIPT)
    before = job.wait_for_world(2, beyond_step=5)
    job.kill(min(pids_of(before)))
    job.wait_for_world(2, beyond_step=before["step"] + 5)
    finish(job, "run")
    lines = job.lines()
    first = min(line["step"] for line in lines if line["worker"].endswith(".2"))
    several = [line for line in lines if line["step"] == first]
    assert len(several) == 2
    assert several[0]["before"] == several[1]["before"] and several[0]["after"] != several[1]["before"]
    assert_pairs_are_whole(lines)


def test_all_die_and_all_go_on_from_the_mean(job: Job) -> None:
    train = ("--log", job.folder / "log", "--go", job.folder / "go")
    job.run(2, "--snapshot-every", 1, train=train, script=SCRIPT)
    before = job.wait_for_world(2, beyond_step=6)
    for pid in pids_of(before):
        job.kill(pid)
    job.wait_for_world(2, beyond_step=before["step"] + 3)
    summary = finish(job, "run")
    lines = job.lines()
    went_back = [line for line in lines if line["worker"].endswith(".2")]
    first = min(line["step"] for line in went_back)
    assert (first - 1) % MEAN_EVERY == 0, "only the state of a round whose mean was made is captured"
    mean = next(line["mean"] for line in lines if line["step"] == first - 1)
    for line in went_back:
        if line["step"] == first:
            assert line["before"] == [mean, [0.0] * len(mean)]
    assert summary["step"] > before["step"]
    assert_pairs_are_whole(went_back)
