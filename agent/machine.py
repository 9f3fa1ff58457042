"""The agent's decisions, as a pure machine: what to start, what to kill, what to pass on, when to give up.

Events in, effects out; `now` is an argument. The machine reads no clock, performs no I/O and draws no random numbers.
It keeps what its workers said last, so that a controller that comes back can be told everything in one Hello.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field, replace

from agent.events import (
    AgentEffect,
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
from elastic.domain import (
    AgentHello,
    AgentMessage,
    AssembleSnapshot,
    CollectEvidence,
    CollectiveFailed,
    Concluded,
    ControllerMessage,
    Failed,
    FindCheckpoint,
    FindSnapshots,
    FromWorker,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    KillWorker,
    Leaving,
    Prepare,
    ProbePeers,
    Refused,
    Registered,
    SaveCheckpoint,
    Shutdown,
    StartWorker,
    Suspected,
    Switched,
    ToWorker,
    Warm,
    Welcome,
    WorkerCommand,
    WorkerExited,
    WorkerMessage,
    WorkerStarted,
    WorkerStatus,
)
from elastic.progress import Operation
from monitoring.hangs import Sections, suspicion_s

STICKY = (Registered, Warm, CollectiveFailed, Leaving, Concluded, Failed)  # what a returning controller must be told
STOPPED = ("T", "t")  # process states: by a signal, by a tracer
OUTSIDE_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # not the program's own fault


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What an agent was started with; fixed for its life.

    Attributes:
        failure_timeout_s: Longest silence that is believed; the controller's Welcome overrides it.
        connect_timeout_s: How long the first attach may take.
        controller_timeout_s: How long workers may wait for a controller that does not answer any more.
        stop_grace_s: Between SIGTERM and SIGKILL when workers are ended in order.
    """

    hello: AgentHello
    failure_timeout_s: float = 2.0
    connect_timeout_s: float = 30.0
    controller_timeout_s: float = 600.0
    stop_grace_s: float = 1.5
    leave_grace_s: float = 10.0


@dataclass(slots=True)
class LocalWorker:
    """One worker process of this node."""

    id: str
    local_rank: int
    pid: int = 0
    status: WorkerStatus = field(default_factory=WorkerStatus)
    said: dict[type, WorkerMessage] = field(default_factory=dict)
    stopped_since: float | None = None
    moved_at: float | None = None  # when it last made progress, or had no need to
    commits: int = 0  # how often its committed step has been seen to grow
    sections: Sections = field(default_factory=Sections)
    suspected: bool = False  # the controller has been told that it may soon be lost
    end_reason: str = ""  # why this agent is ending it; "" while it is wanted
    reported: bool = False  # its end has been told to the controller
    gone: bool = False


