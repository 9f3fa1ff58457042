"""The controller's decisions, as a pure machine: membership, leases, generations, plans, incidents, the end.

Events in (`events.py`), effects out. The machine reads no clock (`now` is an argument, in seconds of any monotonic
clock), performs no I/O and draws no random numbers, so that the simulator and the daemon run the very same code.

How a generation goes:

    fault      -> FENCE g: Prepare to all survivors -> all Prepared (sealed, group built, what they hold) -> restore
                  step = the newest committed anywhere -> ledger -> Commit g -> all Switched -> running
    join/leave -> SWITCH g: Prepare to all -> all Prepared (group built aside, training goes on; a joiner is warm too)
                  -> ledger -> Commit g; the verdict of a step decides when everybody has it, and all adopt at that boundary
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from controller.events import (
    AgentAttached,
    AgentGone,
    AgentSaid,
    CloseAgent,
    ControllerEffect,
    ControllerEvent,
    DrainAsked,
    EndJob,
    Persist,
    StopAsked,
    Tick,
    ToAgent,
)
from controller.job import Job
from controller.state import Attempt, Node, Suspicion, Worker, natural
from elastic.domain import (
    PROTOCOL_VERSION,
    Abandon,
    Admitted,
    AgentHello,
    AgentMessage,
    CollectiveFailed,
    Commit,
    Failed,
    Finish,
    FromWorker,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Leaving,
    Member,
    Plan,
    PlanKind,
    Prepare,
    Prepared,
    PrepareFailed,
    Refused,
    Registered,
    Resumed,
    Shutdown,
    StartWorker,
    Switched,
    TrainingSpec,
    Warm,
    Welcome,
    WorkerExited,
    WorkerMessage,
    WorkerStarted,
    WorkerStatus,
)
from recovery.plan import Candidate, make_plan

FRUITLESS_LIMIT = 5  # generations in a row that failed although nobody was lost
SWITCH_RETRIES = 3  # attempts to take a joiner in before it is replaced
GRACE_S = 0.25  # how long a broken collective waits for the loss that explains it


class ControllerMachine(Job):
    """The job as it takes events in; it has no state beyond the `Job`'s."""

    __slots__ = ()

    # -- events ----------------------------------------------------------------------------------------------------

    def step(self, event: ControllerEvent, now: float) -> list[ControllerEffect]:
        """Take one event in and return its effects, in the order in which they must happen."""
        self.effects = []
        if self.started_at is None:
            self.started_at = self.founding_since = now
        match event:
            case AgentAttached(hello):
                self._agent_attached(hello, now)
            case AgentSaid(incarnation, message):
                self._agent_said(incarnation, message, now)
            case AgentGone(incarnation, reason):
                node = self.node_of(incarnation)
                if node is not None:
                    self._node_lost(node, f"its stream ended: {reason}", "stream", now)
            case DrainAsked(node_id):
                self._drain(node_id, now)
            case StopAsked(reason):
                self._end("stopped", reason or "stopped on request", now)
            case Tick():
                self._tick(now)
        effects, self.effects = self.effects, []
        return effects

    def _agent_said(self, incarnation: str, message: AgentMessage, now: float) -> None:
        node = self.node_of(incarnation)
        if node is None:
            return  # a stream that was given up
        node.heard_at = now
        match message:
            case Heartbeat(sequence, statuses):
                self.emit(ToAgent(incarnation, HeartbeatAck(sequence)))
                for status in statuses:
                    self._note_status(status, now)
            case WorkerStarted(worker_id, _, pid):
                if worker_id in self.workers:
                    self.workers[worker_id].pid = pid
            case WorkerExited():
                self._worker_exited(message, now)
            case FromWorker(worker_id, inner):
                worker = self.workers.get(worker_id)
                if worker is not None and worker.alive and worker.node == node.id:
                    self._worker_said(worker, inner, now)
            case Goodbye(reason):
                self._node_said_goodbye(node, reason, now)
            case AgentHello():
                self.emit(CloseAgent(incarnation, "a second Hello on one stream"))

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _agent_attached(self, hello: AgentHello, now: float) -> None:
        refusal = self._refusal(hello, now)
        if refusal:
            self.emit(ToAgent(hello.incarnation, Refused(refusal)))
            self.emit(CloseAgent(hello.incarnation, refusal))
            return
        known = self.nodes.get(hello.node)
        if known is not None and known.attached:
            self._node_lost(known, "it attached anew", "stream", now)
        self.newest_generation = max(self.newest_generation, hello.highest_generation)
        node = Node(
            id=hello.node,
            incarnation=hello.incarnation,
            nproc=hello.nproc,
            pid=hello.pid,
            peer_address=hello.peer_address,
            worker_address=hello.worker_address,
            heard_at=now,
            state="draining" if self.draining.get(hello.node) == hello.incarnation else "attached",
            restarts=known.restarts if known is not None else {},
        )
        self.nodes[hello.node] = node
        keep = self._recognise(node, hello)
        self.emit(
            Persist(
                "node-attached",
                f"node {node.id} attached with {node.nproc} worker(s)"
                + (f", {len(keep)} of them running" if keep else ""),
                {"node": node.id, "pid": node.pid, "nproc": node.nproc},
            )
        )
        self.emit(
            ToAgent(
                node.incarnation,
                Welcome(keep, int(self.settings.failure_timeout_s * 1000), self.newest_generation),
            )
        )
        for status in hello.workers:
            if status.worker in keep:
                self._replay(status, now)
        if self.recovering_until is not None:
            self._finish_recovering(now)
        else:
            self._fill(node)

    def _refusal(self, hello: AgentHello, now: float) -> str:
        if hello.protocol_version != PROTOCOL_VERSION:
            return (
                f"node {hello.node} speaks protocol version {hello.protocol_version}, this controller {PROTOCOL_VERSION}: "
                "install one version of elastic-runtime on all nodes"
            )
        if hello.job != self.settings.job:
            return (
                f"node {hello.node} belongs to job {hello.job!r}, this controller runs {self.settings.job!r}: "
                "check --controller and --job"
            )
        if self.settings.token and hello.token != self.settings.token:
            return f"node {hello.node} shows a wrong join token: start it with the token of job {self.settings.job!r}"
        if self.outcome or (self.finishing and self.recovering_until is None):
            return f"job {self.settings.job!r} is over: {self.reason or 'it has finished'}"
        known = self.nodes.get(hello.node)
        if known is not None and known.attached and known.incarnation != hello.incarnation:
            return (
                f"node id {hello.node!r} is already attached (agent pid {known.pid}): give every agent its own --node-id"
            )
        others = [n for n in self.nodes.values() if n.state == "attached" and n.id != hello.node]
        if len(others) >= self.settings.nodes_max:
            return f"the job has its {self.settings.nodes_max} nodes already: raise the MAX of --nnodes to add more"
        return ""

    def _recognise(self, node: Node, hello: AgentHello) -> tuple[str, ...]:
        """Return the workers that a (re)attached agent may keep.

        None, unless nothing has been decided since it was last heard: it comes to a controller that waits for agents.
        """
        keep: list[str] = []
        if self.recovering_until is not None:
            members = {member.worker for member in self.last_members()}
            for status in hello.workers:
                known = self.workers.get(status.worker)
                if status.exited or (known is not None and known.state != "lost"):
                    continue
                if status.generation and status.worker not in members:
                    continue  # a newer world has left it out
                worker = Worker(id=status.worker, node=node.id, local_rank=status.local_rank)
                worker.pid, worker.status = status.pid, replace(status, messages=())
                self.workers[worker.id] = worker
                keep.append(worker.id)
        for worker in self.workers.values():
            if worker.node == node.id and worker.state == "lost":
                worker.state = "dead"  # its agent is here and does not have it, or ends it now
        return tuple(keep)

    def _fill(self, node: Node) -> None:
        """Start a worker in every empty place of a node."""
        if node.state != "attached" or self.finishing or self.outcome:
            return
        taken = {w.local_rank for w in self.workers.values() if w.node == node.id and (w.alive or w.state == "finished")}
        for local_rank in range(node.nproc):
            if local_rank in taken or node.restarts.get(local_rank, 0) > self.settings.max_restarts:
                continue
            self._start_worker(node, local_rank)

    def _start_worker(self, node: Node, local_rank: int) -> None:
        serial = self.serials.get((node.id, local_rank), 0) + 1
        self.serials[node.id, local_rank] = serial
        worker = Worker(id=f"{node.id}/{local_rank}.{serial}", node=node.id, local_rank=local_rank)
        self.workers[worker.id] = worker
        expected = self.plan.world_size if self.plan is not None else self.settings.nodes_max * node.nproc
        order = sorted(w.id for w in self.workers.values() if w.alive)
        hint = order.index(worker.id) if self.plan is None else expected
        self.emit(
            Persist(
                "worker-started",
                f"starting worker {worker.id}",
                {"worker": worker.id, "node": node.id, "local_rank": local_rank, "serial": serial},
            )
        )
        self.emit(ToAgent(node.incarnation, StartWorker(worker.id, local_rank, hint, max(expected, hint + 1))))

    def _node_lost(self, node: Node, reason: str, detected_by: str, now: float) -> None:
        if not node.attached:
            return
        node.state = "lost"
        lost = [w for w in self.workers.values() if w.node == node.id and w.alive]
        self.emit(Persist("node-lost", f"node {node.id} lost: {reason}", {"node": node.id, "detected_by": detected_by}))
        if detected_by != "stream":  # otherwise it has ended, or its agent has opened another
            self.emit(CloseAgent(node.incarnation, reason))
        silent_s = now - node.heard_at if detected_by == "lease" else 0.0
        self._workers_lost(
            lost, "node lost", f"node {node.id}", reason, detected_by, now, state="lost", silent_s=silent_s
        )
        self._check_outcome(now)

    def _node_said_goodbye(self, node: Node, reason: str, now: float) -> None:
        lost = [w for w in self.workers.values() if w.node == node.id and w.alive]
        drained = node.state == "draining" and not any(self.is_member(w) for w in lost)
        node.state = "left"
        self.draining.pop(node.id, None)
        self.emit(Persist("node-left", f"node {node.id} left: {reason}", {"node": node.id}))
        if drained or self.outcome or self.finishing:
            for worker in lost:
                worker.state = "left"
        else:
            self._workers_lost(lost, "node left", f"node {node.id}", reason, "goodbye", now)
        self._check_outcome(now)

    # -- workers ---------------------------------------------------------------------------------------------------

    def _worker_exited(self, exited: WorkerExited, now: float) -> None:
        worker = self.workers.get(exited.worker)
        if worker is None or not worker.alive:
            return
        node = self.nodes[worker.node]
        if exited.code == 0 and (self.finishing or worker.leaving is not None or worker.spec is None):
            worker.state = "finished"
            self.emit(Persist("worker-finished", f"worker {worker.id} finished", {"worker": worker.id}))
            self._check_finished(now)
            return
        if exited.code == 0 and node.state == "draining" and not self.is_member(worker):
            worker.state = "left"
            return
        if exited.code == 0 and not exited.blameless:
            exited = replace(exited, reason="the script ended before its training loop did")
        failure = worker.failure
        reason = f"{failure.error} (step {failure.step}, slot {failure.slot})" if failure is not None else exited.reason
        if not exited.blameless:
            node.restarts[worker.local_rank] = node.restarts.get(worker.local_rank, 0) + 1
            if failure is not None and self._seen_before(worker, failure):
                worker.state = "dead"
                self._end("failed", self._twice(failure), now, failure)
                return
        kind = "exception" if failure is not None else "worker lost"
        self._workers_lost(
            [worker], kind, f"worker {worker.id}", reason, exited.detected_by, now, silent_s=exited.silent_s
        )
        self._fill(node)
        if node.restarts.get(worker.local_rank, 0) > self.settings.max_restarts:
            self.emit(
                Persist(
                    "worker-given-up",
                    f"local rank {worker.local_rank} of node {node.id} failed more than --max-restarts "
                    f"{self.settings.max_restarts} times and is not restarted",
                    {"node": node.id, "local_rank": worker.local_rank},
                )
            )
        self._check_outcome(now)

    def _seen_before(self, worker: Worker, failure: Failed) -> bool:
        """Whether another worker failed at the same place with the same error: then it is the data or the code."""
        return any(
            other.id != worker.id
            and other.failure is not None
            and (other.failure.step, other.failure.slot) == (failure.step, failure.slot)
            and other.failure.error == failure.error
            for other in self.workers.values()
        )

    @staticmethod
    def _twice(failure: Failed) -> str:
        where = f"step {failure.step}, slot {failure.slot}" if failure.slot >= 0 else "the same place before training"
        ids = f"; sample ids {list(failure.sample_ids)}" if failure.sample_ids else ""
        return f"two workers raised the same exception at {where}, so it is the data or the code: {failure.error}{ids}"

    def _workers_lost(
        self,
        lost: Iterable[Worker],
        kind: str,
        subject: str,
        reason: str,
        detected_by: str,
        now: float,
        *,
        state: str = "dead",
        silent_s: float = 0.0,
    ) -> None:
        lost = [worker for worker in lost if worker.alive]
        involved = [worker for worker in lost if self.is_member(worker)]
        for worker in lost:
            worker.state = state
        if self.outcome:
            return
        if self.recovering_until is not None:
            self._finish_recovering(now)
            return
        if lost:
            self.emit(
                Persist(
                    "workers-lost",
                    f"{subject}: {reason}",
                    {"workers": [w.id for w in lost], "detected_by": detected_by},
                )
            )
        if not involved:
            attempt = self.attempt
            if attempt is not None and any(w.id in attempt.participants for w in lost):
                self._abandon(f"{subject}: {reason}")  # which it does with an uncommitted switch only
            return
        if self.finishing or self._check_finished(now):
            return
        self.open_incident(kind, subject, detected_by, reason, now, silent_s)
        self._fence(f"{subject}: {reason}", now, loss=True)

    def _note_status(self, status: WorkerStatus, now: float) -> None:
        worker = self.workers.get(status.worker)
        if worker is None or not worker.alive:
            return
        worker.pid, worker.status = status.pid or worker.pid, replace(status, messages=())
        if worker.state == "member":
            self.note_step(status.committed, now)
            if status.committed >= self.step_committed:
                self.samples = max(self.samples, status.samples)
                self.loss = status.loss

    # -- what workers say ------------------------------------------------------------------------------------------

    def _worker_said(self, worker: Worker, message: WorkerMessage, now: float) -> None:
        if self.outcome:
            return
        match message:
            case Registered(spec):
                self._registered(worker, spec, now)
            case Warm():
                if worker.state == "warming":
                    worker.state = "warm"
                    self._consider_switch(now)
            case Prepared(generation):
                attempt = self.attempt
                if attempt is not None and generation == attempt.plan.generation and not attempt.committed:
                    attempt.prepared[worker.id] = message
                    self._commit_if_prepared(now)
            case PrepareFailed(generation, reason):
                self._prepare_failed(worker, generation, reason, now)
            case Switched(generation, _):
                self._switched(worker, generation, now)
            case Resumed(generation, committed):
                worker.holds_state = True
                self.note_step(committed, now)
                if self.plan is not None and generation == self.plan.generation:
                    self.fruitless = 0
                    self.close_incidents(now)
            case CollectiveFailed(generation, step, reason):
                if generation in self._worlds_in_use():
                    self._suspect(generation, f"worker {worker.id}: a collective of step {step} broke ({reason})", now)
            case Leaving():
                worker.leaving, worker.holds_state = message, True
                self.note_step(message.committed, now)
                self.samples = max(self.samples, message.samples)
                if self.attempt is not None and self.attempt.may_be_abandoned:
                    self._abandon("the training loop has ended")
                self._check_finished(now)
            case Failed():
                worker.failure = message

    def _worlds_in_use(self) -> tuple[int, ...]:
        """Generations in which workers may be training: a broken collective of another one says nothing new."""
        attempt = self.attempt
        if attempt is None or attempt.may_be_abandoned:
            return (self.plan.generation,) if self.plan is not None else ()
        if not attempt.committed:
            return ()
        if attempt.plan.kind is PlanKind.SWITCH:
            return (attempt.replaces, attempt.plan.generation)
        return (attempt.plan.generation,)

    def _registered(self, worker: Worker, spec: TrainingSpec, now: float) -> None:
        worker.spec = spec
        base = self.requested
        if base is None:
            others = [w for w in self.workers.values() if w.alive and w.spec is not None and w is not worker]
            base = others[0].spec if others else None
        founding = self.plan is None and self.attempt is None
        if base is not None and (difference := spec.difference(base, with_state=founding)):
            sentence = f"worker {worker.id} cannot train with the others: {difference}"
            if founding:
                self._end("failed", sentence, now)
            else:
                self._refuse_worker(worker, sentence)
            return
        if founding:
            worker.state = "registered"
            self._found_if_complete(now)
        else:
            self._admit(worker)
            self._consider_switch(now)

    def _refuse_worker(self, worker: Worker, sentence: str) -> None:
        worker.state = "dead"
        self.nodes[worker.node].restarts[worker.local_rank] = self.settings.max_restarts + 1
        self.emit(Persist("worker-refused", sentence, {"worker": worker.id}))
        self.kill(worker, sentence)

    def _admit(self, worker: Worker) -> None:
        assert self.spec is not None
        worker.state = "warming"
        self.tell(
            worker,
            Admitted(
                self.spec.slots,
                self.spec.virtual_replicas,
                self.spec.reduction,
                self.spec.seed,
                self.step_committed,
                joins_running_world=True,
            ),
        )

    # -- the first world -------------------------------------------------------------------------------------------

    def _found_if_complete(self, now: float) -> None:
        """Found the first world once everybody who is expected has registered."""
        if self.plan is not None or self.attempt is not None or self.outcome or self.recovering_until is not None:
            return
        nodes = [n for n in self.nodes.values() if n.state == "attached"]
        here = {n.id for n in nodes}
        # Those who came while an earlier attempt was on its way count too, although they were told to join it.
        ready = [w for w in self.workers.values() if w.state in ("registered", "warming", "warm") and w.node in here]
        places = sum(n.nproc for n in nodes)
        if len(nodes) < self.settings.nodes_min or not ready or len(ready) < places:
            self.enough_since = None
            return
        if self.enough_since is None:
            self.enough_since = now
        if len(nodes) < self.settings.nodes_max and now - self.enough_since < self.settings.join_timeout_s:
            return
        self._found(ready, now)

    def _found(self, ready: list[Worker], now: float) -> None:
        spec = self.requested or ready[0].spec
        assert spec is not None
        for worker in ready:
            if worker.spec is not None and (difference := worker.spec.difference(spec, with_state=True)):
                self._end("failed", f"worker {worker.id} cannot train with the others: {difference}", now)
                return
        if self.spec is None and not self._fix_job(spec, len(ready), now):
            return
        assert self.spec is not None
        fixed = self.spec
        order = sorted(ready, key=lambda w: (natural(w.node), w.local_rank))
        for worker in order[fixed.slots :]:
            self._admit(worker)  # more have come since the numbers were fixed
        order = order[: fixed.slots]
        for worker in order:
            # Whoever was told to join has not kept its initial weights, and is given the state by the others.
            worker.holds_state = worker.state == "registered"
            worker.state = "member"
            if worker.holds_state:
                self.tell(worker, Admitted(fixed.slots, fixed.virtual_replicas, fixed.reduction, fixed.seed, 0))
        self._open(PlanKind.FOUND, [w.id for w in order], f"first world of {len(order)} worker(s)", now)

    def _fix_job(self, spec: TrainingSpec, workers: int, now: float) -> bool:
        """Fix slots and virtual replicas for the job's whole life; ends the job where they make no sense."""
        slots = spec.slots or workers
        replicas = spec.virtual_replicas or min(workers, slots)
        problem = ""
        if slots < workers:
            problem = f"slots={slots} cannot feed {workers} workers: give at least as many slots as workers"
        elif replicas > slots:
            problem = f"virtual_replicas={replicas} exceeds slots={slots}: give at most as many as slots"
        elif slots * spec.batch_size > spec.dataset_size:
            problem = (
                f"the dataset holds {spec.dataset_size} samples, fewer than one global batch of {slots} slots x "
                f"{spec.batch_size}: use a smaller batch_size or fewer slots"
            )
        if problem:
            self._end("failed", problem, now)
            return False
        self.requested, self.spec = spec, replace(spec, slots=slots, virtual_replicas=replicas)
        self.emit(
            Persist(
                "job-fixed",
                f"{slots} slots of {spec.batch_size} samples, {replicas} virtual replicas, {spec.reduction} reduction",
                {"spec": self.spec, "requested": self.requested},
            )
        )
        return True

    # -- generations -----------------------------------------------------------------------------------------------

    def _open(
        self, kind: PlanKind, members: list[str], reason: str, now: float, *, leavers: Iterable[Member] = ()
    ) -> None:
        assert self.spec is not None
        before = self.attempt.plan if self.attempt is not None and self.membership_from_attempt() else self.plan
        self.newest_generation += 1
        plan = make_plan(
            generation=self.newest_generation,
            kind=kind,
            members=[self._candidate(worker_id) for worker_id in members],
            slots=self.spec.slots,
            virtual_replicas=self.spec.virtual_replicas,
            prepare_timeout_ms=int(self.settings.failure_timeout_s * 1000),
            reason=reason,
            before=before if kind is PlanKind.FENCE else None,
        )
        self.attempt = Attempt(
            plan,
            now + self.settings.prepare_timeout_s,
            leavers=tuple(leavers),
            replaces=self.plan.generation if self.plan is not None else 0,
        )
        self.emit(
            Persist(
                "generation-opened",
                f"generation {plan.generation} ({kind.name.lower()}) with {plan.world_size} worker(s): {reason}",
                {"plan": plan, "leavers": [member.worker for member in self.attempt.leavers]},
            )
        )
        for worker_id in sorted(self.attempt.participants):
            self.tell(self.workers[worker_id], Prepare(plan))

    def _candidate(self, worker_id: str) -> Candidate:
        worker = self.workers[worker_id]
        node = self.nodes[worker.node]
        return Candidate(worker.id, node.id, worker.local_rank, node.worker_address, node.peer_address)

    def _fence(self, reason: str, now: float, *, loss: bool, joining: Iterable[str] = ()) -> None:
        """Open a generation of the survivors, and of `joining`; everybody seals at once."""
        if self.outcome or self.finishing:
            return
        self.suspicion = None
        self.fruitless = 0 if loss else self.fruitless + 1
        if self.fruitless > FRUITLESS_LIMIT:
            self._end("failed", f"{FRUITLESS_LIMIT} generations in a row failed with nobody lost; last: {reason}", now)
            return
        survivors = [w for w in self.membership() if self.workers[w].alive]
        self._abandon(reason)
        if self.plan is None:
            self._unfound(survivors, now)
            return
        members = self._seats(survivors)
        if not members:
            self._state_lost(reason, now)
            return
        self._open(PlanKind.FENCE, [*members, *joining], reason, now)

    def _seats(self, survivors: list[str]) -> list[str]:
        """Return who of the survivors is in the next world, in order of rank; the others are ended.

        Whoever holds the state comes first: with leavers of an unfinished switch there may be more workers than slots, and a
        worker whose loop has ended gives the state to nobody.
        """
        assert self.spec is not None
        holders = [w for w in survivors if self.workers[w].holds_state]
        others = [w for w in survivors if w not in holders]
        if any(self.workers[w].leaving for w in holders):
            others = []
        seated = [*holders, *others][: self.spec.slots]
        members = [w for w in survivors if w in seated]
        for worker_id in survivors:
            if worker_id not in members:
                self.kill(self.workers[worker_id], "the world goes on without it")
                self.workers[worker_id].state = "dead"
        return members

    def _unfound(self, survivors: list[str], now: float) -> None:
        """A member was lost before the first world stood: nothing was trained, so found it anew when all are back."""
        self.attempt = None
        for worker_id in survivors:
            self.workers[worker_id].state = "registered"
        self.enough_since = None
        self._found_if_complete(now)

    def _state_lost(self, reason: str, now: float) -> None:
        """Nobody who holds the state can be reached. Wait for nodes that may come back with it, else give it up."""
        self.attempt, self.suspicion = None, None
        if self.recovering_until is None and any(w.state == "lost" for w in self.known(self.last_members())):
            self.recovering_until = now + self.settings.start_timeout_s
            self.emit(
                Persist("job-waits", f"no worker that holds the state can be reached ({reason}): waiting for its node", {})
            )
            return
        last = self.last_failure()
        if self.step_committed == 0:
            self.plan, self.leavers, self.founding_since = None, (), now
            self.emit(Persist("job-unfounded", f"nothing was trained yet, so the first world forms anew: {reason}", {}))
            for worker in self.workers.values():
                if worker.alive and worker.spec is not None:
                    self.kill(worker, "the first world forms anew")
            return
        self._end(
            "failed",
            f"every copy of the training state was lost after step {self.step_committed} ({reason}); "
            "no checkpoint exists, so the job must be started again from step 0",
            now,
            last,
        )

    def _commit_if_prepared(self, now: float) -> None:
        attempt = self.attempt
        if attempt is None or attempt.committed or not attempt.participants <= set(attempt.prepared):
            return
        plan = attempt.plan
        nodes = len({m.node for m in plan.members})
        ending = any(worker.leaving for worker in self.known(plan.members))
        if nodes < self.settings.nodes_min and plan.kind is PlanKind.FENCE and not ending:
            attempt.waits_for_nodes, attempt.deadline = True, now + self.settings.start_timeout_s
            self.emit(
                Persist(
                    "job-waits",
                    f"waiting for nodes: {nodes} left, --nnodes asks for at least {self.settings.nodes_min}",
                    {},
                )
            )
            self._consider_switch(now)
            return
        reports = {w: attempt.prepared[w] for w in (m.worker for m in plan.members)}
        holders = [report for report in reports.values() if report.has_state]
        if not holders:
            self._state_lost("no survivor holds the state", now)
            return
        restore = max(report.committed for report in holders)
        if restore < self.step_committed <= min(report.voted for report in holders):
            restore = self.step_committed  # whoever committed it is lost, but all the others can
        if plan.kind is PlanKind.SWITCH and self.plan is not None:
            given = plan.workers() - self.plan.workers()  # all others have it by the step that decides the switch
        else:
            given = frozenset(w for w, r in reports.items() if not (r.has_state and restore in (r.committed, r.voted)))
        joiners = tuple(m.rank for m in plan.members if m.worker in given)
        attempt.committed = True
        attempt.deadline = float("inf")
        self.plan, self.leavers, self.joiners = plan, attempt.leavers, given
        for member in plan.members:
            self.workers[member.worker].state = "member"
            self.workers[member.worker].holds_state = reports[member.worker].has_state and member.worker not in given
        redone = 1 if any(report.voted <= restore and plan.kind is PlanKind.FENCE for report in holders) else 0
        if plan.kind is not PlanKind.SWITCH:
            self.note_step(restore, now)
            self.incidents.regrouped(plan.generation, restore, redone)
        self.emit(
            Persist(
                "generation-committed",
                f"generation {plan.generation} committed"
                + (f", continuing after step {restore}" if plan.kind is PlanKind.FENCE else "")
                + (f", {len(joiners)} joiner(s) receive the state" if joiners else ""),
                {"generation": plan.generation, "restore_step": restore, "joiner_ranks": list(joiners)},
            )
        )
        command = Commit(plan.generation, restore, joiners)
        for worker_id in sorted(attempt.participants):
            self.tell(self.workers[worker_id], command)

    def _switched(self, worker: Worker, generation: int, now: float) -> None:
        attempt = self.attempt
        if attempt is None or not attempt.committed or attempt.plan.generation != generation:
            return
        attempt.switched.add(worker.id)
        if not attempt.plan.workers() <= attempt.switched:
            return
        # All who stay are past the step that decided the switch, so nothing is needed from those who leave.
        self.attempt, self.leavers = None, ()
        if self.suspicion is not None and self.suspicion.generation < generation:
            self.suspicion = None  # nobody needs the world that broke any more
        if attempt.plan.kind is PlanKind.SWITCH:
            self.emit(
                Persist(
                    "generation-adopted",
                    f"generation {generation} is adopted by all",
                    {"generation": generation},
                )
            )
        for member in attempt.leavers:
            self.tell(self.workers[member.worker], Finish("drained"))
            self.workers[member.worker].state = "left"
        self._consider_switch(now)

    def _prepare_failed(self, worker: Worker, generation: int, reason: str, now: float) -> None:
        attempt = self.attempt
        if attempt is None or attempt.committed or attempt.plan.generation != generation:
            return
        if attempt.plan.kind is PlanKind.SWITCH:
            self._abandon(f"worker {worker.id} could not build its group: {reason}")
            self._retry_switch_later()
        else:
            self._suspect(
                generation, f"worker {worker.id} could not build the group of generation {generation}: {reason}", now
            )

    def _suspect(self, generation: int, reason: str, now: float) -> None:
        if self.suspicion is None or generation > self.suspicion.generation:
            self.suspicion = Suspicion(generation, reason, now)

    def _abandon(self, reason: str) -> None:
        attempt = self.attempt
        if attempt is None or not attempt.may_be_abandoned:
            return
        self.attempt = None
        generation = attempt.plan.generation
        self.emit(
            Persist("generation-abandoned", f"generation {generation} abandoned: {reason}", {"generation": generation})
        )
        for worker_id in sorted(attempt.participants):
            if self.workers[worker_id].alive:
                self.tell(self.workers[worker_id], Abandon(generation))

    def _retry_switch_later(self) -> None:
        for worker in self.workers.values():
            if worker.state == "warm":
                worker.switch_failures += 1
                if worker.switch_failures > SWITCH_RETRIES:
                    self.kill(worker, "it could not be taken in")

    def _consider_switch(self, now: float) -> None:
        """Take warm workers in and let leavers go, if nothing else is on its way."""
        if self.plan is None or self.spec is None or self.outcome or self.finishing or self.recovering_until is not None:
            return
        if self.suspicion is not None or any(w.leaving for w in self.workers.values() if w.alive):
            return
        if self.attempt is not None:
            if self.attempt.waits_for_nodes:
                self._reinforce(self.attempt, now)
            return
        members = self.plan.members
        leaving = [m for m in members if self.nodes[m.node].state == "draining"]
        joining = self._joiners(len(members) - len(leaving))
        staying = [m for m in members if m not in leaving]
        nodes = {m.node for m in staying} | {self.workers[w].node for w in joining}
        holders = [w for w in self.known(staying) if w.holds_state]
        if leaving and (not holders or len(nodes) < self.settings.nodes_min):
            # They go once others hold the state, and enough others are there.
            staying, leaving = list(members), []
            joining = self._joiners(len(members))
        if not joining and not leaving:
            return
        words = [f"{', '.join(joining)} joins"] if joining else []
        words += [f"{', '.join(m.worker for m in leaving)} leaves"] if leaving else []
        self._open(
            PlanKind.SWITCH, [*(m.worker for m in staying), *joining], "; ".join(words), now, leavers=leaving
        )

    def _joiners(self, seats_taken: int, *, warm_only: bool = False) -> list[str]:
        """Return who may be taken in, as many as there are slots for.

        A switch may be prepared while a joiner warms up, since it costs the members nothing; one that was too slow for
        that is waited for first.
        """
        assert self.spec is not None
        ready = [
            w
            for w in self.workers.values()
            if (w.state == "warm" or (w.state == "warming" and not (warm_only or w.warms_slowly)))
            and self.nodes[w.node].state == "attached"
            and not self.is_member(w)
        ]
        ready.sort(key=lambda w: (w.state != "warm", w.switch_failures, natural(w.node), w.local_rank))
        return [w.id for w in ready][: max(0, self.spec.slots - seats_taken)]

    def _reinforce(self, attempt: Attempt, now: float) -> None:
        """Too few nodes are left to go on: take new ones in at once, since no step is running that could decide it."""
        joining = self._joiners(attempt.plan.world_size, warm_only=True)
        nodes = {m.node for m in attempt.plan.members} | {self.workers[w].node for w in joining}
        if len(nodes) >= self.settings.nodes_min:
            self._fence(f"{', '.join(joining)} joins", now, loss=True, joining=joining)

    # -- people ----------------------------------------------------------------------------------------------------

    def drain_refusal(self, node_id: str) -> str:
        """Return why a node cannot be drained now, or ""."""
        node = self.nodes.get(node_id)
        if node is None or node.state in ("lost", "left"):
            known = ", ".join(sorted(n.id for n in self.nodes.values() if n.state == "attached")) or "none"
            return f"no node {node_id!r} is attached (attached: {known})"
        if not any(n.state == "attached" and n.id != node_id for n in self.nodes.values()):
            return f"node {node_id} is the last one: use `elastic stop` to end the job"
        return ""

    def _drain(self, node_id: str, now: float) -> None:
        if self.drain_refusal(node_id) or self.outcome:
            return
        node = self.nodes[node_id]
        node.state = "draining"
        self.draining[node_id] = node.incarnation
        self.emit(
            Persist(
                "node-draining",
                f"node {node_id} is asked to leave",
                {"node": node_id, "incarnation": node.incarnation},
            )
        )
        self._consider_switch(now)

    def _let_drained_go(self, now: float) -> None:
        """On nodes that were asked to leave, end who is in no world, and the agent once nobody is left."""
        for node in self.nodes.values():
            if node.state != "draining" or node.shut_down:
                continue
            idle = [w for w in self.workers.values() if w.node == node.id and w.alive and not self.is_member(w)]
            for worker in idle:
                self.kill(worker, "its node is drained")
            self._workers_lost(idle, "drain", f"node {node.id}", "drained", "a person", now, state="left")
            if not any(w.alive and w.node == node.id for w in self.workers.values()):
                node.shut_down = True
                self.emit(ToAgent(node.incarnation, Shutdown("drained", 0)))

    # -- the end ---------------------------------------------------------------------------------------------------

    def _check_finished(self, now: float) -> bool:
        """Whether the job is ending well; starts or completes that end."""
        if self.outcome:
            return True
        if self.recovering_until is not None:
            return self.finishing
        members = [self.workers[w] for w in self.membership()]
        # A joiner that was never given the state has nothing to end; the others need not wait for it.
        holders = [w for w in members if w.alive and w.holds_state]
        if not self.finishing and holders and all(w.leaving is not None for w in holders):
            self._begin_finish(holders, now)
        if not members and not self.finishing:
            ran = [w for w in self.workers.values() if w.state == "finished"]
            expected = sum(n.nproc for n in self.nodes.values() if n.state == "attached")
            if not ran or len(ran) < expected or any(w.alive for w in self.workers.values()):
                return False
            self._end("succeeded", "every worker's script ended", now)
            return True
        if self.finishing and not any(w.alive for w in self.workers.values()):
            self._end("succeeded", f"finished after step {self.step_committed}", now)
        return self.finishing

    def _begin_finish(self, members: list[Worker], now: float) -> None:
        digests = {w.leaving.digest for w in members if w.leaving is not None}
        if len(digests) > 1:
            self._end("failed", "the replicas' final parameters differ: " + ", ".join(sorted(digests)), now)
            return
        self.close_incidents(now)
        self.finishing, self.digest, self.attempt = True, digests.pop(), None
        self.emit(
            Persist(
                "loop-ended",
                f"all workers left the loop after step {self.step_committed}",
                {"digest": self.digest, "step": self.step_committed, "samples": self.samples},
            )
        )
        self._let_finish()

    def _let_finish(self) -> None:
        """The loop is over everywhere: scripts run to their end, whatever else there is goes."""
        for worker in self.workers.values():
            if not worker.alive:
                continue
            if worker.leaving is not None:
                self.tell(worker, Finish("the job is done"))
            else:
                self.kill(worker, "the job is done")
                worker.state = "left"

    def _check_outcome(self, now: float) -> None:
        """End the job when nothing is left that could go on."""
        if self._check_finished(now) or self.recovering_until is not None:
            return
        if any(w.alive for w in self.workers.values()):
            return
        hopeful = [
            n
            for n in self.nodes.values()
            if n.state == "attached"
            and any(n.restarts.get(r, 0) <= self.settings.max_restarts for r in range(n.nproc))
        ]
        if not hopeful and any(n.state == "attached" for n in self.nodes.values()):
            failure = self.last_failure()
            detail = f": {failure.error}" if failure is not None else ""
            self._end(
                "failed", f"every worker failed more than --max-restarts {self.settings.max_restarts} times{detail}", now, failure
            )

    def _end(self, outcome: str, reason: str, now: float, failure: Failed | None = None) -> None:
        if self.outcome:
            return
        self.outcome, self.reason, self.ended_at = outcome, reason, now
        data: dict[str, Any] = {
            "outcome": outcome,
            "reason": reason,
            "digest": self.digest,
            "step": self.step_committed,
            "samples": self.samples,
        }
        if failure is not None:
            data["traceback"] = failure.traceback
            data["sample_ids"] = list(failure.sample_ids)
        self.emit(Persist("job-ended", f"{outcome}: {reason}", data))
        for node in self.nodes.values():
            if node.state in ("attached", "draining"):
                self.emit(ToAgent(node.incarnation, Shutdown(reason, 0 if outcome == "succeeded" else 1)))
        self.emit(EndJob(outcome, reason))

    # -- time ------------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        timeout = self.settings.failure_timeout_s
        if self.last_tick is not None and now - self.last_tick > timeout / 2:
            # The controller itself stood still: silence in that time is nobody else's fault.
            for node in self.nodes.values():
                node.heard_at = min(now, node.heard_at + now - self.last_tick)
        self.last_tick = now
        if self.outcome:
            return
        for node in list(self.nodes.values()):
            if node.attached and now - node.heard_at > timeout:
                self._node_lost(node, f"silent for {now - node.heard_at:.1f} s", "lease", now)
        if self.recovering_until is not None:
            self._finish_recovering(now)
            return
        if self._check_finished(now):
            return
        attempt = self.attempt
        if attempt is not None and not attempt.committed and now > attempt.deadline:
            self._attempt_expired(attempt, now)
        elif self.suspicion is not None and now - self.suspicion.since > GRACE_S:
            self.open_incident("collective broken", "the world", "worker report", self.suspicion.reason, now)
            self._fence(self.suspicion.reason, now, loss=False)
        self._found_if_complete(now)
        since = self.founding_since if self.founding_since is not None else now
        if self.plan is None and self.attempt is None and now - since > self.settings.start_timeout_s:
            self._start_timed_out(now)
        self._consider_switch(now)
        self._let_drained_go(now)

    def _attempt_expired(self, attempt: Attempt, now: float) -> None:
        missing = sorted(attempt.participants - set(attempt.prepared))
        if attempt.plan.kind is PlanKind.SWITCH:
            self._abandon(f"not prepared in time: {', '.join(missing)}")
            for worker_id in missing:
                worker = self.workers[worker_id]
                worker.warms_slowly |= worker.state == "warming"
                if worker.state == "warm":
                    self.kill(worker, "it was not prepared in time")
            return
        if not missing:
            self._end("failed", f"fewer nodes than --nnodes MIN ({self.settings.nodes_min}) for too long", now)
            return
        if not attempt.prepared:
            self._fence(f"nobody was prepared for generation {attempt.plan.generation} in time", now, loss=False)
            return
        silent = [self.workers[w] for w in missing]
        for worker in silent:
            self.kill(worker, "it was not prepared in time")
        self._workers_lost(
            silent, "not prepared", ", ".join(f"worker {w}" for w in missing), "not prepared in time", "deadline", now
        )
        for node in list(self.nodes.values()):
            self._fill(node)

    def _start_timed_out(self, now: float) -> None:
        here = [n.id for n in self.nodes.values() if n.state == "attached"]
        waiting = [w.id for w in self.workers.values() if w.alive and w.state == "starting"]
        self._end(
            "failed",
            f"no first world within --start-timeout {self.settings.start_timeout_s:.0f} s: {len(here)} of "
            f"{self.settings.nodes_min} nodes attached"
            + (f", not registered: {', '.join(waiting)}" if waiting else "")
            + "; start the missing agents, or check that the script calls session.prepare()",
            now,
        )

    # -- recovery of the controller itself -------------------------------------------------------------------------

    def restore(self, records: Iterable[tuple[str, Mapping[str, Any]]], now: float) -> None:
        """Rebuild the state from the ledger; the machine then waits for agents before it acts.

        `records` are (kind, data) in order; data holds the values that Persist was given.
        """
        opened: dict[int, tuple[Plan, tuple[Member, ...]]] = {}
        for kind, data in records:
            match kind:
                case "job-fixed":
                    self.spec, self.requested = data["spec"], data["requested"]
                case "worker-started":
                    key = (data["node"], data["local_rank"])
                    self.serials[key] = max(self.serials.get(key, 0), data["serial"])
                case "generation-opened":
                    plan: Plan = data["plan"]
                    before = self.plan.members if self.plan is not None else ()
                    opened[plan.generation] = plan, tuple(m for m in before if m.worker in data["leavers"])
                    self.newest_generation = max(self.newest_generation, plan.generation)
                case "generation-committed":
                    self.plan, self.leavers = opened[data["generation"]]
                    self.joiners = frozenset(self.plan.members[rank].worker for rank in data["joiner_ranks"])
                    self.step_committed = max(self.step_committed, data["restore_step"])
                case "generation-adopted":
                    self.leavers = ()
                case "training-began":
                    self.step_committed = max(self.step_committed, data["step"])
                case "job-unfounded":
                    self.plan, self.leavers = None, ()
                case "node-draining":
                    self.draining[data["node"]] = data["incarnation"]
                case "node-left":
                    self.draining.pop(data["node"], None)
                case "incident":
                    self.incidents.restore(data["incident"])
                case "loop-ended":
                    self.finishing, self.digest = True, data["digest"]
                    self.step_committed, self.samples = data["step"], data["samples"]
                case "job-ended":
                    self.outcome, self.reason = data["outcome"], data["reason"]
        self.started_at = self.founding_since = now
        self.restarted = True
        patience_s = self.settings.failure_timeout_s if self.finishing else self.settings.start_timeout_s
        self.recovering_until = now + patience_s

    def _replay(self, status: WorkerStatus, now: float) -> None:
        """Take up what a worker said while there was no controller; nothing is decided yet."""
        worker = self.workers.get(status.worker)
        if worker is None:
            return
        member = any(m.worker == worker.id for m in self.last_members())
        if member:
            worker.state = "member"
            worker.holds_state = status.committed > 0 or worker.id not in self.joiners
        for message in status.messages:
            match message:
                case Registered(spec):
                    worker.spec = spec
                    if not member:
                        worker.state = "registered"
                case Warm():
                    if not member:
                        worker.state = "warm"
                case CollectiveFailed(generation):
                    if self.plan is not None and generation == self.plan.generation:
                        self._suspect(generation, f"worker {worker.id}: {message.reason}", now)
                case Leaving():
                    worker.leaving = message
                    self.note_step(message.committed, now)
                    self.samples = max(self.samples, message.samples)
                case Failed():
                    worker.failure = message
                case _:
                    pass
        self.note_step(status.committed, now)

    def _finish_recovering(self, now: float) -> None:
        """Act again once every member's node has spoken, or its time is up."""
        assert self.recovering_until is not None
        members = self.last_members()
        here = {node.id for node in self.nodes.values() if node.attached}
        until = self.recovering_until
        if any(worker.alive and worker.holds_state for worker in self.known(members)):
            # With one of them here, the others have as long as a lease.
            self.returned_at = now if self.returned_at is None else self.returned_at
            until = min(until, self.returned_at + self.settings.failure_timeout_s)
        else:
            self.returned_at = None
        if now < until and (not here or any(m.node not in here for m in members)):
            return
        for member in members:
            worker = self.workers.setdefault(
                member.worker, Worker(member.worker, member.node, member.local_rank, state="dead")
            )
            if not worker.alive:
                # One whose node is away may yet be taken back, should all others be lost before the next commit.
                worker.state = "lost" if member.node not in here and now < self.recovering_until else "dead"
        why = "the controller restarted" if self.restarted else "nodes that hold the state came back"
        if self.restarted:
            self.emit(
                Persist("controller-restarted", f"controller restarted at generation {self.newest_generation}", {})
            )
        self.restarted = False
        self.recovering_until = None
        if self.finishing:
            self._let_finish()
        if self._check_finished(now):
            return
        self._regroup_recovered(why, now)
        for worker in self.workers.values():
            if worker.state == "registered" and self.plan is not None:
                self._admit(worker)
        for node in list(self.nodes.values()):
            self._fill(node)
        self._check_outcome(now)
        self._found_if_complete(now)
        self._consider_switch(now)

    def _regroup_recovered(self, why: str, now: float) -> None:
        plan, members = self.plan, self.known(self.last_members())
        if plan is None:
            return
        gone = [w.id for w in members if not w.alive]
        if len(gone) == len(members):
            self._state_lost("no member of the last world is left", now)
        elif (
            gone
            or self.newest_generation != plan.generation
            or self.leavers
            or any(w.status.generation != plan.generation for w in members)
        ):
            reason = why + (f"; lost meanwhile: {', '.join(gone)}" if gone else "")
            if not self.incidents.has_open:
                self.open_incident("controller restarted", "controller", "ledger", reason, now)
            self._fence(reason, now, loss=True)
