"""The controller's decisions, as a pure machine: events in (`events.py`), effects out.

The machine reads no clock (`now` is an argument, in seconds of any monotonic clock), performs no I/O and draws no random
numbers, so that the simulator and the daemon run the very same code. This file only finds the part that an event concerns,
and hands it the `Job` (`job.py`), which is all the state there is. Parts call each other straight, but only downwards:

    nodes.py       how nodes come, are lost, and leave
    workers.py     what workers say, and which of them may train
    links.py       worlds that stand still, dead links between nodes
    losses.py      what the loss of a worker means
    recovering.py  the ledger, and the wait for agents that may come back with what they hold
    commits.py     what becomes of a generation that was opened
    switching.py   who joins and who leaves, while the others train on
    fencing.py     who goes on after a fault
    restoring.py   the state is brought back from the nodes' memory, or from a checkpoint
    saving.py      when a checkpoint is written
    founding.py    the first world
    endings.py     the end of the job
    inquiring.py   where all workers are when one may be lost
    probing.py     which nodes cannot reach each other
    attempts.py    how a generation is opened, given up, or suspected
    layouts.py     how a pipeline is cut in the next world
    straggling.py  layers leave workers that are slow
    places.py      where a worker is started
    accounting.py  where the time goes

How a generation goes:

    fault      -> FENCE g: Prepare to all survivors -> all Prepared (sealed, group built, what they hold) -> restore
                  step = the newest committed anywhere -> ledger -> Commit g -> all Switched -> running
    join/leave -> SWITCH g: Prepare to all -> all Prepared (group built aside, training goes on; a joiner is warm too)
                  -> ledger -> Commit g; the verdict of a step decides when everybody has it, and all adopt at that boundary
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from controller.accounting import charge, write_accounts, write_if_due
from controller.endings import check_finished
from controller.events import (
    AgentAttached,
    AgentGone,
    AgentSaid,
    CloseAgent,
    ControllerEffect,
    ControllerEvent,
    DrainAsked,
    SaveAsked,
    StopAsked,
    Tick,
    ToAgent,
)
from controller.founding import check_start_timeout, found_if_complete
from controller.inquiring import begin_inquiry, check_inquiry, take_evidence
from controller.job import Job
from controller.layouts import plan_ahead
from controller.links import check_probing, check_standstill, fence_if_unexplained, probe_left_out
from controller.losses import attempt_expired, worker_exited
from controller.nodes import agent_attached, drain, drain_refusal, let_drained_go, node_lost, node_said_goodbye
from controller.probing import take_answer
from controller.recovering import finish_recovering, restore_from_ledger
from controller.redundancy import check_redundancy
from controller.restoring import check_restoring, take_assembled, take_checkpoint, take_found
from controller.saving import save, save_if_due, save_refusal, stop, take_saved
from controller.state import Node
from controller.switching import consider_switch
from controller.workers import note_status, worker_said
from elastic.domain import (
    AgentHello,
    AgentMessage,
    CheckpointFound,
    CheckpointSaved,
    EvidenceCollected,
    FromWorker,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    PeersProbed,
    SnapshotAssembled,
    SnapshotsFound,
    Suspected,
    WorkerExited,
    WorkerStarted,
)


class ControllerMachine(Job):
    """The job as it takes events in; it has no state beyond the `Job`'s."""

    __slots__ = ()

    def step(self, event: ControllerEvent, now: float) -> list[ControllerEffect]:
        """Take one event in and return its effects, in the order in which they must happen."""
        self.effects = []
        if self.started_at is None:
            self.started_at = self.founding_since = now
        charge(self, now)
        match event:
            case AgentAttached(hello):
                agent_attached(self, hello, now)
            case AgentSaid(incarnation, message):
                node = self.node_of(incarnation)
                if node is not None:  # otherwise the stream was given up
                    self._agent_said(node, message, now)
            case AgentGone(incarnation, reason):
                node = self.node_of(incarnation)
                if node is not None:
                    node_lost(self, node, f"its stream ended: {reason}", "stream", now)
            case DrainAsked(node_id):
                drain(self, node_id, now)
            case SaveAsked():
                save(self, now)
            case StopAsked(reason):
                stop(self, reason or "stopped on request", now)
            case Tick():
                self._tick(now)
        check_inquiry(self, now)
        effects, self.effects = write_accounts(self, self.effects, now), []
        return effects

    def restore(self, records: Iterable[tuple[str, Mapping[str, Any]]], now: float) -> None:
        """Rebuild the state from the ledger; the machine then waits for agents before it acts.

        `records` are (kind, data) in order; data holds the values that Persist was given.
        """
        restore_from_ledger(self, records, now)

    def drain_refusal(self, node_id: str) -> str:
        """Return why a node cannot be drained now, or ""."""
        return drain_refusal(self, node_id)

    def save_refusal(self) -> str:
        """Return why no checkpoint can be written now, or ""."""
        return save_refusal(self)

    def _agent_said(self, node: Node, message: AgentMessage, now: float) -> None:
        node.heard_at = now
        match message:
            case Heartbeat(sequence, statuses):
                self.emit(ToAgent(node.incarnation, HeartbeatAck(sequence)))
                for status in statuses:
                    note_status(self, status, now)
            case WorkerStarted(worker_id, _, pid):
                if worker_id in self.workers:
                    self.workers[worker_id].pid = pid
            case WorkerExited():
                worker_exited(self, message, now)
            case FromWorker(worker_id, inner):
                worker = self.workers.get(worker_id)
                if worker is not None and worker.alive and worker.node == node.id:
                    worker_said(self, worker, inner, now)
            case PeersProbed():
                take_answer(self, node.id, message)
                check_probing(self, now)
            case Suspected(worker_id):
                if worker_id in self.workers and self.workers[worker_id].alive:
                    begin_inquiry(self, f"worker {worker_id}", now)
            case EvidenceCollected():
                take_evidence(self, node, message)
            case SnapshotsFound():
                take_found(self, node, message, now)
            case SnapshotAssembled():
                take_assembled(self, node, message, now)
            case CheckpointSaved():
                take_saved(self, node, message, now)
            case CheckpointFound():
                take_checkpoint(self, node, message, now)
            case Goodbye(reason):
                node_said_goodbye(self, node, reason, now)
            case AgentHello():
                self.emit(CloseAgent(node.incarnation, "a second Hello on one stream"))

    def _tick(self, now: float) -> None:
        """Time has passed: look at every deadline, the nodes' leases first."""
        timeout = self.settings.failure_timeout_s
        if self.last_tick is not None and now - self.last_tick > timeout / 2:
            # The controller itself stood still: silence in that time is nobody else's fault.
            for node in self.nodes.values():
                node.heard_at = min(now, node.heard_at + now - self.last_tick)
            self.standstill = None  # nor has it seen that nothing moved meanwhile
        self.last_tick = now
        if self.outcome:
            return
        for node in list(self.nodes.values()):
            if node.attached and now - node.heard_at > timeout:
                node_lost(self, node, f"silent for {now - node.heard_at:.1f} s", "lease", now)
        if self.recovering_until is not None:
            finish_recovering(self, now)
            return
        if check_finished(self, now):
            return
        attempt = self.attempt
        if attempt is not None and not attempt.committed and now > attempt.deadline:
            attempt_expired(self, attempt, now)
        else:
            check_probing(self, now)
            fence_if_unexplained(self, now)
        check_standstill(self, now)
        probe_left_out(self, now)
        check_redundancy(self, now)
        write_if_due(self, now)
        plan_ahead(self)
        for look in (save_if_due, check_restoring, found_if_complete, check_start_timeout, consider_switch, let_drained_go):
            if self.outcome or self.recovering_until is not None:
                return
            look(self, now)
