"""The control thread of a worker, and the one lock under which both its threads meet the protocol.

`Coordinator` owns the worker's machine. The control thread feeds it what the agent passes on, the main thread asks it
what it may do, builders tell it which groups stand. It performs the machine's effects and decides nothing.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc

from elastic.building import GroupBuild
from elastic.config import WorkerConfig
from elastic.domain import (
    Admitted,
    Commit,
    Conclude,
    Concluded,
    Finish,
    Leaving,
    Member,
    Plan,
    PlanKind,
    Prepare,
    Prepared,
    Registered,
    Stage,
    WorkerCommand,
    WorkerMessage,
)
from elastic.errors import BuildCancelled, CollectiveAborted, ProtocolError
from elastic.failpoints import FailPoint, reach_inside
from elastic.group import Group
from elastic.protocol import (
    Answer,
    BuildGroup,
    DropGroup,
    Event,
    Exit,
    GroupFell,
    GroupStands,
    Heard,
    Send,
    WakeMain,
    WorkerMachine,
)
from elastic.store import RendezvousStore
from elastic.v1 import runtime_pb2, runtime_pb2_grpc
from elastic.wire import channels
from elastic.wire.convert import unwrap, wrap

OPERATION_TIMEOUT_S = 1800.0  # a backstop only: every operation is ended by its group's abort long before
WAIT_SLICE_S = 1.0
FATAL_EXIT_CODE = 70


class Coordinator:
    """Joins the two threads of a worker in its machine."""

    def __init__(self, settings: WorkerConfig) -> None:
        self.settings = settings
        self.machine = WorkerMachine(settings.worker)
        self._lock = threading.Condition(threading.RLock())
        self._wakes = 0
        self._groups: dict[int, Group] = {}
        self._builds: dict[int, GroupBuild | None] = {}
        self._stores: dict[int, RendezvousStore] = {}
        self._dropped: list[Group] = []
        self._link: AgentLink | Loopback
        if settings.agent:
            self._link = AgentLink(settings, self._heard, self._link_lost)
        else:
            self._link = Loopback(settings.worker, self._heard)

    # -- main thread -----------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> Answer | None:
        """Give the machine an event, perform its effects, and return its answer to the caller, if it has one."""
        answer: Answer | None = None
        with self._lock:
            for effect in self.machine.step(event):
                match effect:
                    case Send(message):
                        self._link.send(message)
                        if isinstance(message, Prepared):
                            reach_inside(FailPoint.PREPARED)
                    case BuildGroup(plan):
                        self._begin_build(plan)
                    case DropGroup(generation):
                        self._drop(generation)
                    case WakeMain():
                        self._wakes += 1
                        self._lock.notify_all()
                    case Exit(reason):
                        self.end_process(reason)
                    case _:
                        answer = effect
        return answer

    def ask(self, event: Event) -> Answer:
        """As `feed`, for questions, which always have an answer."""
        answer = self.feed(event)
        if answer is None:
            raise ProtocolError(f"{event} was not answered: a fault of the runtime")
        return answer

    def wait_until(self, settled: Callable[[], bool]) -> None:
        """Block the main thread until `settled` (looked at under the lock, after every wake-up)."""
        with self._lock:
            while not settled():
                self._lock.wait(WAIT_SLICE_S)

    def ask_until(self, event: Event, settled: Callable[[Answer], bool]) -> Answer:
        """Ask again after every wake-up until the answer is settled."""
        while True:
            with self._lock:
                wakes = self._wakes
            answer = self.ask(event)
            if settled(answer):
                return answer
            with self._lock:
                while self._wakes == wakes:
                    self._lock.wait(WAIT_SLICE_S)

    def group(self, generation: int) -> Group:
        """Return the group of an adopted generation."""
        with self._lock:
            return self._groups[generation]

    def bury(self) -> None:
        """Destroy groups that were dropped; the main thread must be out of all collectives."""
        with self._lock:
            dropped, self._dropped = self._dropped, []
        for group in dropped:
            group.drain()
            group.close()

    def flush(self, timeout_s: float) -> None:
        """Wait until what was sent has left this process."""
        self._link.flush(timeout_s)

    # -- the link --------------------------------------------------------------------------------------------------

    def _heard(self, command: WorkerCommand) -> None:
        self.feed(Heard(command))

    def _link_lost(self, reason: str) -> None:
        with self._lock:
            finished = bool(self.machine.finished)
        if not finished:
            self.end_process(f"the agent is gone ({reason})")

    @staticmethod
    def end_process(reason: str) -> NoReturn:
        """End this worker at once: what it holds is of no use, and its place is filled by another."""
        print(f"elastic: this worker ends: {reason}", file=sys.stderr, flush=True)
        os._exit(FATAL_EXIT_CODE)

    # -- groups ----------------------------------------------------------------------------------------------------

    def _begin_build(self, plan: Plan) -> None:
        self._builds[plan.generation] = None
        threading.Thread(target=self._build, args=(plan,), name=f"join-g{plan.generation}", daemon=True).start()

    def _build(self, plan: Plan) -> None:
        rank = plan.rank_of(self.settings.worker)
        assert rank is not None
        timeout_s = plan.prepare_timeout_ms / 1000
        store = RendezvousStore(self._link.channel, plan, timeout_s) if self._link.channel is not None else None
        with self._lock:
            if plan.generation not in self._builds:
                return  # dropped before it began
            build = GroupBuild(
                store,
                rank,
                plan.world_size,
                generation=plan.generation,
                address=plan.members[rank].address,
                connect_timeout_s=timeout_s,
                operation_timeout_s=OPERATION_TIMEOUT_S,
                neighbours=self._neighbours(plan, rank),
            )
            self._builds[plan.generation] = build
            if store is not None:
                self._stores[plan.generation] = store
        try:
            group = build.result()
        except BuildCancelled:
            self._forget_build(plan.generation)
            return
        except CollectiveAborted as error:
            self._forget_build(plan.generation)
            self.feed(GroupFell(plan.generation, str(error)))
            return
        with self._lock:
            wanted = plan.generation in self._builds
            self._forget_build(plan.generation)
            if wanted:
                self._groups[plan.generation] = group
                self.feed(GroupStands(plan.generation))
                return
        group.abort("its generation was dropped")
        group.close()

    def _neighbours(self, plan: Plan, rank: int) -> list[int]:
        if not self.settings.shares_memory:
            return []
        return [m.rank for m in plan.members if m.node == plan.members[rank].node and m.rank != rank]

    def _forget_build(self, generation: int) -> None:
        with self._lock:
            self._builds.pop(generation, None)
            self._stores.pop(generation, None)

    def _drop(self, generation: int) -> None:
        build = self._builds.pop(generation, None)
        store = self._stores.pop(generation, None)
        if store is not None:
            store.cancel("a newer generation was opened")
        if build is not None:
            build.cancel("a newer generation was opened")
        group = self._groups.pop(generation, None)
        if group is not None:
            group.abort(f"generation {generation} is over")
            self._dropped.append(group)


class AgentLink:
    """The stream to the agent: a reader (the control thread) and an outbox."""

    def __init__(
        self, settings: WorkerConfig, heard: Callable[[WorkerCommand], None], lost: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._heard = heard
        self._lost = lost
        self._outbox: queue.SimpleQueue[WorkerMessage | threading.Event] = queue.SimpleQueue()
        self.channel: grpc.Channel | None = channels.blocking_client(f"unix:{settings.agent}")
        threading.Thread(target=self._read, name="elastic-control", daemon=True).start()

    def send(self, message: WorkerMessage) -> None:
        """Queue a message for the controller."""
        self._outbox.put(message)

    def flush(self, timeout_s: float) -> None:
        """Wait until everything queued so far has been taken by the stream."""
        passed = threading.Event()
        self._outbox.put(passed)
        passed.wait(timeout_s)

    def _outgoing(self) -> Iterator[runtime_pb2.WorkerUp]:
        yield runtime_pb2.WorkerUp(hello=runtime_pb2.WorkerHello(worker=self._settings.worker, pid=os.getpid()))
        while True:
            item = self._outbox.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            yield runtime_pb2.WorkerUp(message=wrap("WorkerMessage", item))

    def _read(self) -> None:
        assert self.channel is not None
        reason = "it closed the stream"
        try:
            # An agent that is slow to accept is not gone: if it is, this process is ended with it.
            for command in runtime_pb2_grpc.WorkerStub(self.channel).Attach(self._outgoing(), wait_for_ready=True):
                self._heard(unwrap(command))
        except grpc.RpcError as error:
            reason = error.details() if isinstance(error, grpc.Call) else str(error)
        self._lost(reason or "reset")


class Loopback:
    """A world of one without an agent: what the controller would say, said at once."""

    channel: grpc.Channel | None = None

    def __init__(self, worker: str, heard: Callable[[WorkerCommand], None]) -> None:
        self._worker = worker
        self._heard = heard

    def send(self, message: WorkerMessage) -> None:
        """Answer a message as a controller with a single worker does."""
        match message:
            case Registered(spec):
                slots = spec.slots or 1
                replicas = spec.virtual_replicas or 1
                self._heard(Admitted(slots, replicas, spec.reduction, spec.seed))
                member = Member(self._worker, "localhost", 0, 0, "127.0.0.1")
                plan = Plan(
                    generation=1,
                    kind=PlanKind.FOUND,
                    members=(member,),
                    owners=(0,) * slots,
                    virtual_replicas=replicas,
                    prepare_timeout_ms=10_000,
                    reason="a world of one",
                    stages=(Stage(0, len(spec.layers), (0,)),) if spec.layers else (),
                    routes=(0,) * slots if spec.layers else (),
                )
                self._heard(Prepare(plan))
            case Prepared(generation):
                self._heard(Commit(generation))
            case Leaving(concludes=True):
                self._heard(Conclude("done"))
            case Leaving() | Concluded():
                self._heard(Finish("done"))
            case _:
                pass

    def flush(self, timeout_s: float) -> None:
        """Nothing is ever on its way."""
