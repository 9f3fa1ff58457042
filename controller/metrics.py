"""A job in numbers for Prometheus, derived from its state at one moment. It decides and changes nothing."""

from __future__ import annotations

import math
import statistics

from prometheus_client.core import Metric

from controller.approximating import stage_norms
from controller.job import Job
from controller.redundancy import vulnerable_s
from controller.saving import stable_step
from elastic.domain import NO_STEP, Plan
from monitoring import metrics
from monitoring.accounts import Reason
from monitoring.metrics import Page

STATES = ("founding", "running", "regrouping", "restoring", "recovering", "ending", "succeeded", "failed", "stopped")
NODE_STATES = ("attached", "draining", "lost", "left")
WINDOWS = {"all": False, "1h": True}


def job_metrics(job: Job, now: float) -> list[Metric]:
    """Return the values of all of the controller's metrics; what is not known is left out."""
    page = Page(job.settings.job)
    _put_time(page, job)
    _put_progress(page, job)
    _put_members(page, job, now)
    _put_incidents(page, job)
    _put_safety(page, job, now)
    if job.plan is not None and not job.outcome:
        _put_workers(page, job, job.plan)
    return page.families()


def _put_time(page: Page, job: Job) -> None:
    accounts = job.accounts
    for state in STATES:
        page.put(metrics.JOB_STATE, state == job.state, state)
    page.put(metrics.ELAPSED, accounts.elapsed_s)
    page.put(metrics.PRODUCTIVE, accounts.productive_s)
    page.put(metrics.UNSETTLED, accounts.unsettled_s)
    for reason in Reason:
        page.put(metrics.BADPUT, accounts.badput_s.get(reason, 0.0), reason)
    for window, last_hour in WINDOWS.items():
        page.put(metrics.GOODPUT, accounts.goodput(last_hour=last_hour), window)
        page.put(metrics.ETTR, accounts.ettr(job.step_committed, job.steps.median_s(), last_hour=last_hour), window)


def _put_progress(page: Page, job: Job) -> None:
    page.put(metrics.STEP, job.step_committed)
    page.put(metrics.STEPS_REDONE, job.incidents.steps_redone)
    page.put(metrics.STEP_MEDIAN, job.steps.median_s())
    page.put(metrics.SAMPLES, job.samples)
    if not math.isnan(job.loss):
        page.put(metrics.LOSS, job.loss)
    step_s, settings = job.steps.median_s(), job.settings
    live = sum(worker.alive for worker in job.workers.values())
    if settings.peak_flops and job.spec is not None and step_s > 0 and live:
        samples = job.spec.slots * job.spec.batch_size
        page.put(metrics.MFU, settings.flops_per_sample * samples / step_s / (settings.peak_flops * live))


def _put_members(page: Page, job: Job, now: float) -> None:
    members = job.known(job.plan.members) if job.plan is not None else []
    training = {worker.id for worker in members if worker.alive}
    page.put(metrics.GENERATION, job.plan.generation if job.plan is not None else 0)
    page.put(metrics.WORLD_SIZE, len(training))
    page.put(metrics.SPARES, sum(worker.alive and worker.id not in training for worker in job.workers.values()))
    for node in job.nodes.values():
        for state in NODE_STATES:
            page.put(metrics.NODE_STATE, state == node.state, node.id, state)
        if node.attached and not job.outcome:
            page.put(metrics.HEARTBEAT_AGE, max(0.0, now - node.heard_at), node.id)


def _put_incidents(page: Page, job: Job) -> None:
    book = job.incidents
    for (kind, detector), count in book.kinds.items():
        page.put(metrics.INCIDENTS, count, kind, detector)
    page.put(metrics.INCIDENTS_OPEN, book.open_count)
    page.put(metrics.INCIDENT_SECONDS, book.seconds_lost)
    page.put(metrics.RECOVERIES, book.recoveries)
    for reason, histogram in book.phases.items():
        page.put_histogram(metrics.RECOVERY, histogram, reason)
    stages = len(job.plan.stages) if job.plan is not None and job.settings.approximate else 0
    for stage in sorted({*job.approximated, *range(stages)}):
        page.put(metrics.APPROXIMATIONS, job.approximated[stage], stage)


def _put_safety(page: Page, job: Job, now: float) -> None:
    if job.settings.snapshot_every:
        stable = stable_step(job)
        is_safe = job.vulnerable_since is None and stable != NO_STEP
        page.put(metrics.SNAPSHOT_AGE, max(0, job.step_committed - max(0, stable)))
        if job.settings.parity_shards:
            page.put(metrics.REDUNDANCY, job.plan.parity_shards if is_safe and job.plan is not None else 0)
        page.put(metrics.VULNERABLE, vulnerable_s(job, now))
    if job.saved_step != NO_STEP:
        page.put(metrics.CHECKPOINT_STEP, job.saved_step)
    if job.settings.checkpoint_target:
        page.put(metrics.CHECKPOINT_FAILED, bool(job.save_fault))


def _slots_of(plan: Plan, rank: int) -> int:
    """How many slots a rank computes, or a part of."""
    if not plan.stages:
        return plan.owners.count(rank)
    return sum(rank in plan.route(slot) for slot in range(plan.slots))


def _put_workers(page: Page, job: Job, plan: Plan) -> None:
    seconds = {
        member.rank: job.workers[member.worker].status.compute_s
        for member in plan.members
        if member.worker in job.workers and job.workers[member.worker].status.compute_s > 0
    }
    for rank, own_s in seconds.items():
        peers = next((stage.ranks for stage in plan.stages if rank in stage.ranks), tuple(seconds))
        page.put(metrics.COMPUTE, own_s, plan.members[rank].node, rank)
        slots = {peer: _slots_of(plan, peer) for peer in peers if peer in seconds}
        if slots.get(rank):
            median_s = statistics.median(seconds[peer] / count for peer, count in slots.items() if count)
            page.put(metrics.STRAGGLER, own_s / slots[rank] / median_s, plan.members[rank].node, rank)
    if job.spec is not None and job.spec.is_pipeline:
        for number, norm in enumerate(stage_norms(job, plan)):
            if norm > 0:
                page.put(metrics.GRADIENT_NORM, norm, number)
