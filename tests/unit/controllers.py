"""A controller's machine with everybody who speaks to it, for transcripts: what is said, what is written and ordered.

`Job` speaks for all agents and workers. What the machine answers is written as short lines: `ledger KIND`, `WORKER: ORDER`,
`INCARNATION: ORDER`, `close INCARNATION`, `END OUTCOME`.
"""

from __future__ import annotations

from typing import Any

from controller.events import (
    AgentAttached,
    AgentSaid,
    CloseAgent,
    ControllerEffect,
    ControllerEvent,
    EndJob,
    KeepEvidence,
    Persist,
    Tick,
    ToAgent,
)
from controller.machine import ControllerMachine
from controller.state import JobSettings
from elastic.domain import (
    NO_STEP,
    Abandon,
    Admitted,
    AgentHello,
    AssembleSnapshot,
    CollectEvidence,
    Commit,
    Conclude,
    FindCheckpoint,
    FindSnapshots,
    Finish,
    FromWorker,
    Heartbeat,
    HeartbeatAck,
    KillWorker,
    PeersProbed,
    Prepare,
    Prepared,
    ProbePeers,
    Refused,
    Registered,
    Resumed,
    SaveCheckpoint,
    Shutdown,
    SnapshotAssembled,
    SnapshotHolding,
    SnapshotsFound,
    StartWorker,
    Switched,
    ToWorker,
    TrainingSpec,
    Warm,
    Welcome,
    WorkerCommand,
    WorkerExited,
    WorkerMessage,
    WorkerStatus,
)

SPEC = TrainingSpec(slots=4, dataset_size=100, batch_size=1)


class Job:
    """A controller and everybody who speaks to it."""

    def __init__(self, ledger: list[tuple[str, Any]] | None = None, **settings: Any) -> None:
        self.settings = JobSettings("j", **{"nodes_max": 2, "max_restarts": 1, "start_timeout_s": 60.0, **settings})
        self.machine = ControllerMachine(self.settings)
        self.now = 0.0
        self.ledger = ledger if ledger is not None else []
        if ledger:
            self.machine.restore(list(ledger), self.now)

    def restarted(self) -> Job:
        """The next controller on the same ledger."""
        job = Job(self.ledger)
        job.settings = self.settings
        job.machine.settings = self.settings
        return job

    def feed(self, event: ControllerEvent) -> list[str]:
        lines = []
        for effect in self.machine.step(event, self.now):
            if isinstance(effect, Persist):
                self.ledger.append((effect.kind, effect.data))
            self.perform(effect)
            line = short(effect)
            if line:
                lines.append(line)
        return lines

    def perform(self, effect: ControllerEffect) -> None:
        """For those who want to see effects as they are."""

    def tick(self, seconds: float) -> list[str]:
        """Let time pass in small steps; all agents that are attached go on sending heartbeats."""
        lines = []
        until = self.now + seconds
        while self.now < until - 1e-9:
            self.now = min(until, self.now + 0.5)
            for node in list(self.machine.nodes.values()):
                if node.attached and node.id not in self.silent:
                    lines += self.feed(AgentSaid(node.incarnation, Heartbeat()))
            lines += self.feed(Tick())
        return lines

    silent: frozenset[str] = frozenset()

    def probed(self, **unreachable: tuple[str, ...]) -> list[str]:
        """All nodes answer the newest probe, and the second one; by node whom it did not reach."""
        lines: list[str] = []
        assert self.machine.probing is not None
        while (probing := self.machine.probing) is not None:
            for node in sorted(probing.asked):
                answer = PeersProbed(probing.generation, unreachable.get(node, ()))
                lines += self.feed(AgentSaid(self.machine.nodes[node].incarnation, answer))
        return [line for line in lines if ": probe " not in line]

    def attach(self, node: str, *workers: WorkerStatus, nproc: int = 1, number: int = 1) -> list[str]:
        hello = AgentHello(
            job="j", node=node, incarnation=f"{node}#{number}", nproc=nproc, worker_address=node, workers=workers
        )
        return self.feed(AgentAttached(hello))

    def say(self, worker: str, message: WorkerMessage) -> list[str]:
        node = self.machine.nodes[worker.split("/")[0]]
        return self.feed(AgentSaid(node.incarnation, FromWorker(worker, message)))

    def exits(self, worker: str, code: int = -9, *, blameless: bool = True) -> list[str]:
        node = self.machine.nodes[worker.split("/")[0]]
        return self.feed(AgentSaid(node.incarnation, WorkerExited(worker, code, f"code {code}", blameless, "pidfd")))

    def heartbeat(self, worker: str, generation: int, committed: int, stable: int = NO_STEP) -> list[str]:
        node = self.machine.nodes[worker.split("/")[0]]
        status = WorkerStatus(worker, generation=generation, committed=committed, stable=stable)
        return self.feed(AgentSaid(node.incarnation, Heartbeat(1, (status,))))

    def holds(self, node: str, *held: tuple[int, int, tuple[int, ...]], parity: bool = False) -> list[str]:
        """An agent says what it holds: (step, generation, numbers of the slices)."""
        restoring = self.machine.restoring
        assert restoring is not None
        found = SnapshotsFound(restoring.number, tuple(SnapshotHolding(*one, parity) for one in held))
        return self.feed(AgentSaid(self.machine.nodes[node].incarnation, found))

    def assembled(self, *nodes: str, refusal: str = "") -> list[str]:
        """Agents have what was chosen ready for their workers, or say why not."""
        assert self.machine.restoring is not None
        answer, lines = SnapshotAssembled(self.machine.restoring.number, refusal), []
        for node in nodes:
            lines = self.feed(AgentSaid(self.machine.nodes[node].incarnation, answer))
        return lines

    # -- the usual courses ----------------------------------------------------------------------------------------

    def prepare(self, generation: int, committed: int, *workers: str, has_state: bool = True) -> list[str]:
        """All say Prepared; returns what the last one brings about."""
        lines: list[str] = []
        for worker in workers:
            lines = self.say(worker, Prepared(generation, committed, committed, has_state))
        return lines

    def switch(self, generation: int, committed: int, *workers: str) -> list[str]:
        lines: list[str] = []
        for worker in workers:
            lines = self.say(worker, Switched(generation, committed))
        return lines

    def train(self, generation: int, committed: int, *workers: str) -> None:
        """A step is committed everywhere."""
        for worker in workers:
            self.say(worker, Resumed(generation, committed))
            self.heartbeat(worker, generation, committed)

    def running(self, *nodes: str, nproc: int = 1) -> tuple[str, ...]:
        """Found a world of these nodes, train to step 3, return its workers."""
        for node in nodes:
            self.attach(node, nproc=nproc)
        workers = tuple(f"{node}/{rank}.1" for node in nodes for rank in range(nproc))
        for worker in workers:
            self.say(worker, Registered(SPEC))
        if self.machine.attempt is None:
            self.tick(self.settings.join_timeout_s + 0.5)
        self.prepare(1, 0, *workers)
        self.switch(1, 0, *workers)
        self.train(1, 3, *workers)
        return workers

    def join(self, worker: str) -> list[str]:
        """A started worker registers and warms up."""
        return [*self.say(worker, Registered(SPEC)), *self.say(worker, Warm())]