class AgentMachine:
    """State of one node; see the module's docstring."""

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.failure_timeout_s = settings.failure_timeout_s
        self.hang_timeout_s = 0.0  # 0: derived from the steps seen
        self.start_timeout_s = 600.0
        self.workers: dict[str, LocalWorker] = {}
        self.connected = False  # a stream is open and the Hello is on it: whatever follows reaches whoever takes it
        self.attached = False  # the controller has welcomed it
        self.was_attached = False
        self.places: dict[str, StartWorker] = {}  # orders that wait for the end of the process before them
        self.highest_generation = settings.hello.highest_generation
        self.detached_since: float | None = None
        self.heartbeat_at = float("-inf")
        self.sequence = 0
        self.heard_at = float("-inf")
        self.ending: Shutdown | None = None
        self.kill_at = float("inf")
        self.ended = False
        self._out: list[AgentEffect] = []

    def step(self, event: AgentEvent, now: float) -> list[AgentEffect]:
        """Take one event in and return what must be done, in order."""
        self._out = []
        match event:
            case Connected():
                self.connected, self.heard_at = True, now
                self._emit(Report(self._hello()))
            case Disconnected():
                if self.attached or self.detached_since is None:
                    self.detached_since = now
                self.connected = self.attached = False
            case Heard(message):
                self.heard_at = now
                self._heard(message, now)
            case Forked(worker_id, pid):
                self._forked(worker_id, pid)
            case ForkFailed(worker_id, reason):
                self._ended(worker_id, 1, f"it could not be started: {reason}", "fork server", blameless=False)
                self._fill_place(self.workers[worker_id].local_rank)
            case WorkerSaid(worker_id, message):
                self._worker_said(worker_id, message)
            case ProcessEnded(worker_id, code, detected_by):
                self._process_ended(worker_id, code, detected_by)
            case Looked():
                self._looked(event, now)
            case CarriedOut(answer):
                self._report(answer)
            case EndAsked(reason):
                self._shut_down(Shutdown(reason, 0 if self.ending is None else self.ending.exit_code), now)
            case Tick():
                self._tick(now)
        self._end_if_empty()
        out, self._out = self._out, []
        return out

    def _emit(self, effect: AgentEffect) -> None:
        self._out.append(effect)

    def _report(self, message: AgentMessage) -> None:
        if self.connected:
            self._emit(Report(message))

    def _hello(self) -> AgentHello:
        return replace(
            self.settings.hello,
            highest_generation=self.highest_generation,
            workers=tuple(
                replace(w.status, messages=tuple(w.said.values())) for w in self.workers.values() if not w.gone
            ),
        )

    # -- the controller --------------------------------------------------------------------------------------------

    def _heard(self, message: ControllerMessage, now: float) -> None:
        match message:
            case Welcome(keep, failure_timeout_ms, _, hang_timeout_ms, start_timeout_ms):
                self.attached, self.was_attached, self.detached_since = True, True, None
                self.failure_timeout_s = failure_timeout_ms / 1000
                self.hang_timeout_s, self.start_timeout_s = hang_timeout_ms / 1000, start_timeout_ms / 1000
                for worker in self.workers.values():
                    if not worker.gone and worker.id not in keep:
                        worker.reported = True  # the controller counts it as lost already
                        self._kill(worker, "the job went on without it")
            case Refused(reason):
                self._shut_down(Shutdown(reason, 1), now)
            case StartWorker():
                self._start(message)
            case KillWorker(worker_id, reason):
                if worker_id in self.workers:
                    self._kill(self.workers[worker_id], reason)
            case ToWorker(worker_id, command):
                self._forward(worker_id, command)
            case Shutdown():
                self._shut_down(message, now)
            case ProbePeers() | FindSnapshots() | AssembleSnapshot() | FindCheckpoint() | SaveCheckpoint() | CollectEvidence():
                self._emit(CarryOut(message))
            case HeartbeatAck():
                pass

    def _start(self, order: StartWorker) -> None:
        if order.worker in self.workers or self.ending is not None:
            return
        place_taken = any(not w.gone and w.local_rank == order.local_rank for w in self.workers.values())
        self.workers[order.worker] = LocalWorker(
            order.worker,
            order.local_rank,
            status=WorkerStatus(worker=order.worker, local_rank=order.local_rank),
        )
        if place_taken:
            self.places[order.worker] = order  # what the old process holds of the machine is not free yet
        else:
            self._emit(Fork(order))

    def _fill_place(self, local_rank: int) -> None:
        for worker_id, order in list(self.places.items()):
            if order.local_rank == local_rank:
                del self.places[worker_id]
                if not self.workers[worker_id].gone:
                    self._emit(Fork(order))
                    return

    def _forward(self, worker_id: str, command: WorkerCommand) -> None:
        if isinstance(command, Prepare) and command.plan.generation > self.highest_generation:
            self.highest_generation = command.plan.generation
            self._emit(OpenGeneration(command.plan.generation))
        worker = self.workers.get(worker_id)
        if worker is not None and not worker.gone and not worker.end_reason:
            self._emit(Forward(worker_id, command))

    def _shut_down(self, order: Shutdown, now: float) -> None:
        if self.ending is not None:
            return
        self.ending = order
        leaving = order.exit_code == 0 and order.reason == "drained"
        self.kill_at = now + (self.settings.leave_grace_s if leaving else self.settings.stop_grace_s)
        if leaving:
            return  # its workers were told to finish and are on their way out
        for worker in self.workers.values():
            if not worker.gone:
                worker.end_reason = worker.end_reason or order.reason
                self._signal(worker, signal.SIGTERM, order.reason)

    def _end_if_empty(self) -> None:
        if self.ending is None or self.ended or any(not w.gone for w in self.workers.values()):
            return
        self.ended = True
        self._report(Goodbye(self.ending.reason))
        self._emit(EndAgent(self.ending.exit_code, self.ending.reason))

    # -- workers ---------------------------------------------------------------------------------------------------

    def _kill(self, worker: LocalWorker, reason: str) -> None:
        worker.end_reason = worker.end_reason or reason
        self._signal(worker, signal.SIGKILL, reason)

    def _signal(self, worker: LocalWorker, signum: int, reason: str) -> None:
        if worker.id in self.places:
            del self.places[worker.id]
            self._ended(worker.id, -signum, reason, "never started", blameless=True)
        elif not worker.gone and worker.pid:
            self._emit(Signal(worker.id, signum, reason))

    def _forked(self, worker_id: str, pid: int) -> None:
        worker = self.workers[worker_id]
        worker.pid = pid
        worker.status = replace(worker.status, pid=pid)
        self._report(WorkerStarted(worker_id, worker.local_rank, pid))
        if worker.end_reason or self.ending is not None:
            self._kill(worker, worker.end_reason or "the agent is ending")

    def _worker_said(self, worker_id: str, message: WorkerMessage) -> None:
        worker = self.workers.get(worker_id)
        if worker is None or worker.gone:
            return
        if isinstance(message, STICKY):
            worker.said[type(message)] = message
        if isinstance(message, Switched):
            worker.said.pop(CollectiveFailed, None)  # the world that broke is behind it
        self._report(FromWorker(worker_id, message))

    def _process_ended(self, worker_id: str, code: int, detected_by: str) -> None:
        worker = self.workers.get(worker_id)
        if worker is None or worker.gone:
            return
        blameless = bool(worker.end_reason) or (code < 0 and -code in OUTSIDE_SIGNALS)
        self._ended(worker_id, code, worker.end_reason or describe_exit(code), detected_by, blameless=blameless)
        worker.gone = True
        self._fill_place(worker.local_rank)

    def _ended(
        self, worker_id: str, code: int, reason: str, detected_by: str, *, blameless: bool, silent_s: float = 0.0
    ) -> None:
        worker = self.workers[worker_id]
        worker.status = replace(worker.status, exited=True, exit_reason=reason)
        if worker.pid == 0:
            worker.gone = True
        if not worker.reported:
            worker.reported = True
            self._report(WorkerExited(worker_id, code, reason, blameless, detected_by, silent_s))

    def _looked(self, look: Looked, now: float) -> None:
        worker = self.workers.get(look.worker)
        if worker is None or worker.gone:
            return
        self._note_progress(worker, look, now)
        worker.status = replace(
            worker.status,
            generation=look.generation,
            committed=look.committed,
            progress=look.progress,
            loss=look.loss,
            samples=look.samples,
            waits=look.waits and look.process_state not in STOPPED,
            stable=look.stable,
            compute_s=look.compute_s,
            gradient_norm=look.gradient_norm,
            evaluated_s=look.evaluated_s,
            busy_s=look.busy_s,
        )
        if worker.end_reason:
            return
        if look.process_state in STOPPED:
            if worker.stopped_since is None:
                worker.stopped_since = now
            stopped_s = now - worker.stopped_since
            reason = f"stopped for {stopped_s:.1f} s"
            if stopped_s >= self.failure_timeout_s:
                self._lose(worker, reason, "process state", blameless=True, silent_s=stopped_s)
            elif stopped_s >= suspicion_s(self.failure_timeout_s, stopped=True):
                self._suspect(worker, reason, "process state")
            return
        worker.stopped_since = None
        silent_s, patience_s = now - max(worker.moved_at or now, look.busy_until_s), self._patience_s(worker)
        reason = f"no progress for {silent_s:.1f} s" + (f" in {look.operation.words}" if look.operation is not None else "")
        if silent_s > patience_s:
            self._lose(worker, reason, "progress", blameless=False, silent_s=silent_s)
        elif silent_s > suspicion_s(patience_s):
            self._suspect(worker, reason, "progress")
        else:
            worker.suspected = False

    def _suspect(self, worker: LocalWorker, reason: str, detected_by: str) -> None:
        """Say once that a worker will be lost unless it goes on, so that all are looked at while it still lives."""
        if not worker.suspected:
            worker.suspected = True
            self._report(Suspected(worker.id, reason, detected_by))

    @staticmethod
    def _note_progress(worker: LocalWorker, look: Looked, now: float) -> None:
        worker.sections.seen(in_callback=look.operation is Operation.CALLBACK, now=now)
        if look.committed > worker.status.committed:
            worker.sections.committed(look.committed - worker.status.committed, now)
            worker.commits += 1
        elif look.progress == worker.status.progress and not look.waits and worker.moved_at is not None:
            return
        worker.moved_at = now

    def _patience_s(self, worker: LocalWorker) -> float:
        """Return how long a worker may make no progress in the user's code."""
        # A joiner's first commit is seen when it is given the state.
        if worker.commits < 2 or Leaving in worker.said:
            return self.start_timeout_s
        return worker.sections.patience_s(self.hang_timeout_s, self.start_timeout_s)

    def _lose(self, worker: LocalWorker, reason: str, detected_by: str, *, blameless: bool, silent_s: float) -> None:
        self._kill(worker, reason)
        # It dies of SIGKILL at once; nobody needs to wait for its last page to be freed.
        self._ended(worker.id, -signal.SIGKILL, reason, detected_by, blameless=blameless, silent_s=silent_s)

    # -- time ------------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        interval = self.failure_timeout_s / 8
        if self.attached and now - self.heartbeat_at >= interval:
            self.heartbeat_at = now
            self.sequence += 1
            self._report(Heartbeat(self.sequence, tuple(w.status for w in self.workers.values() if not w.gone)))
        if self.connected and now - self.heard_at > 2 * self.failure_timeout_s:
            self._emit(DropConnection(f"the controller has been silent for {now - self.heard_at:.1f} s"))
            self.heard_at = now
        if self.detached_since is not None and not self.was_attached:
            if now - self.detached_since > self.settings.connect_timeout_s:
                self._shut_down(
                    Shutdown(
                        f"no controller answered within {self.settings.connect_timeout_s:.0f} s (--connect-timeout): check "
                        "the address given to --controller, and that it runs",
                        1,
                    ),
                    now,
                )
        elif self.detached_since is not None and now - self.detached_since > self.settings.controller_timeout_s:
            self._shut_down(
                Shutdown(
                    f"the controller did not answer for {self.settings.controller_timeout_s:.0f} s "
                    "(--controller-timeout): start it again on its ledger, then this agent",
                    1,
                ),
                now,
            )
        if now > self.kill_at:
            self.kill_at = now + 1.0
            for worker in self.workers.values():
                if not worker.gone:
                    self._kill(worker, self.ending.reason if self.ending is not None else "the agent is ending")


def describe_exit(code: int) -> str:
    """Return an exit code in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
