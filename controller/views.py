"""What people see of a job, derived from its state. It decides and changes nothing."""

from __future__ import annotations

from controller.approximating import stage_norms
from controller.job import Job
from controller.redundancy import vulnerable_s
from controller.saving import stable_step
from controller.state import natural
from elastic.domain import NodeView, PlanReply, StatusReply, WorkerView


def status(job: Job, now: float) -> StatusReply:
    """Return what people see."""
    plan = job.plan
    ranks = {m.worker: m.rank for m in plan.members} if plan is not None else {}
    views = []
    for node in sorted(job.nodes.values(), key=lambda n: natural(n.id)):
        workers = tuple(
            WorkerView(
                worker=w.id,
                rank=ranks.get(w.id, 0),
                local_rank=w.local_rank,
                pid=w.pid,
                state="leaving" if w.leaving is not None and w.alive else w.state,
                generation=w.status.generation,
                committed=w.status.committed,
            )
            for w in sorted(job.workers.values(), key=lambda w: (w.local_rank, w.id))
            if w.node == node.id and w.alive
        )
        views.append(
            NodeView(node.id, node.state, node.pid, node.peer_address, max(0.0, now - node.heard_at), workers)
        )
    return StatusReply(
        job=job.settings.job,
        state=job.state,
        reason=job.reason,
        generation=plan.generation if plan is not None else 0,
        step=job.step_committed,
        world_size=sum(worker.alive for worker in job.known(plan.members)) if plan is not None else 0,
        nodes=tuple(views),
        slots=job.spec.slots if job.spec is not None else 0,
        virtual_replicas=job.spec.virtual_replicas if job.spec is not None else 0,
        samples=job.samples,
        loss=job.loss,
        elapsed_s=job.accounts.elapsed_s,
        productive_s=job.accounts.presumed_s,
        incidents_total=job.incidents.total,
        incidents=job.incidents.newest(),
        digest=job.digest,
        step_s=job.steps.median_s(),
        reduction=job.spec.reduction if job.spec is not None else "",
        stable=stable_step(job),
        saved=job.saved_step,
        save_fault=job.save_fault,
        is_vulnerable=job.vulnerable_since is not None and not job.outcome,
        vulnerable_s=vulnerable_s(job, now),
        approximations=tuple(job.approximations),
    )


def present_plan(job: Job) -> PlanReply | None:
    """How the job's pipeline is cut; None where there is none by now."""
    if job.spec is None or not job.spec.is_pipeline or job.plan is None:
        return None
    return PlanReply(
        spec=job.spec,
        plan=job.plan,
        step_s=job.steps_here.median_s(),
        takes_snapshots=bool(job.settings.snapshot_every),
        keeps_checkpoints=bool(job.settings.checkpoint_target),
        approximates=job.settings.approximate,
        norm_exponent=job.settings.norm_exponent,
        norms=tuple(stage_norms(job, job.plan)),
    )
