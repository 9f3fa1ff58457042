"""The worker's side of the protocol, as a pure machine: vote, seal, commit, abort, park, join, leave.

Two threads of a worker feed it under one lock: the control thread with what the controller says, the main thread with
what it wants to do. Everything that decides who wins between them lives here, in one word:

    OPEN        the main thread computes a step and may vote
    COMMITTING  the main thread writes parameters; nothing may stop it now
    SEALED      a newer generation is on its way; the main thread may neither vote nor write until it has adopted it

Main goes OPEN -> COMMITTING only if it is OPEN, control goes OPEN -> SEALED only if it is OPEN, and the loser obeys.
What a worker reports (`Prepared`) is therefore final: after the seal nothing is voted or committed any more.

The machine performs nothing: `step` returns effects. It must never read a clock, touch a socket or see a tensor.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from elastic.domain import (
    Abandon,
    Admitted,
    CollectiveFailed,
    Commit,
    Conclude,
    Concluded,
    Failed,
    Finish,
    LayerError,
    Leaving,
    Plan,
    PlanKind,
    Prepare,
    Prepared,
    PrepareFailed,
    Registered,
    Resumed,
    Switched,
    TrainingSpec,
    Warm,
    WorkerCommand,
    WorkerMessage,
)
from elastic.snapshots import SnapshotId


class Word(enum.Enum):
    """Who may write parameters; see the module's docstring."""

    OPEN = "open"
    COMMITTING = "committing"
    SEALED = "sealed"


# Events: what happens to a worker ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heard:
    """The controller said something."""

    command: WorkerCommand


@dataclass(frozen=True, slots=True)
class GroupStands:
    """The process group of a generation is built and its first operation has succeeded."""

    generation: int


@dataclass(frozen=True, slots=True)
class GroupFell:
    """The process group of a generation could not be built."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Register:
    """Main: prepare() knows what is to be trained."""

    spec: TrainingSpec


@dataclass(frozen=True, slots=True)
class Warmed:
    """Main: the throwaway slot of a joiner is done."""


@dataclass(frozen=True, slots=True)
class AskVote:
    """Main: I hold the whole reduced gradient of `step` and want to vote."""

    step: int


@dataclass(frozen=True, slots=True)
class AskCommit:
    """Main: the verdict on `step` passed; I want to write.

    `next_generation` is the verdict's minimum, and `stop` whether it says that all leave the loop after this step.
    """

    step: int
    next_generation: int
    stop: bool = False


@dataclass(frozen=True, slots=True)
class Applied:
    """Main: the update of `step` is written (or skipped by the verdict)."""

    step: int


@dataclass(frozen=True, slots=True)
class Dealt:
    """Main: `step`, the next one, is dealt by speed, for this generation."""

    step: int
    generation: int


@dataclass(frozen=True, slots=True)
class StateSpoilt:
    """Main: part of the state here has been changed, and the rest never will be: it is of no use any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class AskWorld:
    """Main: I am outside every collective; where do I stand?"""


@dataclass(frozen=True, slots=True)
class StateReceived:
    """Main of a joiner: parameters and optimizer state as of `committed` are here, some of it made from other layers."""

    committed: int
    errors: tuple[LayerError, ...] = ()


@dataclass(frozen=True, slots=True)
class CollectiveBroke:
    """Main: an operation of the adopted world failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class LoopEnded:
    """Main: the training loop is over."""

    digest: str
    samples: int
    concludes: bool = False


@dataclass(frozen=True, slots=True)
class HasConcluded:
    """Main: what must run once after the loop has run here."""


@dataclass(frozen=True, slots=True)
class UserCodeRaised:
    """Main: an exception is about to end the process."""

    failure: Failed


Event = (
    Heard
    | GroupStands
    | GroupFell
    | Register
    | Warmed
    | AskVote
    | AskCommit
    | Applied
    | Dealt
    | StateSpoilt
    | AskWorld
    | StateReceived
    | CollectiveBroke
    | LoopEnded
    | HasConcluded
    | UserCodeRaised
)


# Effects: what the shell must do, in order ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Tell the controller."""

    message: WorkerMessage


@dataclass(frozen=True, slots=True)
class BuildGroup:
    """Build this plan's process group beside whatever runs, then report GroupStands or GroupFell."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class DropGroup:
    """Cancel the building of a generation's group, or abort it where it stands: it will not be used (any more)."""

    generation: int


@dataclass(frozen=True, slots=True)
class WakeMain:
    """Something that the main thread may be waiting for has changed."""


