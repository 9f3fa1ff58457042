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
BLOCKS, WIDE_LAYERS = 12, 17
WIDE = ("--blocks", BLOCKS, "--plain", "--stages", 4)


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
    (told,) = summary["approximations"]
    assert told.startswith(words.split("; layer")[0]) and f"; layer {first} is expected " in told, "it was judged since"
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


def test_with_swapped_ends_the_first_and_the_last_stage_come_from_their_partners_and_what_has_none_bit_by_bit(
    job: Job,
) -> None:
    trace = job.folder / "trace"
    trace.mkdir()
    train = (*WIDE, "--epochs", 4, "--trace", trace)
    job.controller("--nnodes", "1:4", "--join-timeout", 5, *ALLOWED, "--swap-ends", "--max-restarts", 9)
    for node in "abcd":
        job.agent(node, 1, train=(*train, *job.held, "--pause-ms", 30), script=SCRIPT)
    explained = None
    for lost, lone in enumerate((0, WIDE_LAYERS - 1), 1):  # the embedding, the head
        before = job.wait_for_world(4, beyond_step=5 * lost)
        explained = job.elastic("plan", "explain", "--controller", job.address)
        stages = stages_by_rank(job)
        (rank,) = (rank for rank, (first, last) in stages.items() if first <= lone < last)
        has_blocks = any(1 <= layer <= BLOCKS for layer in range(*stages[rank]))
        (victim,) = (worker for worker in members_of(before).values() if worker["rank"] == rank)
        job.kill(victim["pid"])
        job.wait_for(lambda s, n=lost: s["incidents_total"] == n, "an incident")
        after = job.wait_for_world(4, beyond_step=before["step"] + 5)
        made = after["approximations"][len(before["approximations"]) :]
        assert bool(made) == has_blocks, "where all of a stage is kept in duplicate nothing is approximated"
        assert f" {lone} = " not in str(made), made
        assert lone or "1 = 1.000 x 4" in made[0], made
    assert explained is not None and explained.code == 0 and "kept in duplicate" in explained.out, explained.out + explained.err
    summary = finish(job, "controller")
    assert summary["step"] == 4 * STEPS_PER_EPOCH and summary["digest"] and math.isfinite(summary["loss"])
    assert [incident["steps_redone"] for incident in summary["incidents"]] == [1, 1]
    # Whoever is killed may have been the only one to commit its last step: in the next world that is another one.
    seen: dict[tuple[int, int], set[str]] = {}
    owners: dict[tuple[int, int], set[bool]] = {}
    for file in trace.iterdir():
        for line in file.read_text().splitlines():
            step, generation, crc, is_owner = line.split()
            seen.setdefault((int(step), int(generation)), set()).add(crc)
            owners.setdefault((int(step), int(generation)), set()).add(is_owner == "True")
    assert all(len(crcs) == 1 for crcs in seen.values()), "the embedding is the same wherever it is"
    assert {step for step, _ in seen} == set(range(1, 4 * STEPS_PER_EPOCH + 1))
    assert sum(len(each) == 2 for each in owners.values()) > 100


@pytest.mark.parametrize("ways", [("--swap-ends",), ("--skip-ratio", 0.25)], ids=["swapped", "skipping"])
def test_slots_that_go_other_ways_have_the_same_bits_across_losses_and_cuts(ways: tuple[object, ...]) -> None:
    train = ("--blocks", 12, "--stages", 4, "--epochs", 2)  # with batch norm, dropout and tied weights
    prints = []
    for disturbed in (False, True):
        with Job() as job:
            job.run(4, *ways, "--snapshot-every", 1, train=(*train, *job.held, "--pause-ms", 20), script=SCRIPT)
            before = job.wait_for_world(4, beyond_step=5)
            if disturbed:
                job.kill(next(worker["pid"] for worker in members_of(before).values() if worker["rank"] == 0))
                job.wait_for_world(4, beyond_step=before["step"] + 5)
            finish(job, "run")
            prints.append(job.fingerprint())
    assert prints[0] == prints[1]


@pytest.mark.parametrize(
    ("options", "train", "sentence"),
    [
        (ALLOWED, ("--stages", 2), "--approximate-recovery: there are 2 stage(s)"),
        (ALLOWED, ("--stages", 4, "--blocks", 1), "has no like in the neighbouring stages"),
        (("--swap-ends",), ("--blocks", 3), "--swap-ends: of 3 like layers the first and the last cannot change places"),
        (("--skip-ratio", 0.8), ("--stages", 4), "--skip-ratio 0.8: of 4 stage(s) a slot cannot pass 3 by"),
    ],
)
def test_what_cannot_be_made_is_said_before_anything_is_trained(
    job: Job, options: tuple[object, ...], train: tuple[object, ...], sentence: str
) -> None:
    job.run(4, *options, train=(*train, *job.held), script=SCRIPT)
    assert job.ended(job.started["run"]).code != 0
    summary = job.summary()
    assert summary["step"] == 0 and sentence in summary["reason"], summary
