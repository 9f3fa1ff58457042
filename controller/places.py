"""Worker places, one for each (node, local rank): a process is started in every empty one that may still be filled.

Here is decided only whether a place is filled. What its last worker left behind is `losses.py`, what the new one may do
`workers.py`.
"""

from __future__ import annotations

from controller.events import Persist, ToAgent
from controller.job import Job
from controller.state import Node, Worker
from elastic.domain import StartWorker


def fill_places(job: Job, node: Node) -> None:
    """Start a worker in every empty place of a node."""
    if node.state != "attached" or node.cut_from or job.finishing or job.outcome:
        return
    taken = {w.local_rank for w in job.workers.values() if w.node == node.id and (w.alive or w.state == "finished")}
    for local_rank in range(node.nproc):
        if local_rank in taken or node.restarts.get(local_rank, 0) > job.settings.max_restarts:
            continue
        _start_worker(job, node, local_rank)


def _start_worker(job: Job, node: Node, local_rank: int) -> None:
    serial = job.serials.get((node.id, local_rank), 0) + 1
    job.serials[node.id, local_rank] = serial
    worker = Worker(id=f"{node.id}/{local_rank}.{serial}", node=node.id, local_rank=local_rank)
    job.workers[worker.id] = worker
    expected = job.plan.world_size if job.plan is not None else job.settings.nodes_max * node.nproc
    order = sorted(w.id for w in job.workers.values() if w.alive)
    hint = order.index(worker.id) if job.plan is None else expected
    job.emit(
        Persist(
            "worker-started",
            f"starting worker {worker.id}",
            {"worker": worker.id, "node": node.id, "local_rank": local_rank, "serial": serial},
        )
    )
    job.emit(ToAgent(node.incarnation, StartWorker(worker.id, local_rank, hint, max(expected, hint + 1))))