@dataclass(frozen=True, slots=True)
class Exit:
    """End the process at once; nothing that it holds is needed."""

    reason: str


# Answers to the main thread's questions, among the effects of the same call.


@dataclass(frozen=True, slots=True)
class MayVote:
    """Vote now, in this generation, naming the newest generation that this worker is ready to switch to."""

    generation: int
    next_generation: int


@dataclass(frozen=True, slots=True)
class MayCommit:
    """Write now; say Applied when done."""


@dataclass(frozen=True, slots=True)
class MustRegroup:
    """The word is sealed or the world is broken: leave the collective and AskWorld."""

    reason: str


@dataclass(frozen=True, slots=True)
class GoOn:
    """The adopted world stands: continue the step."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can be done before the controller has spoken: wait to be woken, then AskWorld again."""

    reason: str


@dataclass(frozen=True, slots=True)
class FinishStep:
    """Others have committed `step`, for which this worker holds the reduced gradient: apply it, say Applied."""

    step: int


@dataclass(frozen=True, slots=True)
class EnterWorld:
    """Adopted: train in `plan` after step `committed`. Ranks in `joiner_ranks` must be given the state first.

    With a `snapshot` those are all ranks, and each reads it from its node's agent. `restores_per_s` is how often that happens.
    `kept_deal` is the generation as dealt for which all who are left have the step in progress; 0: they do not agree.
    """

    plan: Plan
    rank: int
    committed: int
    joiner_ranks: tuple[int, ...]
    snapshot: SnapshotId | None = None
    restores_per_s: float = 0.0
    kept_deal: int = 0


@dataclass(frozen=True, slots=True)
class HandOver:
    """The world goes on as `plan` without this worker: give the others what it alone holds, then AskWorld again."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class MustConclude:
    """All have left the loop: run what must run once after it, and say HasConcluded."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing is left to do here: the job is over, or the world goes on without this worker as planned."""

    reason: str


Answer = MayVote | MayCommit | MustRegroup | GoOn | Wait | FinishStep | EnterWorld | HandOver | MustConclude | Finished
Effect = Send | BuildGroup | DropGroup | WakeMain | Exit | Answer


