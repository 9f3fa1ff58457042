"""Workers that are lost: what each loss means for the job, and whether it is the worker's own fault.

A worker is lost when its process ends, when its node is lost or leaves (`nodes.py`), or when it is not prepared in time. All
losses come through `workers_lost`: a member's is an incident and a fence, any other's costs the others nothing. Nothing here
decides who goes on; that is `fencing.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from controller.attempts import abandon_switch
from controller.endings import check_finished, check_outcome, conclude_elsewhere, end_job
from controller.events import Persist
from controller.fencing import fence
from controller.job import Job
from controller.places import fill_places
from controller.recovering import finish_recovering
from controller.state import Attempt, Worker
from elastic.domain import Failed, PlanKind, WorkerExited


def workers_lost(
    job: Job,
    lost: Iterable[Worker],
    kind: str,
    subject: str,
    reason: str,
    detected_by: str,
    now: float,
    *,
    state: str = "dead",
    silent_s: float = 0.0,
) -> None:
    """Go on without these workers.

    `kind`, `subject`, `reason` and `detected_by` are what people read; `state` is what the workers are from now on, and
    `silent_s` how long before now it happened.
    """
    lost = [worker for worker in lost if worker.alive]
    involved = [worker for worker in lost if job.is_member(worker)]
    for worker in lost:
        worker.state = state
    if job.outcome:
        return
    if job.recovering_until is not None:
        finish_recovering(job, now)
        return
    if lost:
        job.emit(
            Persist(
                "workers-lost",
                f"{subject}: {reason}",
                {"workers": [w.id for w in lost], "detected_by": detected_by},
            )
        )
    if not involved and not job.finishing:
        attempt = job.attempt
        if attempt is not None and any(w.id in attempt.participants for w in lost):
            abandon_switch(job, f"{subject}: {reason}")
        return
    if job.finishing:
        for worker in lost:
            conclude_elsewhere(job, worker, now)
    if job.finishing or check_finished(job, now):
        return
    job.open_incident(kind, subject, detected_by, reason, now, silent_s)
    fence(job, f"{subject}: {reason}", now, loss=True)


def worker_exited(job: Job, exited: WorkerExited, now: float) -> None:
    """A worker's process has ended: well, on request, or by a fault for which its place may be given up."""
    worker = job.workers.get(exited.worker)
    if worker is None or not worker.alive:
        return
    node = job.nodes[worker.node]
    unfinished = job.concluder == worker.id and not job.concluded  # it left in the middle of on_end
    if exited.code == 0 and not unfinished and (job.finishing or worker.leaving is not None or worker.spec is None):
        worker.state = "finished"
        job.emit(Persist("worker-finished", f"worker {worker.id} finished", {"worker": worker.id}))
        check_finished(job, now)
        return
    if exited.code == 0 and node.state == "draining" and not job.is_member(worker):
        worker.state = "left"
        return
    if exited.code == 0 and not exited.blameless:
        exited = replace(exited, reason="the script ended before its training loop did")
    failure = worker.failure
    reason = f"{failure.error} (step {failure.step}, slot {failure.slot})" if failure is not None else exited.reason
    if not exited.blameless:
        node.restarts[worker.local_rank] = node.restarts.get(worker.local_rank, 0) + 1
        if failure is not None and _seen_before(job, worker, failure):
            worker.state = "dead"
            end_job(job, "failed", _twice(failure), now, failure)
            return
    kind = "exception" if failure is not None else "worker lost"
    workers_lost(
        job, [worker], kind, f"worker {worker.id}", reason, exited.detected_by, now, silent_s=exited.silent_s
    )
    if job.recovering_until is None:
        fill_places(job, node)
    if node.restarts.get(worker.local_rank, 0) > job.settings.max_restarts:
        job.emit(
            Persist(
                "worker-given-up",
                f"local rank {worker.local_rank} of node {node.id} failed more than --max-restarts "
                f"{job.settings.max_restarts} times and is not restarted",
                {"node": node.id, "local_rank": worker.local_rank},
            )
        )
    check_outcome(job, now)


def _seen_before(job: Job, worker: Worker, failure: Failed) -> bool:
    """Whether another worker failed at the same place with the same error: then it is the data or the code."""
    return any(
        other.id != worker.id
        and other.failure is not None
        and (other.failure.step, other.failure.slot) == (failure.step, failure.slot)
        and other.failure.error == failure.error
        for other in job.workers.values()
    )


def _twice(failure: Failed) -> str:
    where = f"step {failure.step}" if failure.step else "the same place before training"
    where += f", slot {failure.slot}" if failure.slot >= 0 else ""
    ids = f"; sample ids {list(failure.sample_ids)}" if failure.sample_ids else ""
    return f"two workers raised the same exception at {where}, so it is the data or the code: {failure.error}{ids}"


def attempt_expired(job: Job, attempt: Attempt, now: float) -> None:
    """A generation was not prepared in time: a switch is given up, in any other whoever is missing counts as lost."""
    missing = sorted(attempt.participants - set(attempt.prepared))
    if attempt.plan.kind is PlanKind.SWITCH:
        abandon_switch(job, f"not prepared in time: {', '.join(missing)}")
        for worker_id in missing:
            worker = job.workers[worker_id]
            worker.warms_slowly |= worker.state == "warming"
            if worker.state == "warm":
                job.kill(worker, "it was not prepared in time")
        return
    if not missing:
        end_job(job, "failed", f"fewer nodes than --nnodes MIN ({job.settings.nodes_min}) for too long", now)
        return
    if not attempt.prepared:
        fence(job, f"nobody was prepared for generation {attempt.plan.generation} in time", now, loss=False)
        return
    silent = [job.workers[w] for w in missing]
    for worker in silent:
        job.kill(worker, "it was not prepared in time")
    workers_lost(
        job, silent, "not prepared", ", ".join(f"worker {w}" for w in missing), "not prepared in time", "deadline", now
    )
    for node in list(job.nodes.values()):
        fill_places(job, node)
