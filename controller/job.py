"""The state of one job, and the hands by which its parts act: everything that a decision depends on lives here.

A `Job` is handed from part to part. They read and change its fields, and put what must happen into `effects`. It answers
questions about itself (who belongs to the world, who is known), notes progress and costs, and decides nothing. What is
not one of its fields must not influence any decision. Pure: no clock, I/O, randomness or logging; `now` is an argument, in
seconds of any monotonic clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field

from controller.events import ControllerEffect, Persist, ToAgent
from controller.incidents import IncidentBook, describe
from controller.state import (
    Attempt,
    Inquiry,
    JobSettings,
    Node,
    Probing,
    Restoring,
    Saving,
    Standstill,
    Suspicion,
    Worker,
)
from elastic.domain import (
    NO_STEP,
    Failed,
    Incident,
    KillWorker,
    Member,
    Plan,
    Rebuilt,
    ToWorker,
    TrainingSpec,
    WorkerCommand,
)
from elastic.snapshots import SnapshotId
from monitoring.accounts import Accounts
from monitoring.steps import StepClock
from monitoring.stragglers import ComputeClock, Rental
from recovery.pipelines import Layout, NoLayout, Ways

WORLDS_KEPT = 64


@dataclass(slots=True, eq=False)
class Job:
    """State of one job; see the module's docstring."""

    settings: JobSettings
    _: KW_ONLY
    unix_offset_s: float = 0.0  # unix time minus the clock of `now`: for display only
    effects: list[ControllerEffect] = field(default_factory=list)  # of the event in hand, in order

    # Who is here.
    nodes: dict[str, Node] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    serials: dict[tuple[str, int], int] = field(default_factory=dict)  # (node, local rank) -> its newest worker's number
    draining: dict[str, str] = field(default_factory=dict)  # node -> incarnation of the agent that was asked to leave

    # What is trained.
    spec: TrainingSpec | None = None  # as fixed at the founding: slots and replicas filled in
    requested: TrainingSpec | None = None  # as the founders said it

    # In which world.
    plan: Plan | None = None  # of the newest committed generation
    leavers: tuple[Member, ...] = ()  # who leaves with it, until all others have adopted it
    joiners: frozenset[str] = frozenset()  # who was without the state when it was committed
    attempt: Attempt | None = None
    newest_generation: int = 0
    suspicion: Suspicion | None = None
    standstill: Standstill | None = None
    probing: Probing | None = None
    inquiry: Inquiry | None = None
    inquiries: int = 0  # so far
    probed_cut_at: float = float("-inf")  # when nodes that were left out for a dead link were last probed
    worlds: dict[int, Plan] = field(default_factory=dict)  # newest committed ones; snapshots of them may be needed
    computing: dict[str, ComputeClock] = field(default_factory=dict)  # worker -> what its steps take it
    speeds: dict[str, float] = field(default_factory=dict)  # of workers that are not as fast as the others
    rental: Rental = field(default_factory=Rental)  # since when layers lie where they cost more than they need
    unsettled: int = 0  # generation of the newest switch whose layers may be on their way; 0 once it has committed a step
    layouts: dict[tuple[int, tuple[tuple[int, float], ...]], Layout | NoLayout] = field(default_factory=dict)  # planned ahead
    rebuilt: tuple[Rebuilt, ...] = ()  # layers that were made from others, and when
    ways: tuple[int, Ways] = (0, Ways())  # of a pipeline's slots, chosen for so many workers; 0: not chosen yet
    approximations: list[str] = field(default_factory=list)  # how, in words ...
    approximated: Counter[int] = field(default_factory=Counter)  # ... and how often in each stage
    no_layout: str = ""  # why a pipeline could not be cut for the workers that there were
    protection_gaps: tuple[str, ...] = ()  # in what the newest one's protection falls short of what was asked for
    vulnerable_since: float | None = None  # since when the present world has no stable snapshot of its own
    vulnerable_s: float = 0.0  # for how long earlier ones had none
    protected_after: int | None = None  # the step after which the present world began; None until it has
    restoring: Restoring | None = None
    searches: int = 0  # for snapshots so far
    restores: int = 0  # of snapshots or checkpoints, in a job that had trained
    failed_searches: int = 0  # in a row, since a world has trained
    refused: dict[SnapshotId, int] = field(default_factory=dict)  # how often all refused it, since then
    looked: bool = False  # for a checkpoint to begin with
    saving: Saving | None = None
    saves: int = 0  # so far
    saved_step: int = NO_STEP  # of the newest checkpoint ...
    saved_path: str = ""  # ... and where it lies
    save_fault: str = ""  # why the last one was not written
    save_again_at: float = float("-inf")
    stopping: str = ""  # why the job ends once its last checkpoint is written ...
    stopping_since: float = 0.0  # ... and since when
    fruitless: int = 0  # generations in a row that failed although nobody was lost

    # How far it is, and what it has cost.
    step_committed: int = 0
    samples: int = 0
    loss: float = float("nan")
    steps: StepClock = field(default_factory=StepClock)
    steps_here: StepClock = field(default_factory=StepClock)  # in the present world
    incidents: IncidentBook = field(default_factory=IncidentBook)
    accounts: Accounts = field(default_factory=Accounts)  # where the time went
    aside_s: dict[str, tuple[float, float]] = field(default_factory=dict)  # worker -> seconds of evaluation, of other things
    accounts_written_at: float = float("-inf")
    started_at: float | None = None
    first_commit_at: float | None = None
    last_tick: float | None = None

    # Before the first world.
    founding_since: float | None = None
    enough_since: float | None = None  # since when enough nodes for a first world are ready

    # While agents may come back with what they hold.
    recovering_until: float | None = None  # while not None, nothing is decided: agents may come back
    returned_at: float | None = None  # when the first member came back in that time
    waits_with: frozenset[str] = frozenset()  # nodes that were here when that began, and did not have enough
    restarted: bool = False  # it is the controller itself that was away

    # The end.
    finishing: bool = False  # the training loop is over everywhere
    digest: str = ""
    concludes: bool = False  # something must run once after the loop, on one worker ...
    concluder: str = ""  # ... on this one now ...
    concluded: bool = False  # ... and it has
    outcome: str = ""
    reason: str = ""
    ended_at: float | None = None

    # -- acting ----------------------------------------------------------------------------------------------------

    def emit(self, effect: ControllerEffect) -> None:
        """Let this happen, after all that was emitted before."""
        self.effects.append(effect)

    def tell(self, worker: Worker, command: WorkerCommand) -> None:
        """Give a worker a command, if its agent is here to pass it on."""
        node = self.nodes.get(worker.node)
        if node is not None and node.attached:
            self.emit(ToAgent(node.incarnation, ToWorker(worker.id, command)))

    def kill(self, worker: Worker, reason: str) -> None:
        """Have a worker ended by its agent, if that is here."""
        node = self.nodes.get(worker.node)
        if node is not None and node.attached:
            self.emit(ToAgent(node.incarnation, KillWorker(worker.id, reason)))

    # -- who is who ------------------------------------------------------------------------------------------------

    def node_of(self, incarnation: str) -> Node | None:
        """Return the node at the other end of a stream that has not been given up."""
        for node in self.nodes.values():
            if node.incarnation == incarnation and node.attached:
                return node
        return None

    def is_member(self, worker: Worker) -> bool:
        return worker.id in self.membership()

    def membership(self) -> tuple[str, ...]:
        """Workers that the newest world cannot lose unnoticed, in order of rank; leavers of an unfinished switch last."""
        attempt = self.attempt
        if attempt is not None and self.membership_from_attempt():
            return tuple(m.worker for m in (*attempt.plan.members, *attempt.leavers))
        return tuple(m.worker for m in self.last_members())

    def membership_from_attempt(self) -> bool:
        """Whether the generation on its way decides already who belongs to the job."""
        return self.attempt is not None and not self.attempt.may_be_abandoned

    def last_members(self) -> tuple[Member, ...]:
        """Who may hold the state as of the newest committed generation."""
        return (*self.plan.members, *self.leavers) if self.plan is not None else ()

    def note_world(self, plan: Plan) -> None:
        """Note a world that was committed, and forget those whose snapshots are long gone."""
        self.steps_here = StepClock()
        self.worlds[plan.generation] = plan
        for generation in sorted(self.worlds)[:-WORLDS_KEPT]:
            del self.worlds[generation]

    def known(self, members: Iterable[Member]) -> list[Worker]:
        return [self.workers[m.worker] for m in members if m.worker in self.workers]

    def last_failure(self) -> Failed | None:
        """Return the exception of the newest worker that raised one."""
        return next((w.failure for w in reversed(self.workers.values()) if w.failure is not None), None)

    @property
    def state(self) -> str:
        """One word for people."""
        if self.outcome:
            return self.outcome
        if self.finishing:
            return "ending"
        if self.recovering_until is not None:
            return "recovering"
        if self.plan is None:
            return "founding"
        if self.restoring is not None:
            return "restoring"
        if self.membership_from_attempt() or self.suspicion is not None:
            return "regrouping"
        return "running"

    # -- progress and its costs ------------------------------------------------------------------------------------

    def note_step(self, committed: int, now: float) -> None:
        """Note that a worker has committed this step."""
        if committed > self.step_committed:
            if self.step_committed == 0:
                self.emit(Persist("training-began", f"step {committed} is committed", {"step": committed}))
            self.step_committed = committed
            self.steps.note(now, committed)
            self.steps_here.note(now, committed)
            self.accounts.committed()
            if self.first_commit_at is None:
                self.first_commit_at = now

    def open_incident(
        self, kind: str, subject: str, detected_by: str, reason: str, now: float, silent_s: float = 0.0
    ) -> None:
        """Begin an incident that was found now, `silent_s` after it happened."""
        others = self.incidents.has_open
        incident = self.incidents.open(
            Incident(
                kind=kind,
                subject=subject,
                detected_by=detected_by,
                reason=reason,
                generation=self.newest_generation + 1,
                step=self.step_committed,
                at_unix_s=now - silent_s + self.unix_offset_s,
            ),
            now - silent_s,
        )
        if not others:
            self.accounts.found(silent_s)
        if self.inquiry is not None and subject in self.inquiry.subjects:
            self.inquiry.claims.append(incident)

    def close_incidents(self, now: float) -> None:
        """A step was committed again: close what is open, each with what it has cost."""
        step_s = self.steps.median_s()
        closed = self.incidents.close(now, step_s)
        if not closed:
            return
        phases = self.accounts.recovered(step_s)
        self.incidents.note_phases(phases)
        for number, incident in enumerate(closed):  # those that were open together were one recovery
            data = {"incident": incident, "phases": {str(reason): cost for reason, cost in phases.items()} if number == 0 else {}}
            self.emit(Persist("incident", describe(incident), data))