class WorkerMachine:
    """State of one worker process; see the module's docstring for its law."""

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.word = Word.OPEN
        self.committed = 0
        self.voted = 0
        self.has_state = True  # the initial weights are the state of step 0, until Admitted says otherwise
        self.world: Plan | None = None
        self.broken = ""  # why the adopted world cannot be used any more; "" while it can
        self.newest_generation = 0
        self.pending: Plan | None = None
        self.pending_stands = False
        self.pending_reported = False
        self.order: Commit | None = None
        self.switch_decided = 0  # generation that the last verdict told everyone to adopt
        self.retired = 0  # generation that a switch replaced, whose group peers may still be reading from
        self.admitted: Admitted | None = None
        self.warmed = False
        self.left: Leaving | None = None
        self.resumed_in = 0
        self.layer_errors: tuple[LayerError, ...] = ()
        self.holds_parts = False  # of the state, that not every other worker has
        self.stop_after = 0  # the step whose verdict has said that all leave the loop after it
        self.dealt: Dealt | None = None  # how the next step is, in jobs that deal steps by speed
        self.concluding = False  # this worker is to run what must run once after the loop
        self.finished = ""

    # -- dispatch --------------------------------------------------------------------------------------------------

    def step(self, event: Event) -> list[Effect]:
        """Take one event in and return what must be done, in order."""
        match event:
            case Heard(command):
                return self._heard(command)
            case GroupStands(generation):
                return self._group_stands(generation)
            case GroupFell(generation, reason):
                if self.pending is None or self.pending.generation != generation:
                    return []
                return [Send(PrepareFailed(generation, reason))]
            case Register(spec):
                self.holds_parts = spec.holds_parts
                return [Send(Registered(spec))]
            case Warmed():
                self.warmed = True
                return [Send(Warm()), *self._report_if_ready()]
            case AskVote(step):
                return self._ask_vote(step)
            case AskCommit(step, next_generation, stop):
                return self._ask_commit(step, next_generation, stop)
            case Applied(step):
                return self._applied(step)
            case Dealt():
                self.dealt = event
                return []
            case StateSpoilt(reason):
                return self._state_spoilt(reason)
            case AskWorld():
                return self._ask_world()
            case StateReceived(committed, errors):
                self.has_state, self.committed, self.voted = True, committed, committed
                self.layer_errors = errors
                return []
            case CollectiveBroke(reason):
                return self._collective_broke(reason)
            case LoopEnded(digest, samples, concludes):
                self.left = Leaving(self.committed, digest, samples, concludes)
                return [Send(self.left)]
            case HasConcluded():
                self.concluding = False
                return [Send(Concluded(self.committed))]
            case UserCodeRaised(failure):
                return [Send(failure)]

    # -- the controller's side -------------------------------------------------------------------------------------

    def _heard(self, command: WorkerCommand) -> list[Effect]:
        match command:
            case Admitted():
                if self.world is not None or self.pending is not None:
                    return []  # said again by a controller that came back; it has gone on since
                self.admitted = command
                self.has_state = not command.joins_running_world
                return [WakeMain()]
            case Prepare(plan):
                return self._prepare(plan)
            case Commit(generation):
                if self.pending is None or self.pending.generation != generation or self.order is not None:
                    return []
                self.order = command
                self.stop_after = command.stop_after or self.stop_after
                return [WakeMain()]
            case Abandon(generation):
                if self.pending is None or self.pending.generation != generation or self.order is not None:
                    return []
                self._forget_pending()
                return [DropGroup(generation)]
            case Conclude():
                self.concluding = True
                return [WakeMain()]
            case Finish(reason):
                self.finished = reason or "the job is over"
                return [WakeMain()]

    def _prepare(self, plan: Plan) -> list[Effect]:
        if plan.generation <= self.newest_generation:
            return []  # the fence: an older generation has nothing to say any more
        self.newest_generation = plan.generation
        effects: list[Effect] = []
        if self.pending is not None:
            effects.append(DropGroup(self.pending.generation))
        self._forget_pending()
        included = plan.rank_of(self.worker) is not None
        if plan.kind is PlanKind.FENCE:
            if not included:
                return [*effects, Exit(f"generation {plan.generation} leaves this worker out: {plan.reason}")]
            self.switch_decided = 0
            if self.retired:
                effects.append(DropGroup(self.retired))
                self.retired = 0
            if self.world is not None:
                effects.append(DropGroup(self.world.generation))
                self.broken = plan.reason
        self.pending = plan
        if plan.kind is not PlanKind.SWITCH and self.word is Word.OPEN:
            self.word = Word.SEALED
        if included:
            effects.append(BuildGroup(plan))
        else:
            self.pending_stands = True  # it leaves with this switch, so there is nothing to build
        effects.append(WakeMain())
        return effects + self._report_if_ready()

    def _forget_pending(self) -> None:
        self.pending, self.pending_stands, self.pending_reported, self.order = None, False, False, None

    def _group_stands(self, generation: int) -> list[Effect]:
        if self.pending is None or self.pending.generation != generation:
            return [DropGroup(generation)]
        self.pending_stands = True
        return self._report_if_ready()

    def _report_if_ready(self) -> list[Effect]:
        plan = self.pending
        if plan is None or not self.pending_stands or self.pending_reported:
            return []
        if plan.kind is not PlanKind.SWITCH and self.word is not Word.SEALED:
            return []  # main is writing; what it writes belongs in the report
        if plan.kind is PlanKind.SWITCH and self.world is None and not self.warmed:
            return []  # its first slot would be a slow one, and its peers would wait for it
        self.pending_reported = True
        dealt = self.dealt.generation if self.dealt is not None and self.dealt.step == self.committed + 1 else 0
        return [Send(Prepared(plan.generation, self.committed, self.voted, self.has_state, self.stop_after, dealt))]

    # -- the main thread's side ------------------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Whether all leave the loop now: a verdict has said so after the newest step, or an older one."""
        return 0 < self.stop_after <= self.committed

    @property
    def must_switch(self) -> bool:
        """Whether the last verdict told everyone to adopt a switch, and this worker has yet to do so."""
        return self.pending is not None and self.order is not None and self.switch_decided == self.pending.generation

    def _ask_vote(self, step: int) -> list[Effect]:
        if self.word is not Word.OPEN or self.broken or self.world is None:
            return [MustRegroup(self.broken or "sealed")]
        if step != self.committed + 1:
            return [Exit(f"vote on step {step} after {self.committed} committed steps: a fault of the runtime")]
        self.voted = step
        ready = self.world.generation
        if self.pending is not None and self.order is not None:
            ready = self.pending.generation
        return [MayVote(self.world.generation, ready)]

    def _ask_commit(self, step: int, next_generation: int, stop: bool) -> list[Effect]:
        if self.word is not Word.OPEN or self.world is None:
            return [MustRegroup(self.broken or "sealed")]
        self.word = Word.COMMITTING
        self.stop_after = step if stop else self.stop_after
        if next_generation > self.world.generation:
            self.switch_decided = next_generation
        return [MayCommit()]

    def _applied(self, step: int) -> list[Effect]:
        self.committed = step
        self.word = Word.OPEN
        effects: list[Effect] = []
        if self.retired:
            effects.append(DropGroup(self.retired))
            self.retired = 0
        if self.pending is not None and self.pending.kind is not PlanKind.SWITCH:
            self.word = Word.SEALED
            return effects + self._report_if_ready()
        if self.world is not None and self.resumed_in < self.world.generation:
            self.resumed_in = self.world.generation
            effects.append(Send(Resumed(self.world.generation, step, self.layer_errors)))
            self.layer_errors = ()
        return effects

    def _state_spoilt(self, reason: str) -> list[Effect]:
        self.has_state = False
        self.word = Word.OPEN  # what was being written is over
        effects = self._collective_broke(reason)
        if self.pending is not None and self.pending.kind is not PlanKind.SWITCH:
            self.word = Word.SEALED
            effects += self._report_if_ready()
        return effects

    def _collective_broke(self, reason: str) -> list[Effect]:
        if self.world is None or self.broken:
            return []
        self.broken = reason
        # Dropping the group makes the failure everybody's at once: no peer waits for a timeout.
        effects: list[Effect] = [DropGroup(self.world.generation)]
        if self.word is Word.OPEN:
            effects.append(Send(CollectiveFailed(self.world.generation, self.committed + 1, reason)))
        return effects

    def _ask_world(self) -> list[Effect]:
        if self.finished and not self._owes_a_part():
            return [Finished(self.finished)]
        if self.concluding and self.left is not None:
            return [MustConclude()]
        if self.pending is not None and self.order is not None:
            if self.pending.kind is not PlanKind.SWITCH:
                return self._adopt_after_fence(self.pending, self.order)
            if self.world is None or self.switch_decided == self.pending.generation:
                return self._adopt(self.pending, self.order)
        if self.word is Word.SEALED or self.broken:
            return [Wait(self.broken or "a newer generation is being prepared")]
        if self.world is None:
            return [Wait("the first world has not formed yet")]
        return [GoOn()]

    def _owes_a_part(self) -> bool:
        """Whether a switch that leaves this worker out is decided, and the others wait for what it alone holds.

        All of them may have switched, and the controller have said Finish, before a slow one that leaves looks up.
        """
        plan = self.pending
        return self.holds_parts and self.must_switch and plan is not None and plan.rank_of(self.worker) is None

    def _adopt_after_fence(self, plan: Plan, order: Commit) -> list[Effect]:
        if not self._joins(plan, order) and self.has_state and order.restore_step != self.committed:
            if order.restore_step == self.committed + 1 == self.voted:
                self.word = Word.COMMITTING
                return [FinishStep(order.restore_step)]
            return [
                Exit(
                    f"generation {plan.generation} restores step {order.restore_step}, but this worker has committed "
                    f"{self.committed} and voted {self.voted}: its state cannot be brought there"
                )
            ]
        return self._adopt(plan, order)

    def _joins(self, plan: Plan, order: Commit) -> bool:
        return plan.rank_of(self.worker) in order.joiner_ranks

    def _adopt(self, plan: Plan, order: Commit) -> list[Effect]:
        rank = plan.rank_of(self.worker)
        if self._joins(plan, order):
            self.has_state = False  # it is about to be overwritten; what came after the report is given again
        if plan.kind is PlanKind.SWITCH and self.world is not None:
            # A slower peer may still be reading the verdict from the old group; the next commit proves that none is.
            self.retired = self.world.generation
        if rank is not None and plan.is_given_layers(rank):
            self.has_state = False  # it has yet to be given some of what is its own from now on
        if self.dealt is not None and order.kept_deal != self.dealt.generation:
            self.dealt = None  # main is about to deal it anew
        self._forget_pending()
        self.word, self.broken, self.switch_decided = Word.OPEN, "", 0
        self.voted = self.committed  # an undecided step is redone: its reduced gradient is not a vote any more
        switched = Send(Switched(plan.generation, self.committed))
        if rank is None:
            # The old group stays until the controller knows that all others have switched, and says Finish.
            self.world = None
            return [switched, HandOver(plan) if self.holds_parts else Wait(plan.reason)]
        self.world = plan
        snapshot = SnapshotId(order.restore_step, order.snapshot_generation) if order.snapshot_generation else None
        entered = EnterWorld(
            plan, rank, self.committed, order.joiner_ranks, snapshot, order.restores_per_s, order.kept_deal
        )
        return [switched, entered]
