"""A generation on its way: how one is opened, given up, or suspected of being broken.

Who belongs to it and why it is needed is decided by those who open it (`founding.py`, `fencing.py`, `switching.py`); what
becomes of it by `commits.py`. Here is only what all of them do alike. Nothing here commits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from controller.endings import end_job
from controller.events import Persist
from controller.job import Job
from controller.layouts import layout_for
from controller.state import Attempt, Node, Suspicion
from elastic.domain import Abandon, Blend, Member, PlanKind, PlanNode, Prepare, Rebuilt
from elastic.snapshots import SnapshotId
from recovery.pipelines import NoLayout
from recovery.plan import Candidate, make_plan


def open_generation(
    job: Job,
    kind: PlanKind,
    members: list[str],
    reason: str,
    now: float,
    *,
    leavers: Iterable[Member] = (),
    snapshot: SnapshotId | None = None,
    blends: Sequence[Blend] | None = None,
) -> None:
    """Make the plan of the next generation, write it down, and have everybody concerned prepare for it.

    Where a pipeline cannot be cut for these members, that is told, and nothing is opened.

    `members` are in order of rank; `leavers` are members of the world before, who leave with this switch; `snapshot` is
    what the members read the state from, where nobody holds it.
    `blends` are layers of a pipeline that nobody holds, to be made from what the members hold of the newest committed world;
    none of them where all that a lost stage had is kept in duplicate. None: no stage is lost, or its state is read.
    """
    assert job.spec is not None
    # What blends are made from lies as the newest committed world says, whatever has been opened since.
    is_opened = job.attempt is not None and job.membership_from_attempt()
    before = job.attempt.plan if job.attempt is not None and is_opened and blends is None else job.plan
    continued = before if kind is not PlanKind.FOUND and snapshot is None else None
    layout = layout_for(job, kind, members, continued, is_cut_anew=blends is not None)
    if isinstance(layout, NoLayout):
        tell_of_no_layout(job, layout, now)
        return
    job.newest_generation += 1
    nodes = [job.nodes[name] for name in dict.fromkeys(job.workers[worker_id].node for worker_id in members)]
    plan = make_plan(
        generation=job.newest_generation,
        kind=kind,
        members=[_candidate(job, worker_id) for worker_id in members],
        slots=job.spec.slots,
        virtual_replicas=job.spec.virtual_replicas,
        prepare_timeout_ms=int(job.settings.build_timeout_s(kind) * 1000),
        reason=reason,
        before=continued,
        layout=layout,
        nodes=[site_of(node) for node in nodes],
        redundancy=(job.settings.data_shards, job.settings.parity_shards),
        blends=blends,
        rebuilt=_rebuilt(job, blends or (), snapshot),
    )
    job.attempt = Attempt(
        plan,
        now + job.settings.prepare_timeout_s,
        leavers=tuple(leavers),
        snapshot=snapshot,
        replaces=job.plan.generation if job.plan is not None else 0,
    )
    job.emit(
        Persist(
            "generation-opened",
            f"generation {plan.generation} ({kind.name.lower()}) with {plan.world_size} worker(s): {plan.reason}",
            {"plan": plan, "leavers": [member.worker for member in job.attempt.leavers]},
        )
    )
    for worker_id in sorted(job.attempt.participants):
        job.tell(job.workers[worker_id], Prepare(plan))


def _rebuilt(job: Job, blends: Sequence[Blend], snapshot: SnapshotId | None) -> tuple[Rebuilt, ...]:
    """The layers that the next world has been made with from others, the newest time each."""
    newest = math.inf if snapshot is None else snapshot.step
    found = {each.layer: each for each in job.rebuilt if each.step < newest}
    found |= {blend.layer: Rebuilt(blend.layer, job.step_committed) for blend in blends}
    return tuple(found[layer] for layer in sorted(found))


def tell_of_no_layout(job: Job, found: NoLayout, now: float) -> None:
    """Say why a pipeline is not cut, once; end a job for which no number of workers would do."""
    if found.is_final:
        end_job(job, "failed", found.reason, now)
    elif job.no_layout != found.reason:
        job.no_layout = found.reason
        job.emit(Persist("job-waits", f"the pipeline cannot be cut: {found.reason}", {}))


def site_of(node: Node) -> PlanNode:
    """Return a node as plans name it."""
    return PlanNode(node.id, node.domain, node.peer_address, node.data_key, node.island)


def _candidate(job: Job, worker_id: str) -> Candidate:
    worker = job.workers[worker_id]
    node = job.nodes[worker.node]
    return Candidate(worker.id, node.id, worker.local_rank, node.worker_address, node.peer_address)


def abandon_switch(job: Job, reason: str) -> None:
    """Give up a switch that is not committed; a generation of another kind is replaced only by a newer one."""
    attempt = job.attempt
    if attempt is None or not attempt.may_be_abandoned:
        return
    job.attempt = None
    generation = attempt.plan.generation
    job.emit(
        Persist("generation-abandoned", f"generation {generation} abandoned: {reason}", {"generation": generation})
    )
    for worker_id in sorted(attempt.participants):
        if job.workers[worker_id].alive:
            job.tell(job.workers[worker_id], Abandon(generation))


def suspect(job: Job, generation: int, reason: str, now: float) -> None:
    """Note that a generation broke; `fencing.py` acts on it unless a loss that explains it is found first."""
    if job.suspicion is None or generation > job.suspicion.generation:
        job.suspicion = Suspicion(generation, reason, now)


def worlds_in_use(job: Job) -> tuple[int, ...]:
    """Generations in which workers may be training: a broken collective of another one says nothing new."""
    attempt = job.attempt
    if attempt is None or attempt.may_be_abandoned:
        return (job.plan.generation,) if job.plan is not None else ()
    if not attempt.committed:
        return ()
    if attempt.plan.kind is PlanKind.SWITCH:
        return (attempt.replaces, attempt.plan.generation)
    return (attempt.plan.generation,)