def short(effect: ControllerEffect) -> str:
    match effect:
        case Persist(kind):
            return f"ledger {kind}"
        case ToAgent(_, ToWorker(worker, command)):
            return f"{worker}: {_short_command(command)}"
        case ToAgent(incarnation, StartWorker(worker)):
            return f"{incarnation}: start {worker}"
        case ToAgent(incarnation, KillWorker(worker, reason)):
            return f"{incarnation}: kill {worker}, {reason}"
        case ToAgent(incarnation, Welcome(keep)):
            return f"{incarnation}: welcome [{' '.join(keep)}]"
        case ToAgent(incarnation, Refused(reason)):
            return f"{incarnation}: refused, {reason}"
        case ToAgent(incarnation, Shutdown(reason, code)):
            return f"{incarnation}: shut down with {code}, {reason}"
        case ToAgent(_, HeartbeatAck()):
            return ""
        case ToAgent(incarnation, FindSnapshots()):
            return f"{incarnation}: find snapshots"
        case ToAgent(incarnation, AssembleSnapshot() as order):
            where = f"from {order.checkpoint}" if order.checkpoint else f"of generation {order.generation}"
            return f"{incarnation}: assemble step {order.step} {where}"
        case ToAgent(incarnation, FindCheckpoint()):
            return f"{incarnation}: find checkpoint"
        case ToAgent(incarnation, SaveCheckpoint()):
            return f"{incarnation}: save checkpoint"
        case ToAgent(incarnation, ProbePeers(_, peers)):
            return f"{incarnation}: probe {' '.join(peer.node for peer in peers)}"
        case ToAgent(incarnation, CollectEvidence()):
            return f"{incarnation}: collect evidence"
        case KeepEvidence(incident):
            return f"keep evidence of {incident.number}"
        case CloseAgent(incarnation):
            return f"close {incarnation}"
        case EndJob(outcome):
            return f"END {outcome}"
        case _:
            raise AssertionError(effect)


def _short_command(command: WorkerCommand) -> str:
    match command:
        case Admitted():
            return "join" if command.joins_running_world else "found"
        case Prepare(plan):
            return f"prepare {plan.generation} {plan.kind.name} [{' '.join(m.worker for m in plan.members)}]"
        case Commit(snapshot_generation=from_memory) if from_memory:
            return f"commit {command.generation} from memory, step {command.restore_step} of generation {from_memory}"
        case Commit(generation, restore_step, joiner_ranks, stop):
            dealt = f", as dealt for {command.kept_deal}" if command.kept_deal else ""
            return f"commit {generation} after {restore_step}, {'stop' if stop else f'joiners {list(joiner_ranks)}'}{dealt}"
        case Conclude():
            return "conclude"
        case Abandon(generation):
            return f"abandon {generation}"
        case Finish(reason):
            return f"finish, {reason}"


A, B, C = "n0/0.1", "n1/0.1", "n2/0.1"
