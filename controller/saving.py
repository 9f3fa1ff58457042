"""Checkpoints in the durable tier: when one is written, what became of it, and the newest one that a job begins with.

    due, or asked for -> the first member's agent writes the newest stable snapshot -> saved, or why not
    a first world, or nothing in memory to go on from -> one agent looks for the newest whole one -> `restoring.py`

Training never waits for any of it. A failure is told and tried again later, and never touches the job. What is written where
is the agents'; here are only names and steps.
"""

from __future__ import annotations

from controller.endings import end_job
from controller.events import Persist, ToAgent
from controller.job import Job
from controller.state import Node, Saving
from elastic.domain import NO_STEP, CheckpointSaved, SaveCheckpoint

SAVE_TIMEOUT_S = 3600.0  # the agent's own deadlines are shorter
RETRY_S = 20.0
LAST_SAVE_S = 30.0  # how long the end of a stopped job waits for its checkpoint


def stable_step(job: Job) -> int:
    """Return the newest step whose snapshot the whole world holds; NO_STEP for none."""
    members = job.known(job.plan.members) if job.plan is not None else []
    return max((worker.status.stable for worker in members if worker.alive), default=NO_STEP)


def save_refusal(job: Job) -> str:
    """Return why no checkpoint can be written now, or ""."""
    if not job.settings.checkpoint_target:
        return "the job has no durable tier: start it with --checkpoint-dir"
    if job.state != "running":
        return f"the job is {job.state}, not running: ask again when it trains"
    if stable_step(job) == NO_STEP:
        return "no snapshot of the whole world is in memory yet: ask again after the next one (--snapshot-every)"
    return ""


def save(job: Job, now: float) -> None:
    """Have the newest stable snapshot written, unless one is being written."""
    if job.saving is not None or save_refusal(job):
        return
    assert job.plan is not None
    node = job.nodes[job.plan.members[0].node]
    job.saves += 1
    job.saving = Saving(job.saves, node.incarnation, now)
    order = SaveCheckpoint(job.saves, job.settings.checkpoint_target, job.settings.checkpoint_keep)
    job.emit(ToAgent(node.incarnation, order))


def save_if_due(job: Job, now: float) -> None:
    """Look whether a checkpoint is due, or the one that is being written has failed with its node."""
    saving = job.saving
    if saving is not None:
        gone = job.node_of(saving.incarnation) is None
        if gone or now - saving.since > SAVE_TIMEOUT_S:
            _failed(job, "its node is gone" if gone else "it took too long", now)
        elif job.stopping and now - job.stopping_since > LAST_SAVE_S:
            end_job(job, "stopped", f"{job.stopping}; its last checkpoint was not written in time", now)
        return
    every = job.settings.checkpoint_every
    if every and now >= job.save_again_at and stable_step(job) >= max(job.saved_step, 0) + every:
        save(job, now)


def take_saved(job: Job, node: Node, answer: CheckpointSaved, now: float) -> None:
    """An agent has written a checkpoint, or could not."""
    saving = job.saving
    if saving is None or (answer.number, node.incarnation) != (saving.number, saving.incarnation):
        return
    if answer.refusal:
        _failed(job, answer.refusal, now)
        return
    job.saving, job.save_fault = None, ""
    job.saved_step, job.saved_path = answer.step, answer.path
    job.emit(
        Persist(
            "checkpoint-saved",
            f"checkpoint of step {answer.step} written: {answer.path}",
            {"step": answer.step, "path": answer.path},
        )
    )
    if job.stopping:
        end_job(job, "stopped", f"{job.stopping}; a checkpoint of step {answer.step} is at {answer.path}", now)


def _failed(job: Job, reason: str, now: float) -> None:
    job.saving, job.save_fault, job.save_again_at = None, reason, now + RETRY_S
    job.emit(Persist("checkpoint-failed", f"no checkpoint was written, training goes on: {reason}", {"reason": reason}))
    if job.stopping:
        end_job(job, "stopped", f"{job.stopping}; no last checkpoint was written: {reason}", now)


def stop(job: Job, reason: str, now: float) -> None:
    """A person wants the job to end: a checkpoint is written first, where there is a place for it."""
    if job.stopping or save_refusal(job) or stable_step(job) <= job.saved_step:
        end_job(job, "stopped", reason, now)
        return
    job.stopping, job.stopping_since = reason, now
    save(job, now)
