"""An agent process around the real `AgentMachine`, and the node with its supervisor that starts it again."""

from __future__ import annotations

import signal
from typing import Any

from agent.events import (
    AgentEvent,
    CarriedOut,
    CarryOut,
    Connected,
    Disconnected,
    DropConnection,
    EndAgent,
    EndAsked,
    Fork,
    Forked,
    ForkFailed,
    Forward,
    Heard,
    Looked,
    OpenGeneration,
    ProcessEnded,
    Report,
    Signal,
    Tick,
    WorkerSaid,
)
from agent.machine import AgentMachine, AgentSettings
from elastic.domain import (
    NO_STEP,
    AgentHello,
    AssembleSnapshot,
    CheckpointFound,
    CheckpointSaved,
    CollectEvidence,
    EvidenceCollected,
    FindCheckpoint,
    FindSnapshots,
    PeersProbed,
    Plan,
    ProbePeers,
    SaveCheckpoint,
    SnapshotAssembled,
    SnapshotsFound,
    StartWorker,
    WorkerEvidence,
)
from elastic.snapshots import SnapshotId
from tests.sim.links import Stream
from tests.sim.memory import Memory, Shot, assemble, group_of
from tests.sim.process import Process
from tests.sim.worker import Worker
from tests.sim.world import World

TICK_S = 0.05


class Node:
    """A machine: what stays when its agent dies."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.agents: list[Agent] = []
        self.partitioned_until_s = 0.0
        self.abandoned = False  # nobody will start an agent here again
        self.exit_code: int | None = None

    @property
    def agent(self) -> Agent | None:
        """The newest agent, dead or alive."""
        return self.agents[-1] if self.agents else None

    def start_agent(self) -> None:
        """Start an agent, unless one is running or nothing is left to do."""
        if self.abandoned or self.world.is_over() or (self.agent is not None and self.agent.alive):
            return
        self.agents.append(Agent(self.world, self, len(self.agents) + 1))

    def agent_ended(self, code: int) -> None:
        """The supervisor's rule: what fails is started again, what ends well is not."""
        self.exit_code = code
        if code == 0 or len(self.agents) > 6:
            self.abandoned = True
        elif not self.abandoned:
            self.world.clock.after(self.world.random.uniform(0.2, 3.0), self.start_agent)


