"""To which reason the time is charged that passes now, and what the ledger says of it.

Nothing here decides anything; the reasons and the sums are `monitoring/accounts.py`'s.
"""

from __future__ import annotations

from dataclasses import replace

from controller.events import ControllerEffect, Persist
from controller.job import Job
from controller.state import Worker
from monitoring.accounts import Reason

WRITE_EVERY_S = 300.0
"""So often, at least, the accounts are written while a job runs: so old they are at most where a controller is killed."""


def charge(job: Job, now: float) -> None:
    """Charge the time since the last event."""
    if not job.outcome:
        reason = _reason(job)
        job.accounts.charge(now, reason, is_recovery=job.incidents.has_open, steps=job.step_committed)


def _reason(job: Job) -> Reason | None:
    """Why the job does not train now; None: it does, as far as is known."""
    if job.finishing:
        return Reason.ENDING
    if job.recovering_until is not None and job.restarted:
        return Reason.CONTROLLER_AWAY
    if job.first_commit_at is None and not job.accounts.has_trained:
        return Reason.STARTUP
    if job.recovering_until is not None or job.restoring is not None:
        return Reason.RESTORE
    attempt = job.attempt
    if attempt is not None and attempt.waits_for_nodes:
        return Reason.WAITING
    if not job.incidents.has_open:
        return None
    if attempt is None or attempt.may_be_abandoned:
        return Reason.FENCE if job.suspicion is not None else Reason.REDO
    return Reason.MOVE if attempt.committed else Reason.REGROUP


def write_accounts(job: Job, effects: list[ControllerEffect], now: float) -> list[ControllerEffect]:
    """Return the effects with the accounts in the last record, so that whatever is written says where the time went."""
    for place in reversed(range(len(effects))):
        effect = effects[place]
        if isinstance(effect, Persist):
            job.accounts_written_at = now
            written = job.accounts.written(job.step_committed, job.steps.median_s(), now + job.unix_offset_s)
            return [*effects[:place], replace(effect, data={**effect.data, "accounts": written}), *effects[place + 1 :]]
    return effects


def write_if_due(job: Job, now: float) -> None:
    """Write the accounts of a job to which nothing else happens."""
    if job.first_commit_at is not None and now - job.accounts_written_at >= WRITE_EVERY_S:
        share = 100 * job.accounts.goodput()
        job.emit(Persist("time-accounted", f"step {job.step_committed}: {share:.1f} % of the time was productive", {}))


def charge_aside(job: Job, worker: Worker) -> None:
    """Charge what a worker has done besides steps since it was last heard of; all do it at once, so the first one counts."""
    evaluated_s, busy_s = worker.status.evaluated_s, worker.status.busy_s
    before = job.aside_s.get(worker.id, (0.0, 0.0) if worker.status.committed == 0 else (evaluated_s, busy_s))
    job.aside_s[worker.id] = (evaluated_s, busy_s)
    job.accounts.went_aside(Reason.EVALUATION, max(0.0, evaluated_s - before[0]))
    job.accounts.went_aside(Reason.BUSY, max(0.0, busy_s - before[1]))
