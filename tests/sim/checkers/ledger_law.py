"""Nothing is ordered before it is in the ledger, and no number in the ledger is ever used twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic.domain import Admitted, Commit, ControllerMessage, Finish, Prepare, Shutdown, StartWorker, ToWorker
from tests.sim.clock import Violation
from tests.sim.site import Site
from tests.sim.worker import Worker


class LedgerLaw:
    """What the controller sends against what it has written."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.opened: list[int] = []
        self.committed: list[int] = []
        self.started: set[str] = set()
        self.processes: set[str] = set()
        self.kinds: set[str] = set()

    def on_persisted(self, kind: str, data: Mapping[str, Any]) -> None:
        if "job-ended" in self.kinds and (kind in ("job-ended", "worker-started") or "generation" in kind):
            raise Violation(f"{kind} is written after the job has ended")
        self.kinds.add(kind)
        if kind == "generation-opened":
            generation = data["plan"].generation
            if self.opened and generation <= self.opened[-1]:
                raise Violation(f"generation {generation} is opened after {self.opened[-1]}")
            self.opened.append(generation)
        elif kind == "generation-committed":
            generation = data["generation"]
            if generation != self.opened[-1] or generation in self.committed:
                raise Violation(f"generation {generation} is committed; the newest is {self.opened[-1]}")
            self.committed.append(generation)
        elif kind == "worker-started":
            if data["worker"] in self.started:
                raise Violation(f"worker {data['worker']} is started twice")
            self.started.add(data["worker"])

    def on_forked(self, worker: Worker) -> None:
        if worker.id in self.processes:
            raise Violation(f"two processes are worker {worker.id}")
        self.processes.add(worker.id)
        for other in self.site.workers:
            same_place = other.parent is worker.parent and other.local_rank == worker.local_rank
            if same_place and other.alive and other is not worker:
                raise Violation(f"worker {worker.id} is started in the place of {other.id}, which still runs")

    def on_sent(self, incarnation: str, message: ControllerMessage) -> None:
        match message:
            case StartWorker(worker_id):
                if worker_id not in self.started:
                    raise Violation(f"worker {worker_id} is started, but not in the ledger")
            case ToWorker(_, Prepare(plan)):
                if plan.generation not in self.opened:
                    raise Violation(f"generation {plan.generation} is prepared, but not in the ledger")
            case ToWorker(_, Commit(generation)):
                if generation not in self.committed:
                    raise Violation(f"generation {generation} is committed, but not in the ledger")
            case ToWorker(_, Admitted()):
                if "job-fixed" not in self.kinds:
                    raise Violation("a worker is admitted, but the job is not in the ledger")
            case ToWorker(_, Finish(reason)):
                if reason != "drained" and "loop-ended" not in self.kinds:
                    raise Violation("a worker is told to finish, but the ledger does not say that the loop has ended")
            case Shutdown(reason, exit_code):
                if (reason, exit_code) != ("drained", 0) and "job-ended" not in self.kinds:
                    raise Violation(
                        f"an agent is shut down ({reason}), but the ledger does not say that the job has ended"
                    )
            case _:
                pass