class Agent(Process):
    """One agent process."""

    def __init__(self, world: World, node: Node, number: int) -> None:
        super().__init__(world.clock)
        self.world = world
        self.node = node
        self.random = world.random
        self.incarnation = f"{node.name}#{number}"
        scenario = world.scenario
        self.machine = AgentMachine(
            AgentSettings(
                AgentHello(
                    job=scenario.settings.job,
                    node=node.name,
                    incarnation=self.incarnation,
                    pid=1000 + number,
                    nproc=scenario.nproc,
                    peer_address=f"{node.name}:1",
                    worker_address=node.name,
                ),
                controller_timeout_s=scenario.controller_timeout_s,
                leave_grace_s=3.0,
            )
        )
        self.memory = Memory()
        self._captured: dict[SnapshotId, Plan] = {}
        self.workers: dict[str, Worker] = {}  # until their end is known
        self.forked: list[Worker] = []
        self.stream: Stream | None = None
        world.note("agent %s starts", self.incarnation)
        self.post(self.random.uniform(0.0, 0.1), self._connect)
        self.post(TICK_S * self.random.random(), self._tick)

    # -- the process -----------------------------------------------------------------------------------------------

    def die(self, code: int, *, silent: bool = False) -> None:
        """End; the kernel takes all workers along. `silent`: the machine lost power, nobody hears of it."""
        if not self.alive:
            return
        self.world.note("agent %s ends with code %d", self.incarnation, code)
        self.alive = False
        for worker in self.workers.values():
            if silent:
                worker.die(-9, silent=True)
            else:
                self.clock.after(self.random.uniform(0.0, 0.02), worker.die, -9)
        if self.stream is not None:
            if silent:
                self.stream.vanish(self)
            elif code == 0:
                self.stream.close(self)
            else:
                self.stream.die(self)
        self.node.agent_ended(code)

    def die_between_effects(self) -> None:
        self.world.note("agent %s is killed between two effects", self.incarnation)
        self.die(-9)

    def handle(self, event: AgentEvent) -> None:
        """Give the machine an event and perform its effects one by one. Raises Died."""
        for effect in self.machine.step(event, self.clock.now):
            self.spend_effect()
            match effect:
                case Fork(order):
                    self.world.note("agent %s forks %s", self.incarnation, order.worker)
                    self.post(self.random.uniform(0.005, 0.05), self._fork, order)
                case Signal(worker_id, signum, reason):
                    self.world.note("agent %s sends signal %d to %s: %s", self.incarnation, signum, worker_id, reason)
                    self._signal(worker_id, signum)
                case Report(message):
                    if self.stream is not None:
                        self.stream.send(self, message)
                case Forward(worker_id, command):
                    worker = self.workers.get(worker_id)
                    if worker is not None and worker.alive:
                        worker.stream.send(self, command)
                case CarryOut(FindSnapshots() as order):
                    self.post(self.random.uniform(0.001, 0.05), self._answer_search, order)
                case CarryOut(AssembleSnapshot() as order):
                    self.post(self.random.uniform(0.002, 0.3), self._assemble, order)
                case CarryOut(FindCheckpoint() as order):
                    self.post(self.random.uniform(0.05, 0.5), self._look_for_checkpoint, order)
                case CarryOut(SaveCheckpoint() as order):
                    self.post(self.random.uniform(0.05, 1.5), self._save, order)
                case CarryOut(CollectEvidence() as order):
                    self.post(self.random.uniform(0.001, 1.5), self._answer_inquiry, order)
                case OpenGeneration():
                    pass  # no rendezvous store here: groups.py builds by itself
                case CarryOut(ProbePeers() as order):
                    self.post(self.random.uniform(0.002, 0.05), self._answer_probe, order)
                case DropConnection(reason):
                    self.world.note("agent %s drops its stream: %s", self.incarnation, reason)
                    self.post(0.0, self._drop_stream, reason)
                case EndAgent(code, reason):
                    self.world.note("agent %s ends: %s", self.incarnation, reason)
                    self.world.observe("agent_ended", self, code, reason)
                    self.die(code)
                    self.spend_effect()

    # -- workers ---------------------------------------------------------------------------------------------------

    def _fork(self, order: StartWorker) -> None:
        if self.world.fork_fails():
            self.handle(ForkFailed(order.worker, "no memory"))
            return
        pid = self.world.next_pid()
        worker = Worker(self.world, self, order, pid)
        self.forked.append(worker)
        self.world.observe("forked", worker)
        self.workers[order.worker] = worker
        self.world.moment("forked", worker)
        self.handle(Forked(order.worker, pid))

    def _signal(self, worker_id: str, signum: int) -> None:
        worker = self.workers.get(worker_id)
        if worker is None:
            return
        if signum == signal.SIGKILL:
            worker.die(-signum)
            return
        worker.go_on()
        if self.random.random() < 0.8:  # the rest take longer than anybody's patience
            worker.post(self.random.uniform(0.0, 0.3), worker.die, -signum)

    def worker_ended(self, worker: Worker, code: int) -> None:
        """A worker's pidfd says so, some time later."""
        self.post(self.random.uniform(0.001, 0.05), self._reaped, worker, code)

    def _reaped(self, worker: Worker, code: int) -> None:
        self._look(worker)
        del self.workers[worker.id]
        self.handle(ProcessEnded(worker.id, code))

    def _look(self, worker: Worker) -> None:
        state = "T" if worker.stopped else "S" if worker.alive else "Z"
        self.handle(
            Looked(
                worker.id,
                state,
                worker.page_generation,
                worker.page_committed,
                worker.page_progress,
                0.0,
                worker.page_committed,
                waits=worker.page_waits,
                stable=worker.snapshotter.stable,
                compute_s=worker.compute_s(),
            )
        )

    def _answer_probe(self, order: ProbePeers) -> None:
        dead = self.world.groups.dead_links
        silent = tuple(peer.node for peer in order.peers if frozenset((self.node.name, peer.node)) in dead)
        self.handle(CarriedOut(PeersProbed(order.generation, silent)))

    def _answer_inquiry(self, order: CollectEvidence) -> None:
        found = tuple(
            WorkerEvidence(worker.id, worker.pid, "T" if worker.stopped else "R", waits=worker.page_waits)
            for worker in self.workers.values()
        )
        self.handle(CarriedOut(EvidenceCollected(order.inquiry, found)))

    # -- snapshots -------------------------------------------------------------------------------------------------

    def _answer_search(self, order: FindSnapshots) -> None:
        self.handle(CarriedOut(SnapshotsFound(order.search, self.memory.holdings())))

    def _assemble(self, order: AssembleSnapshot) -> None:
        snapshot = SnapshotId(order.step, order.generation)
        sources = {source.slice: source.node for source in order.sources}
        if order.checkpoint:
            digest = self.world.disk.get(snapshot)
        else:
            digest = assemble(self.world.memories(self.node.name), order.world, snapshot, sources, order.decoded)
        if digest is not None:
            self.memory.readable = {snapshot: tuple(Shot(snapshot, index, digest) for index in range(order.slices))}
        refusal = "" if digest is not None else "a slice is gone"
        self.handle(CarriedOut(SnapshotAssembled(order.search, refusal)))

    def _look_for_checkpoint(self, order: FindCheckpoint) -> None:
        newest = max(self.world.disk, default=None)
        answer = CheckpointFound(order.search)
        if newest is not None:
            answer = CheckpointFound(order.search, f"disk/{newest.step}", newest.step, newest.generation)
        self.handle(CarriedOut(answer))

    def _save(self, order: SaveCheckpoint) -> None:
        stable = max((w.snapshotter.stable for w in self.workers.values() if w.alive), default=NO_STEP)
        here = [s for s in self._captured if s.step == stable and self.memory.shots(s)]
        digest = None
        if here:
            snapshot, plan = here[0], self._captured[here[0]]
            sources = {member.rank: member.node for member in plan.members}
            digest = assemble(self.world.memories(self.node.name), plan, snapshot, sources, ())
        if digest is None or self.random.random() < 0.1:
            self.handle(CarriedOut(CheckpointSaved(order.number, refusal="the disk is full")))
            return
        self.world.disk[snapshot] = digest
        self.world.moment("saved", self)
        self.handle(CarriedOut(CheckpointSaved(order.number, stable, f"disk/{stable}")))

    def captured(self, plan: Plan, snapshot: SnapshotId) -> None:
        """A worker has captured a slice of a snapshot."""
        if snapshot in self._captured:
            return
        self._captured[snapshot] = plan
        if plan.parity_shards:
            self.post(self.random.uniform(0.001, 0.1), self._protect, plan, snapshot, 40)

    def _protect(self, plan: Plan, snapshot: SnapshotId, tries: int) -> None:
        """Make this node's parity, once all in its group have captured; protected is what all have the parity of."""
        group = group_of(plan, self.node.name)
        memories = self.world.memories(self.node.name)
        if group is None or tries == 0:
            return
        there = [node for node in group.nodes if node in memories and memories[node].has_all_of(node, snapshot, plan)]
        if len(there) < len(group.nodes):
            self.post(self.random.uniform(0.01, 0.2), self._protect, plan, snapshot, tries - 1)
            return
        self.memory.parity.add(snapshot)
        if all(snapshot in memories[node].parity for node in group.nodes):
            newest = self.memory.protected
            self.memory.protected = snapshot if newest is None else max(newest, snapshot, key=lambda s: (s.generation, s.step))
        else:
            self.post(self.random.uniform(0.01, 0.1), self._protect, plan, snapshot, tries - 1)

    def on_message(self, stream: Stream, message: Any) -> None:
        if stream is self.stream:
            self.handle(Heard(message))
            return
        for worker in self.workers.values():
            if worker.stream is stream:
                self.handle(WorkerSaid(worker.id, message))
                return

    # -- the link --------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        # As gRPC does: the call is made at once, and fails later if nobody is there.
        self.stream = self.world.connect_controller(self, self.node.partitioned_until_s)
        self.world.moment("agent connects", None)
        self.handle(Connected())

    def on_reset(self, stream: Stream, reason: str) -> None:
        if stream is self.stream:
            self._lose_stream(reason)

    def _drop_stream(self, reason: str) -> None:
        if self.stream is not None:
            self.stream.close(self)
            self._lose_stream(reason)

    def _lose_stream(self, reason: str) -> None:
        self.stream = None
        self.post(self.random.uniform(0.05, 0.4), self._connect)
        self.handle(Disconnected(reason))

    # -- time ------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self.post(TICK_S, self._tick)
        for worker in list(self.workers.values()):
            self._look(worker)
        self.handle(Tick())

    def ask_to_end(self) -> None:
        """SIGTERM."""
        self.run(self.handle, EndAsked("SIGTERM received"))
