"""Jobs that write checkpoints: written beside training, continued from, and never a reason to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.jobs import DEADLINE_S, Job, Status

pytestmark = pytest.mark.e2e

STEPS = 5 * 51
SHORT = ("--epochs", 5)
WORKERS = 2


def start(job: Job, target: Path, *options: object, name: str = "run") -> None:
    job.run(
        WORKERS,
        *("--snapshot-every", 1, "--checkpoint-dir", target, *options),
        train=(*SHORT, *job.held, "--pause-ms", 60),
        name=name,
    )
    job.wait_for_world(WORKERS, beyond_step=2)


def finish(job: Job, name: str = "run") -> Status:
    job.let_go()
    done = job.ended(job.started[name])
    assert done.code == 0, done.err
    summary = job.summary()
    assert summary["state"] == "succeeded" and summary["step"] == STEPS
    job.assert_nothing_is_left()
    return summary


def test_a_job_whose_machine_was_lost_goes_on_from_its_newest_checkpoint(
    job: Job, undisturbed: Callable[..., str]
) -> None:
    target = job.folder / "checkpoints"
    start(job, target, "--checkpoint-every", 5)  # more often than they can be written
    saved = job.wait_for(lambda s: s["saved"] if s["saved"] > 0 else None, "a checkpoint", timeout_s=2 * DEADLINE_S)
    assert not job.kill_everything()
    assert len(list(target.glob("step-*"))) <= 2
    (job.folder / "run").rename(job.folder / "lost")  # the ledger too: another job in another place
    start(job, target, name="again")
    first = job.wait_for(lambda s: s if s["step"] else None, "a first step")
    assert first["step"] >= saved
    finish(job, name="again")
    assert "is read: " in job.said("again")
    assert job.fingerprint() == undisturbed(*SHORT)


def test_several_nodes_without_redundancy_write_checkpoints_too(
    job: Job, undisturbed: Callable[..., str]
) -> None:
    """Each holds a part of a snapshot only, and none has a keeper before another one asks for its part."""
    target = job.folder / "checkpoints"
    options = ("--snapshot-every", 1, "--checkpoint-dir", target, "--checkpoint-every", 5)
    job.controller("--nnodes", WORKERS, *options)
    for node in "abcd"[:WORKERS]:
        job.agent(node, 1, train=(*SHORT, *job.held, "--pause-ms", 60))
    job.wait_for(lambda s: s["saved"] > 0, "a checkpoint", timeout_s=2 * DEADLINE_S)
    assert "is not protected" not in job.said("agent-a")
    job.kill_everything()
    (job.folder / "ledger.sqlite").unlink()  # another job in another place
    start(job, target, name="again")
    finish(job, name="again")
    assert "is read: " in job.said("again")
    assert job.fingerprint() == undisturbed(*SHORT)


def test_a_checkpoint_is_written_on_demand_and_at_a_stop(job: Job) -> None:
    target = job.folder / "checkpoints"
    start(job, target)
    done = job.ask("checkpoint")
    assert done.code == 0, done.err
    (first,) = target.glob("step-*")
    assert done.out.strip().endswith(str(first))
    job.wait_for_steps(3)
    job.started["run"].send_signal(signal.SIGTERM)
    assert job.ended(job.started["run"]).code == 130
    assert len(list(target.glob("step-*"))) == 2
    assert "a checkpoint of step" in job.summary()["reason"]
    job.assert_nothing_is_left()


def test_a_place_that_fails_later_is_told_and_training_goes_on(job: Job) -> None:
    target = job.folder / "checkpoints"
    start(job, target)
    target.write_text("a file where a directory should be")
    done = job.ask("checkpoint")
    assert done.code == 2 and "no checkpoint was written" in done.err, done.err
    status = job.wait_for(lambda s: s if s["save_fault"] else None, "a fault that is told")
    assert str(target) in status["save_fault"]
    job.wait_for_steps(2)
    finish(job)


def test_without_a_place_a_checkpoint_is_refused_with_the_remedy(job: Job) -> None:
    job.run(1, train=(*SHORT, *job.held))
    job.wait_for_world(1)
    done = job.ask("checkpoint")
    assert done.code == 2 and "--checkpoint-dir" in done.err, done.err


def test_another_jobs_checkpoints_are_refused(job: Job) -> None:
    target = job.folder / "checkpoints"
    start(job, target, "--job", "one")
    assert job.ask("checkpoint").code == 0
    job.started["run"].send_signal(signal.SIGTERM)
    job.ended(job.started["run"])
    process = job.run(1, "--job", "two", "--checkpoint-dir", target, "--run-dir", job.folder / "r2", train=SHORT, name="two")
    done = job.ended(process)
    assert done.code == 1 and "'one'" in done.err, done.err
