"""What people see of a job, derived from the machine's state. It decides and changes nothing."""

from __future__ import annotations

from controller.machine import ControllerMachine
from controller.state import natural
from elastic.domain import NodeView, StatusReply, WorkerView
from monitoring.goodput import Goodput


def status(machine: ControllerMachine, now: float) -> StatusReply:
    """Return what people see."""
    plan = machine.plan
    ranks = {m.worker: m.rank for m in plan.members} if plan is not None else {}
    views = []
    for node in sorted(machine.nodes.values(), key=lambda n: natural(n.id)):
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
            for w in sorted(machine.workers.values(), key=lambda w: (w.local_rank, w.id))
            if w.node == node.id and w.alive
        )
        views.append(
            NodeView(node.id, node.state, node.pid, node.peer_address, max(0.0, now - node.heard_at), workers)
        )
    until = machine.ended_at if machine.ended_at is not None else now
    elapsed_s = until - machine.started_at if machine.started_at is not None else 0.0
    trained_s = until - machine.first_commit_at if machine.first_commit_at is not None else 0.0
    goodput = Goodput(elapsed_s, elapsed_s - trained_s, machine.incidents.seconds_lost)
    return StatusReply(
        job=machine.settings.job,
        state=machine.state,
        reason=machine.reason,
        generation=plan.generation if plan is not None else 0,
        step=machine.step_committed,
        world_size=sum(1 for m in plan.members if machine.workers[m.worker].alive) if plan is not None else 0,
        nodes=tuple(views),
        slots=machine.spec.slots if machine.spec is not None else 0,
        virtual_replicas=machine.spec.virtual_replicas if machine.spec is not None else 0,
        samples=machine.samples,
        loss=machine.loss,
        elapsed_s=goodput.elapsed_s,
        productive_s=goodput.productive_s,
        incidents_total=machine.incidents.total,
        incidents=machine.incidents.newest(),
        digest=machine.digest,
        step_s=machine.steps.median_s(),
        reduction=machine.spec.reduction if machine.spec is not None else "",
    )
