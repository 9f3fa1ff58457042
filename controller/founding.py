"""The first world: who is waited for, which numbers are fixed for the job's life, and how it begins again.

    enough nodes, all their workers registered -> job-fixed (once) -> generation FOUND

Only a world in which nothing was trained is founded; whatever has trained is continued by `fencing.py`.
"""

from __future__ import annotations

from dataclasses import replace

from controller.approximating import may_found
from controller.attempts import open_generation, tell_of_no_layout
from controller.endings import end_job
from controller.events import Persist
from controller.job import Job
from controller.layouts import layout_for
from controller.restoring import begin_with_checkpoint
from controller.state import Worker, natural
from elastic.domain import Admitted, PlanKind, TrainingSpec
from recovery.pipelines import NoLayout


def found_if_complete(job: Job, now: float) -> None:
    """Found the first world once everybody who is expected has registered."""
    if job.plan is not None or job.attempt is not None or job.outcome or job.recovering_until is not None:
        return
    nodes = [n for n in job.nodes.values() if n.state == "attached" and not n.cut_from]
    here = {n.id for n in nodes}
    # Those who came while an earlier attempt was on its way count too, although they were told to join it.
    ready = [w for w in job.workers.values() if w.state in ("registered", "warming", "warm") and w.node in here]
    places = sum(n.nproc for n in nodes)
    if len(nodes) < job.settings.nodes_min or not ready or len(ready) < places:
        job.enough_since = None
        return
    if job.enough_since is None:
        job.enough_since = now
    if begin_with_checkpoint(job, now):
        return
    if len(nodes) < job.settings.nodes_max and now - job.enough_since < job.settings.join_timeout_s:
        return
    _found(job, ready, now)


def _found(job: Job, ready: list[Worker], now: float) -> None:
    spec = job.requested or ready[0].spec
    assert spec is not None
    for worker in ready:
        if worker.spec is not None and (difference := worker.spec.difference(spec, with_state=True)):
            end_job(job, "failed", f"worker {worker.id} cannot train with the others: {difference}", now)
            return
    islands = {job.nodes[worker.node].island or worker.id for worker in ready}
    if job.spec is None and not _fix_job(job, spec, len(islands) if spec.crews else len(ready), now):
        return
    assert job.spec is not None
    fixed = job.spec
    order = sorted(ready, key=lambda w: (natural(w.node), w.local_rank))
    chosen = [w.id for w in order[: fixed.seats]]
    layout = layout_for(job, PlanKind.FOUND, chosen, None)
    if isinstance(layout, NoLayout):
        tell_of_no_layout(job, layout, now)
        return
    for worker in order[fixed.seats :]:
        admit_joiner(job, worker)  # more have come since the numbers were fixed
    order = order[: fixed.seats]
    if not may_found(job, [worker.id for worker in order], now):
        return
    for worker in order:
        # Whoever was told to join has not kept its initial weights, and is given the state by the others.
        worker.holds_state = worker.state == "registered"
        worker.state = "member"
        if worker.holds_state:
            job.tell(worker, _admission(job, joins=False))
    snapshot = job.restoring.snapshot if job.restoring is not None else None
    reason = f"first world of {len(order)} worker(s)"
    open_generation(job, PlanKind.FOUND, [w.id for w in order], reason, now, snapshot=snapshot)


def _fix_job(job: Job, spec: TrainingSpec, workers: int, now: float) -> bool:
    """Fix slots and virtual replicas for the job's whole life; ends the job where they make no sense.

    Args:
        workers: at the start; where those of an island train one slot between them, islands.
    """
    stages = min(spec.stages or workers, workers, len(spec.layers)) if spec.is_pipeline else 1
    width = -(-workers // stages)
    slots = spec.slots or (2 * workers if spec.is_pipeline else workers)
    replicas = spec.virtual_replicas or min(width, slots)
    problem = ""
    if slots < width:
        who = "islands" if spec.crews else "workers"
        problem = f"slots={slots} cannot feed {workers} {who}: give at least as many slots as {who}"
    elif replicas > slots:
        problem = f"virtual_replicas={replicas} exceeds slots={slots}: give at most as many as slots"
    elif slots * spec.batch_size > spec.dataset_size:
        problem = (
            f"the dataset holds {spec.dataset_size} samples, fewer than one global batch of {slots} slots x "
            f"{spec.batch_size}: use a smaller batch_size or fewer slots"
        )
    if problem:
        end_job(job, "failed", problem, now)
        return False
    job.requested, job.spec = spec, replace(spec, slots=slots, virtual_replicas=replicas)
    job.emit(
        Persist(
            "job-fixed",
            f"{slots} slots of {spec.batch_size} samples, {replicas} virtual replicas, {spec.reduction} reduction",
            {"spec": job.spec, "requested": job.requested},
        )
    )
    return True


def admit_joiner(job: Job, worker: Worker) -> None:
    """Tell a worker which numbers are fixed, and to warm up: it is to join a world, not to found one."""
    worker.state = "warming"
    job.tell(worker, _admission(job, joins=True))


def _admission(job: Job, *, joins: bool) -> Admitted:
    assert job.spec is not None
    return Admitted(
        slots=job.spec.slots,
        virtual_replicas=job.spec.virtual_replicas,
        reduction=job.spec.reduction,
        seed=job.spec.seed,
        committed=job.step_committed if joins else 0,
        joins_running_world=joins,
        snapshot_every=job.settings.snapshot_every,
        measures_norms=job.settings.approximate,
    )


def found_anew(job: Job, survivors: list[str], now: float) -> None:
    """A member was lost before the first world stood: nothing was trained, so found it anew when all are back."""
    job.attempt = None
    for worker_id in survivors:
        job.workers[worker_id].state = "registered"
    job.enough_since = None
    found_if_complete(job, now)


def check_start_timeout(job: Job, now: float) -> None:
    """End the job if its first world does not form in time."""
    since = job.founding_since if job.founding_since is not None else now
    if job.plan is not None or job.attempt is not None or now - since <= job.settings.start_timeout_s:
        return
    here = [n.id for n in job.nodes.values() if n.state == "attached"]
    waiting = [w.id for w in job.workers.values() if w.alive and w.state == "starting"]
    end_job(
        job,
        "failed",
        f"no first world within --start-timeout {job.settings.start_timeout_s:.0f} s: {len(here)} of "
        f"{job.settings.nodes_min} nodes attached"
        + (f", not registered: {', '.join(waiting)}" if waiting else "")
        + "; start the missing agents, or check that the script calls session.prepare()",
        now,
    )
