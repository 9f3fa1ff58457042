"""How a job ends: well, once every loop and every script has ended; badly, when nothing is left that could go on.

    all who hold the state have left the loop with one digest -> loop-ended: one of them does what must be done once, if
    there is anything -> job-concluded: scripts run on to their end -> no worker is alive -> job-ended: succeeded

An end is final: once `outcome` is set, no part decides anything any more. Nothing here opens a generation.
"""

from __future__ import annotations

from typing import Any

from controller.events import EndJob, Persist, ToAgent
from controller.job import Job
from controller.layouts import final_digest
from controller.state import Worker
from elastic.domain import Conclude, Failed, Finish, Leaving, Shutdown
from monitoring.accounts import Reason


def check_finished(job: Job, now: float) -> bool:
    """Whether the job is ending well; starts or completes that end."""
    if job.outcome:
        return True
    if job.recovering_until is not None:
        return job.finishing
    members = [job.workers[w] for w in job.membership()]
    # A joiner that was never given the state has nothing to end; the others need not wait for it.
    holders = [w for w in members if w.alive and w.holds_state]
    left = [worker.leaving for worker in holders if worker.leaving is not None]
    if not job.finishing and left and len(left) == len(holders) and (digest := final_digest(job, left)):
        _begin_finish(job, left, digest, now)
    if not members and not job.finishing:
        ran = [w for w in job.workers.values() if w.state == "finished"]
        expected = sum(n.nproc for n in job.nodes.values() if n.state == "attached")
        if not ran or len(ran) < expected or any(w.alive for w in job.workers.values()):
            return False
        end_job(job, "succeeded", "every worker's script ended", now)
        return True
    if job.finishing and not any(w.alive for w in job.workers.values()):
        end_job(job, "succeeded", f"finished after step {job.step_committed}", now)
    return job.finishing


def _begin_finish(job: Job, left: list[Leaving], digest: str | set[str], now: float) -> None:
    if not isinstance(digest, str):
        end_job(job, "failed", "the replicas' final parameters differ: " + ", ".join(sorted(digest)), now)
        return
    job.close_incidents(now)
    job.accounts.went_aside(Reason.ENDING, job.accounts.pending_s)  # no step followed
    job.finishing, job.digest, job.attempt = True, digest, None
    job.concludes = any(leaving.concludes for leaving in left)
    job.emit(
        Persist(
            "loop-ended",
            f"all workers left the loop after step {job.step_committed}",
            {"digest": job.digest, "step": job.step_committed, "samples": job.samples, "concludes": job.concludes},
        )
    )
    let_finish(job, now)


def let_finish(job: Job, now: float) -> None:
    """The loop is over everywhere: what must be done once is done, then scripts run to their end; all else goes."""
    if job.concludes and not job.concluded:
        _conclude(job, now)
        return
    for worker in job.workers.values():
        if not worker.alive:
            continue
        if worker.leaving is not None:
            job.tell(worker, Finish("the job is done"))
        else:
            job.kill(worker, "the job is done")
            worker.state = "left"


def may_conclude(job: Job) -> bool:
    """Whether the loop has ended, and what must be done once after it has not been done yet."""
    return job.finishing and job.concludes and not job.concluded and not job.outcome


def _conclude(job: Job, now: float) -> None:
    """Have the first worker that can do it do what must be done once."""
    ranks = {member.worker: member.rank for member in job.last_members()}
    able = [w for w in job.workers.values() if w.alive and w.leaving is not None and w.leaving.concludes]
    if not able and job.recovering_until is None and any(w.state == "lost" and w.leaving for w in job.workers.values()):
        job.recovering_until = now + job.settings.start_timeout_s
        job.emit(Persist("job-waits", "no worker that could do what on_end asks for can be reached: waiting for its node", {}))
        return
    if not able:
        failure = job.last_failure()
        detail = f": {failure.error}" if failure is not None else ""
        end_job(job, "failed", f"no worker finished what session.on_end() asked for{detail}", now, failure)
        return
    chosen = min(able, key=lambda worker: ranks.get(worker.id, len(ranks)))
    if job.concluder != chosen.id:
        job.concluder = chosen.id
        job.emit(Persist("concluding", f"worker {chosen.id} does what on_end asks for", {"worker": chosen.id}))
    job.tell(chosen, Conclude("the loop is over"))


def conclude_elsewhere(job: Job, worker: Worker, now: float) -> None:
    """A worker is lost after the loop: if it was the one that had to conclude, another one does it."""
    if job.concluder == worker.id and not job.concluded and not job.outcome:
        _conclude(job, now)


def worker_concluded(job: Job, worker: Worker, now: float) -> None:
    """What had to be done once is done."""
    if job.finishing and not job.concluded:
        job.concluded = True
        job.emit(Persist("job-concluded", f"worker {worker.id} did what on_end asks for", {"worker": worker.id}))
        let_finish(job, now)


def check_outcome(job: Job, now: float) -> None:
    """End the job when nothing is left that could go on."""
    if check_finished(job, now) or job.recovering_until is not None:
        return
    if any(w.alive for w in job.workers.values()):
        return
    hopeful = [
        n
        for n in job.nodes.values()
        if n.state == "attached" and any(n.restarts.get(r, 0) <= job.settings.max_restarts for r in range(n.nproc))
    ]
    if not hopeful and any(n.state == "attached" for n in job.nodes.values()):
        failure = job.last_failure()
        detail = f": {failure.error}" if failure is not None else ""
        end_job(
            job, "failed", f"every worker failed more than --max-restarts {job.settings.max_restarts} times{detail}", now, failure
        )


def end_job(job: Job, outcome: str, reason: str, now: float, failure: Failed | None = None) -> None:
    """End the job now: succeeded, failed or stopped. `failure` is the exception that explains it, if there is one."""
    if job.outcome:
        return
    job.outcome, job.reason, job.ended_at = outcome, reason, now
    job.accounts.ended()
    data: dict[str, Any] = {
        "outcome": outcome,
        "reason": reason,
        "digest": job.digest,
        "step": job.step_committed,
        "samples": job.samples,
    }
    if failure is not None:
        data["traceback"] = failure.traceback
        data["sample_ids"] = list(failure.sample_ids)
    job.emit(Persist("job-ended", f"{outcome}: {reason}", data))
    for node in job.nodes.values():
        if node.attached:
            job.emit(ToAgent(node.incarnation, Shutdown(reason, 0 if outcome == "succeeded" else 1)))
    job.emit(EndJob(outcome, reason))
