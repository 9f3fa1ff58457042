"""Jobs whose layers lie on several workers: however they are cut, and whoever is lost or comes, the bits of one process."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from elastic.failpoints import FailPoint
from elastic.records import read_record
from elastic.sampler import SlotSampler
from tests.e2e.jobs import DEADLINE_S, Job, Status, members_of, pids_of
from tests.e2e.test_fail_points import hit

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("train_pipeline.py")
SAMPLES, BATCH_SIZE, SLOTS, STEPS_PER_EPOCH = 1217, 4, 6, 51
STALL_MAX_S = 1.0
"""A loss of one stage may cost half a second more than that of a replica, on a machine with nothing else to do."""


def script(job: Job, *train: object) -> dict[str, object]:
    return {"train": train, "script": SCRIPT}


@functools.cache
def undisturbed(*train: object) -> str:
    """What one process without an agent ends with."""
    with Job() as alone:
        done = alone.call(sys.executable, SCRIPT, *train, "--out", alone.folder / "out", timeout_s=300)
        assert done.code == 0, done.err
        return alone.fingerprint()


def finish(job: Job, process: str) -> Status:
    job.let_go()
    done = job.ended(job.started[process], 2 * DEADLINE_S)
    assert done.code == 0, done.err
    summary = job.summary()
    assert summary["state"] == "succeeded", summary
    return summary


@pytest.mark.parametrize(
    ("workers", "stages", "train"),
    [
        (3, 3, ("--recompute", "--evaluate", "--autocast")),
        (5, 2, ("--schedule", "gpipe")),
    ],
)
def test_any_cut_has_the_bits_of_one_process(workers: int, stages: int, train: tuple[object, ...]) -> None:
    train = ("--epochs", 1, *train)
    with Job() as job:
        job.run(workers, train=(*train, "--stages", stages, "--out", job.folder / "out"), script=SCRIPT)
        summary = finish(job, "run")
        assert summary["step"] == STEPS_PER_EPOCH
        assert job.fingerprint() == undisturbed(*(o for o in train if o not in ("--schedule", "gpipe", "--recompute")))
        held = sorted(result["layers"] for result in job.results())
        assert [layers[0] for layers in held] == sorted(layers[0] for layers in held)
        assert {layer for layers in held for layer in layers} == set(range(9)), held
        assert len({tuple(layers) for layers in held}) == stages, held


def test_any_of_four_stages_comes_back_from_its_agent(job: Job) -> None:
    record = job.folder / "record"
    options = ("--snapshot-every", 1, "--max-restarts", 9, "--record-samples", record)
    job.run(4, *options, train=(*job.held, "--pause-ms", 30), script=SCRIPT)
    after = job.wait_for_world(4, beyond_step=3)
    for number in range(4):
        before = job.wait_for_world(4, beyond_step=after["step"] + 3)
        job.kill(sorted(pids_of(before))[number])
        after = job.wait_for_world(4, beyond_step=before["step"] + 2)
    summary = finish(job, "run")
    assert summary["step"] == 2 * STEPS_PER_EPOCH
    assert max(incident["steps_redone"] for incident in summary["incidents"]) <= 2, summary["incidents"]
    assert min(incident["seconds_lost"] for incident in summary["incidents"]) < STALL_MAX_S, summary["incidents"]
    sampler = SlotSampler(SAMPLES, BATCH_SIZE, SLOTS, 0, True, False)
    steps = range(1, summary["step"] + 1)
    expected = {(step, slot): sampler.ids(step, slot) for step in steps for slot in range(SLOTS)}
    assert read_record(record) == {key: ids for key, ids in expected.items() if ids}
    assert job.fingerprint() == undisturbed()
    job.assert_nothing_is_left()


def test_a_batch_says_which_step_was_trained_when_the_job_went_back(job: Job) -> None:
    """Else those who were ahead, and they alone, would make calls that all have to make: the script evaluates each tenth step."""
    job.run(3, "--snapshot-every", 7, "--max-restarts", 9, train=("--epochs", 1, "--stages", 3, *job.held), script=SCRIPT)
    before = job.wait_for_world(3, beyond_step=12)
    for _ in range(2):
        job.kill(min(pids_of(before)))
        before = job.wait_for_world(3, beyond_step=before["step"] + 8)
    summary = finish(job, "run")
    assert max(incident["steps_redone"] for incident in summary["incidents"]) > 1


def test_a_call_that_one_worker_makes_alone_costs_a_regroup(job: Job) -> None:
    """All wait for each other, and every link works: found within the time of a hang, also while a joiner is to come in."""
    stray = job.folder / "stray"
    options = ("--hang-timeout", 5, "--snapshot-every", 1, "--max-restarts", 9)
    job.run(3, *options, train=("--epochs", 1, "--stages", 3, "--stray", stray, *job.held), script=SCRIPT)
    before = job.wait_for_world(3, beyond_step=3)
    for killed in (False, True):
        if killed:
            job.kill(min(pids_of(before)))
        stray.touch()
        job.eventually(lambda: not stray.exists(), "somebody to stray")
        before = job.wait_for_world(3, beyond_step=before["step"] + 4)
    summary = finish(job, "run")
    broken = [incident["number"] for incident in summary["incidents"] if incident["kind"] == "collective broken"]
    assert broken, summary["incidents"]
    for number in broken:
        told = (job.folder / "run" / "ledger-incidents" / str(number) / "summary.txt").read_text()
        assert "is elsewhere than the others: an evaluation" in told and "pipeline.eval(" in told, told
    assert job.fingerprint() == undisturbed("--epochs", 1)


def test_from_four_stages_to_two_and_three(job: Job) -> None:
    # An epoch is one step, so that whatever moves would move at the end of a loop, and waits for the next one.
    train = ("--samples", SLOTS * BATCH_SIZE, "--epochs", 300, "--evaluate")
    job.controller("--nnodes", "1:6", "--join-timeout", 5, "--snapshot-every", 1, "--redundancy", "2+1")
    held = {"train": (*train, *job.held, "--pause-ms", 120), "script": SCRIPT}
    for node in "abcd":
        job.agent(node, 1, **held)
    step, size = job.wait_for_world(4, beyond_step=3)["step"], 4
    for what, node in (("kill", "b"), ("kill", "c"), ("join", "e"), ("drain", "a")):
        job.wait_for(lambda s, after=step: s if s["stable"] > after else None, "a protected snapshot")
        if what == "kill":
            job.kill_node(node)
        elif what == "join":
            job.agent(node, 1, **held)
        else:
            drained = job.ask("drain", node)
            assert drained.code == 0, drained.err
        size += 1 if what == "join" else -1
        step = job.wait_for_world(size, beyond_step=step + 2)["step"]
    summary = finish(job, "controller")
    assert summary["incidents_total"] == 2, summary["incidents"]
    assert max(incident["steps_redone"] for incident in summary["incidents"]) <= 3, summary["incidents"]
    assert job.fingerprint() == undisturbed(*train)


def test_two_by_two_goes_on_with_whoever_is_left_of_a_stage(job: Job) -> None:
    """Nothing is read from anywhere: slots of the lost worker are routed to the other one of its stage."""
    train = ("--stages", 2, "--epochs", 3)
    job.controller("--nnodes", "1:4", "--join-timeout", 5)
    for node in "abcd":
        job.agent(node, 1, train=(*train, *job.held, "--pause-ms", 30), script=SCRIPT)
    before = job.wait_for_world(4, beyond_step=3)
    first, second = (node["id"] for node in before["nodes"][:2])
    job.kill_node(first)
    before = job.wait_for_world(3, beyond_step=before["step"] + 3)
    job.kill_node(second)
    job.wait_for_world(2, beyond_step=before["step"] + 3)
    summary = finish(job, "controller")
    assert [incident["steps_redone"] for incident in summary["incidents"]] == [1, 1], summary["incidents"]
    assert job.fingerprint() == undisturbed("--epochs", 3)


PLACES = (FailPoint.BEFORE_VOTE, FailPoint.VOTED, FailPoint.VERDICT_SEEN, FailPoint.APPLYING, FailPoint.STEP_ENDED)


def test_a_death_at_any_place_of_a_step(job: Job) -> None:
    job.fail_points.mkdir()
    train = ("--epochs", 4)
    options = ("--snapshot-every", 1, "--max-restarts", 0)
    job.run(3, *options, train=(*train, *job.held, "--pause-ms", 10), script=SCRIPT)
    for place in PLACES:
        hit(job, 3, place)
    finish(job, "run")
    assert job.fingerprint() == undisturbed(*train)


def test_deaths_while_layers_move(job: Job) -> None:
    """A worker that joins takes layers over; somebody dies on the way, another one as the optimizers' state follows, or when
    it is prepared for the next world, so that what is restored was captured in one that was over at once.
    """
    job.fail_points.mkdir()
    train = ("--epochs", 10)
    held = (*train, *job.held, "--pause-ms", 250)
    job.controller("--nnodes", "1:6", "--join-timeout", 5, "--snapshot-every", 1, "--max-restarts", 9)
    for node in "abc":
        job.agent(node, 1, train=held, script=SCRIPT)
    before = job.wait_for_world(3, beyond_step=3)
    places = (FailPoint.LAYERS_MOVING, FailPoint.STATE_FOLLOWING, FailPoint.PREPARED)
    for size, node, place in zip((4, 5, 6), "def", places, strict=True):
        trigger = job.fail_points / place
        trigger.touch()
        job.agent(node, 1, train=held, script=SCRIPT)
        job.eventually(lambda trigger=trigger: not trigger.exists(), f"somebody to reach {place}")
        before = job.wait_for_world(size, beyond_step=before["step"] + 3, timeout_s=2 * DEADLINE_S)
    finish(job, "controller")
    assert job.fingerprint() == undisturbed(*train)


def test_a_job_of_two_goes_on_from_the_checkpoint_of_three(job: Job) -> None:
    train = ("--epochs", 3)
    target = job.folder / "checkpoints"
    options = ("--snapshot-every", 1, "--checkpoint-dir", target, "--checkpoint-every", 5)
    held = (*train, *job.held, "--pause-ms", 30)
    job.run(3, *options, train=held, script=SCRIPT)
    before = job.wait_for(lambda s: s if s["saved"] >= 5 else None, "a checkpoint")
    job.kill_everything()
    shutil.rmtree(job.folder / "run")
    job.run(2, *options, train=held, script=SCRIPT, name="again")
    summary = finish(job, "again")
    assert f"The checkpoint of step {before['saved']} is read" in job.said("again")
    assert summary["step"] == 3 * STEPS_PER_EPOCH
    assert job.fingerprint() == undisturbed(*train)
    values = {"model": {"0.table.weight": torch.empty(24, 16), "3.up.bias": torch.empty(16)}}
    dcp.load(values, checkpoint_id=str(max(target.glob("step-*"))))
    assert all(bool(tensor.isfinite().all()) for tensor in values["model"].values())


def test_a_slow_stage_is_relieved_of_layers(job: Job) -> None:
    slow = job.folder / "slow"
    train = ("--blocks", 12, "--wait-ms", 4, "--slow", slow, "--slots", 8, "--epochs", 20, *job.held, "--pause-ms", 0)
    job.controller("--nnodes", 4, "--snapshot-every", 1)
    for node in "abcd":
        job.agent(node, 1, train=train, script=SCRIPT)

    def layers_of_b() -> int:
        shown = job.elastic("plan", "show", "--controller", job.address, "--json")
        assert shown.code == 0, shown.err
        answer = json.loads(shown.out)
        assert answer["layout"]["step_s"] > 0 and answer["losses"]
        status = job.wait_for(lambda s: s, "a status")
        (rank,) = (worker["rank"] for name, worker in members_of(status).items() if name.startswith("b/"))
        (count,) = (last - first for first, last, ranks in answer["layout"]["stages"] if rank in ranks)
        return count

    job.wait_for_world(4, beyond_step=16)
    at_first = layers_of_b()
    slow.write_text("b 3.0")
    job.eventually(lambda: layers_of_b() < at_first, "fewer layers on the slow node", 2 * DEADLINE_S)
    explained = job.elastic("plan", "explain", "--controller", job.address, "--workers", 3)
    assert explained.code == 0 and "considered" in explained.out, explained.err
    assert job.ask("stop").code == 0


def refused(options: tuple[object, ...], edit: Callable[[str], str] | None = None) -> str:
    """What a script that cannot be trained says; `edit` changes its text."""
    with Job() as job:
        path = SCRIPT
        if edit is not None:
            path = job.folder / "edited.py"
            path.write_text(edit(SCRIPT.read_text()))
        done = job.call(sys.executable, path, "--epochs", 1, *options)
        assert done.code != 0
        return done.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (("Join(), ", "Join(), nn.Linear(3, 3), "), "which layer 6 (Linear) does not take"),
        (("torch.optim.AdamW(parameters, lr=3e-3)", "parameters"), "optimizer_fn returned a list"),
        (("F.cross_entropy(scores.float().flatten(0, 1), targets.flatten())", "scores"), "loss_fn must return"),
        (("stages=args.stages", "stages=10"), "stages=10, but the model has 9 layer(s)"),
        (("schedule=args.schedule", "schedule='zigzag'"), "schedule='zigzag' is unknown"),
        (("DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:])", "dict(d=tokens"), "pass a DataLoader"),
    ],
    ids=["mismatch", "optimizer", "loss", "stages", "schedule", "loader"],
)
def test_what_cannot_be_trained_is_said_in_one_sentence(edit: tuple[str, str], sentence: str) -> None:
    said = refused((), lambda text: text.replace(*edit))
    assert sentence in said, said


def test_layers_that_fit_nowhere_end_the_job_with_the_reason(job: Job) -> None:
    job.run(2, train=("--memory", 1000), script=SCRIPT)
    done = job.ended(job.started["run"])
    assert done.code != 0
    assert "it fits nowhere" in job.summary()["reason"], job.summary()
