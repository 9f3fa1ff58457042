"""What workers say, and which of them may train with the others.

Each message is taken down and handed to the part that it concerns. Only one thing is decided here: whether a worker that
registers fits what is trained. That a worker is lost is never concluded from what it says; its agent reports that.
"""

from __future__ import annotations

from dataclasses import replace

from controller.accounting import charge_aside
from controller.approximating import tell_of_errors
from controller.attempts import abandon_switch, suspect, worlds_in_use
from controller.commits import prepare_failed, worker_prepared, worker_switched
from controller.endings import check_finished, check_outcome, end_job, worker_concluded
from controller.events import Persist
from controller.founding import admit_joiner, found_if_complete
from controller.job import Job
from controller.layouts import note_resumed
from controller.restoring import check_restoring
from controller.state import Worker
from controller.straggling import note_compute
from controller.switching import consider_switch
from elastic.domain import (
    CollectiveFailed,
    Concluded,
    Failed,
    Leaving,
    Prepared,
    PrepareFailed,
    Registered,
    Resumed,
    Switched,
    TrainingSpec,
    Warm,
    WorkerMessage,
    WorkerStatus,
)


def worker_said(job: Job, worker: Worker, message: WorkerMessage, now: float) -> None:
    """Take down what a worker says, and let those act on it whom it concerns."""
    if job.outcome:
        return
    match message:
        case Registered(spec):
            _registered(job, worker, spec, now)
        case Warm():
            if worker.state == "warming":
                worker.state = "warm"
                consider_switch(job, now)
                check_restoring(job, now)
        case Prepared():
            worker_prepared(job, worker, message, now)
        case PrepareFailed(generation, reason):
            prepare_failed(job, worker, generation, reason, now)
        case Switched():
            worker_switched(job, worker, message, now)
        case Resumed(generation, committed, errors):
            tell_of_errors(job, errors)
            worker.holds_state = True
            job.note_step(committed, now)
            note_resumed(job, generation)
            if job.plan is not None and generation == job.plan.generation:
                job.fruitless = job.failed_searches = 0
                job.refused.clear()
                job.close_incidents(now)
        case CollectiveFailed(generation, step, reason):
            if generation in worlds_in_use(job):
                suspect(job, generation, f"worker {worker.id}: a collective of step {step} broke ({reason})", now)
        case Leaving():
            worker.leaving, worker.holds_state = message, True
            job.note_step(message.committed, now)
            job.samples = max(job.samples, message.samples)
            abandon_switch(job, "the training loop has ended")
            check_finished(job, now)
        case Concluded():
            worker_concluded(job, worker, now)
        case Failed():
            worker.failure = message


def _registered(job: Job, worker: Worker, spec: TrainingSpec, now: float) -> None:
    """A worker says what it trains: it waits for the first world, joins the one there is, or does not fit."""
    worker.spec = spec
    base = job.requested
    if base is None:
        others = [w for w in job.workers.values() if w.alive and w.spec is not None and w is not worker]
        base = others[0].spec if others else None
    founding = job.plan is None and job.attempt is None
    if base is not None and (difference := spec.difference(base, with_state=founding)):
        sentence = f"worker {worker.id} cannot train with the others: {difference}"
        if founding:
            end_job(job, "failed", sentence, now)
        else:
            _refuse(job, worker, sentence, now)
        return
    if founding:
        worker.state = "registered"
        found_if_complete(job, now)
    else:
        admit_joiner(job, worker)
        consider_switch(job, now)


def _refuse(job: Job, worker: Worker, sentence: str, now: float) -> None:
    """End a worker that does not fit, and give its place up: the next one there would not fit either."""
    worker.state, worker.failure = "dead", Failed(error=sentence)
    job.nodes[worker.node].restarts[worker.local_rank] = job.settings.max_restarts + 1
    job.emit(Persist("worker-refused", sentence, {"worker": worker.id}))
    job.kill(worker, sentence)
    check_outcome(job, now)


def note_status(job: Job, status: WorkerStatus, now: float) -> None:
    """Take down what a heartbeat says of a worker."""
    worker = job.workers.get(status.worker)
    if worker is None or not worker.alive:
        return
    worker.pid, worker.status = status.pid or worker.pid, replace(status, messages=())
    note_compute(job, worker, status)
    if worker.state == "member":
        charge_aside(job, worker)
        job.note_step(status.committed, now)
        if status.committed >= job.step_committed:
            job.samples = max(job.samples, status.samples)
            job.loss = status.loss
