"""The life of a worker: steps that are reduced, voted on and committed, and worlds that come and go in between.

The engine runs on the main thread, inside calls that user code makes anyway. It asks the coordinator what it may do and
never decides who lives, who leads, or which step is restored. User code sees more iterations after a failure, never an
exception. What a step consists of, and what of the state this worker holds, is a subclass's: `replica.py` for workers that
hold the whole model, `pipeline/engine.py` for those that hold a stage of it.
"""

from __future__ import annotations

import abc
import contextlib
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from elastic import verdict
from elastic.capture import Capturer
from elastic.collecting import Collector
from elastic.control import Coordinator
from elastic.domain import LayerError, Plan
from elastic.errors import CollectiveAborted, ProtocolError, TransferError, Unreachable
from elastic.failpoints import FailPoint, reach
from elastic.group import Group
from elastic.measures import Measures
from elastic.memory import SnapshotMemory
from elastic.progress import Operation, ProgressPage
from elastic.protocol import (
    Applied,
    AskCommit,
    AskVote,
    AskWorld,
    CollectiveBroke,
    EnterWorld,
    Finished,
    FinishStep,
    GoOn,
    HandOver,
    HasConcluded,
    LoopEnded,
    MayCommit,
    MayVote,
    MustConclude,
    StateReceived,
    StateSpoilt,
    Wait,
)
from elastic.records import SampleRecord
from elastic.reduction import Reduced
from elastic.sampler import SlotSampler
from elastic.snapshots import SnapshotId
from elastic.snapshotter import Snapshotter
from elastic.timers import Aside, Phase, StepTimer

LOSS = "loss"  # the measure that is shown to people


@dataclass(frozen=True, slots=True)
class Slot:
    """One micro-batch that is being computed.

    Attributes:
        step, slot: Logical coordinates; they seed everything random.
        ids: Sample ids.
        counts: False for a throwaway slot: nothing of it is kept.
        is_last: Whether the step is reduced at the end of this slot.
        place: What seeds it in place of the slot, where a slot has several batches; -1: the slot itself.
    """

    step: int
    slot: int
    ids: tuple[int, ...]
    counts: bool
    is_last: bool
    place: int = -1

    @property
    def key(self) -> tuple[int, int, tuple[int, ...]]:
        """What is fetched: step, place, sample ids."""
        return self.step, self.slot if self.place < 0 else self.place, self.ids


def reach_voted() -> None:
    """The vote is on its way, and nothing is known of the others'."""
    reach(FailPoint.VOTED)


class Engine(abc.ABC):
    """Drives one worker's steps.

    Attributes:
        plan, rank, group: the present world; None before the first.
        committed, samples: steps, and samples in them.
        reduced: what is to be applied if the verdict on the step in progress says so.
        slot: what is being computed; None between slots.
        committed_in_slot: whether the optimizer step of the present iteration was the commit.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        sampler: SlotSampler,
        *,
        page: ProgressPage | None,
        record: SampleRecord | None,
        memory: SnapshotMemory | None = None,
    ) -> None:
        self.coordinator = coordinator
        self.sampler = sampler
        self.measures = Measures()
        self.memory = memory
        self.snapshots = Snapshotter()
        self.plan: Plan | None = None
        self.rank = 0
        self.group: Group | None = None
        self.committed = 0
        self.samples = 0
        self.slot: Slot | None = None
        self.committed_in_slot = False
        self.reduced: Reduced | None = None
        self.to_announce: list[int] = []  # committed steps whose callbacks have not run
        self.on_commit: list[Callable[[int], None]] = []
        self.on_end: list[Callable[[], None]] = []
        self.collector = Collector(0)
        self.stop_asked = False
        self._donate: tuple[int, ...] = ()
        self._restore: SnapshotId | None = None  # what all ranks read the state from
        self._kept_deal = 0  # the world as dealt for which all who are left have the step in progress; 0: they do not agree
        self._loop_epoch = 0  # epoch whose loop user code is in
        self._page = page
        self.timer = StepTimer(page)
        self._record = record
        self._committed_plan: Plan | None = None  # the world that committed the newest step, if this worker was in it
        self._recorded_dead: set[str] = set()  # whose share of that step this worker has recorded for them

    def take_snapshots(self, capturer: Capturer, every: int, period: int = 1) -> None:
        """Capture the state from now on; `period` steps lie between those whose state can be captured."""
        self.snapshots = Snapshotter(capturer, every, period)

    # -- what a subclass is --------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _reduce(self) -> Reduced:
        """Complete the sum of the step in progress. Raises CollectiveAborted."""

    @abc.abstractmethod
    def _presence(self) -> Sequence[bool]:
        """For each parameter of the whole model, whether a slot here gave it a gradient."""

    @abc.abstractmethod
    def _presence_after_reduction(self) -> Sequence[bool]:
        """The same for slots anywhere, of the newest reduced step, as far as this worker can tell."""

    @abc.abstractmethod
    def _output_is_finite(self) -> bool:
        """Whether the newest reduced gradient is, as the verdict says if nobody changed it since."""

    @abc.abstractmethod
    def _groups_hash(self) -> int:
        """Hash of what the optimizers are about to do; it must be equal on all workers."""

    @abc.abstractmethod
    def _update(self, step: int, reduced: Reduced, presence: Sequence[bool], *, commit: bool) -> None:
        """Write the step's update into the state, or what belongs to a step without one."""

    @abc.abstractmethod
    def _forget_step(self) -> None:
        """Whatever was computed for a step in progress is of no use any more."""

    @abc.abstractmethod
    def _plan_step(self) -> None:
        """Take up who does what of the step in progress."""

    @abc.abstractmethod
    def _has_more_to_do(self) -> bool:
        """Whether the world that was entered gives this worker something to do before the step can be reduced."""

    @abc.abstractmethod
    def _enter_state(self, world: EnterWorld, before: Plan | None, group: Group | None) -> None:
        """This worker is in a new world: prepare what it holds for it.

        Raises CollectiveAborted where a member of the world before is gone, TransferError where what came is damaged.
        """

    @abc.abstractmethod
    def _hand_over_state(self, plan: Plan, before: Plan, group: Group) -> None:
        """The others go on without this worker: give them what it alone holds. Raises CollectiveAborted."""

    @abc.abstractmethod
    def _pass_state(self, joiners: tuple[int, ...]) -> int | None:
        """Every rank that holds the state gives it to those that do not; returns the step of what this one has received.

        Raises CollectiveAborted, and TransferError at a worker that was to receive it.
        """

    @abc.abstractmethod
    def _must_settle(self) -> bool:
        """Whether parts of the state are still to be moved in the world that was entered."""

    @abc.abstractmethod
    def _settle_state(self, joins: bool) -> None:
        """Move them. Raises CollectiveAborted or TransferError."""

    @abc.abstractmethod
    def _read_snapshot(self, memory: SnapshotMemory, snapshot: SnapshotId) -> None:
        """Take over the state of a snapshot. Raises TransferError or Unreachable."""

    @abc.abstractmethod
    def _take_over(self) -> None:
        """The state has been written into everything that holds it."""

    @abc.abstractmethod
    def _loop_ended(self) -> LoopEnded:
        """What is said of the state when the loop is over."""

    @abc.abstractmethod
    def recorded_slots(self, step: int, plan: Plan, rank: int) -> list[int]:
        """The slots whose samples a rank writes down, of the step in progress or of the newest one."""

    # -- where the job is ----------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The step in progress, counted from 1."""
        return self.committed + 1

    @property
    def stopping(self) -> bool:
        """Whether a verdict has said that all leave the loop after the newest step."""
        return self.coordinator.machine.stopping

    @property
    def loss(self) -> float:
        """Mean over the newest step of what was logged as loss; NaN before."""
        return self.measures.mean(LOSS)

    def epoch(self) -> int:
        """Return the data epoch of the step in progress."""
        return self.sampler.epoch_of(self.step)

    def begin_epoch(self) -> None:
        """User code enters its loop over the loader, for the epoch of the step in progress."""
        self._loop_epoch = self.epoch()

    def _is_over(self) -> bool:
        """Whether the loop that user code is in has had its last step."""
        return self.stopping or self.epoch() != self._loop_epoch

    def own_slots(self) -> list[int]:
        """Return the slots of a step that this worker is to read, as they are dealt now."""
        return [] if self.plan is None else self.recorded_slots(self.step, self.plan, self.rank)

    def pieces(self, step: int, slot: int) -> list[tuple[int, tuple[int, ...]]]:
        """Return what user code is given of a slot: place and sample ids of each batch; nothing if that is not known yet."""
        return [(slot, self.sampler.ids(step, slot))]

    # -- the end of a step ---------------------------------------------------------------------------------------------

    def _commit_step(self) -> bool:
        """Reduce, vote and commit the step in progress; on a broken world regroup and try again.

        Returns False, without a commit, when the regrouped world gives this worker something to do before it.
        """
        step = self.step
        while True:
            try:
                if self._try_commit(step):
                    return True
                reason = "sealed"
            except CollectiveAborted as error:
                reason = str(error)
                self.coordinator.feed(CollectiveBroke(reason))
            if self._regroup(step):
                return True
            if self._donate or self._has_more_to_do() or self._must_settle():
                return (
                    False  # a joiner is given the state at the next fetch, where all who give it are at the same point
                )

    def _try_commit(self, step: int) -> bool:
        group = self.group
        assert group is not None and self.plan is not None
        self.timer.enter(Phase.REDUCE)
        with self._waiting(Operation.REDUCTION):
            reduced = self._reduce()
        self.timer.enter(Phase.VOTE)
        self.reduced = reduced
        reach(FailPoint.BEFORE_VOTE)
        answer = self.coordinator.ask(AskVote(step))
        if not isinstance(answer, MayVote):
            return False
        vote = verdict.Vote(
            step=step,
            generation=answer.generation,
            complete=reduced.complete,
            finite=reduced.finite,
            groups_hash=self._groups_hash(),
            next_generation=answer.next_generation,
            stop=self.stop_asked,
            presence=self._presence(),
            measures_hash=zlib.crc32(repr(self.measures.agreement).encode()),
            snapshots=self.snapshots.vote(step, self.plan, time.monotonic()),
        )
        with self._waiting(Operation.VERDICT):
            outcome = verdict.cast(group, vote, voted=reach_voted)
        reach(FailPoint.VERDICT_SEEN)
        if outcome.decision is verdict.Decision.RETRY:
            self._plan_step()
            return False
        if not isinstance(self.coordinator.ask(AskCommit(step, outcome.next_generation, outcome.stop)), MayCommit):
            return False
        plan, rank = self.plan, self.rank
        self._apply(step, outcome.presence, commit=outcome.decision is verdict.Decision.COMMIT)
        # Whoever commits without having seen the verdict learns of what is stable from the next one.
        self.snapshots.decided(step, plan, rank, outcome.snapshots)
        return True

    def _apply(self, step: int, presence: Sequence[bool], *, commit: bool) -> None:
        reduced = self.reduced
        assert reduced is not None and self.plan is not None
        self.timer.enter(Phase.OPTIMIZER)
        self.snapshots.finish()
        self._update(step, reduced, presence, commit=commit)
        if self._record is not None:
            mine = {slot: self.sampler.ids(step, slot) for slot in self.recorded_slots(step, self.plan, self.rank)}
            self._record.write(step, self.plan.generation, mine)
        self.committed, self._committed_plan, self._recorded_dead = step, self.plan, set()
        self.samples += self.sampler.samples(step)
        self.reduced = None
        self.committed_in_slot = True
        self._forget_step()
        self.to_announce.append(step)
        self.coordinator.feed(Applied(step))
        self._plan_step()
        if self._page is not None and not commit:
            self._page.skip()
        self._show()
        self.timer.committed(step)

    # -- worlds --------------------------------------------------------------------------------------------------------

    def _settle(self) -> bool:
        """Wait out a regroup, adopt a new world, pass the state on to joiners; returns whether the epoch goes on."""
        while True:
            self._regroup(self.step)
            joining = self.rank in self._donate
            if not joining and self._is_over():
                # What user code does now (a scheduler's step) belongs to the state that joiners are given after it.
                return False
            joiners, self._donate = self._donate, ()
            snapshot, self._restore = self._restore, None
            try:
                with self._waiting(Operation.STATE):
                    if snapshot is not None:
                        self._read_state(snapshot)
                    elif joiners and (received := self._pass_state(joiners)) is not None:
                        self._has_state(received)
                    if self._must_settle():
                        self._settle_state(joining)
            except CollectiveAborted as error:
                print(f"elastic: the world broke before all held their state: {error}", file=sys.stderr, flush=True)
                self.coordinator.feed(CollectiveBroke(str(error)))
                continue
            except TransferError as error:
                self.coordinator.end_process(str(error))
            if joining:
                self.begin_epoch()  # whatever epoch it was when this worker began to warm up
            return True

    def _regroup(self, step: int) -> bool:
        """Wait for the next world and enter it; returns whether `step` was committed on the way."""
        committed = False
        while True:
            with self._waiting():
                answer = self.coordinator.ask_until(AskWorld(), lambda a: not isinstance(a, Wait))
            match answer:
                case FinishStep(finished):
                    # Others saw this step's verdict pass, and this worker holds the whole reduced gradient.
                    self._apply(finished, self._presence_after_reduction(), commit=self._output_is_finite())
                    committed = True
                case EnterWorld():
                    self._enter(answer)
                    if not self.coordinator.machine.broken:  # else what it was to be handed has been lost on the way
                        return committed
                case HandOver(plan):
                    self._hand_over(plan)
                case GoOn():
                    return committed
                case Finished():
                    raise SystemExit(0)  # drained: the world goes on without this worker
                case _:
                    raise ProtocolError(f"{answer} while regrouping: a fault of the runtime")

    def _enter(self, world: EnterWorld) -> None:
        if world.rank == min(set(range(world.plan.world_size)) - set(world.joiner_ranks), default=0):
            self._record_for_the_dead(world.plan)
        before, group = self.plan, self.group
        self.plan, self.rank = world.plan, world.rank
        self.group = self.coordinator.group(world.plan.generation)
        try:
            with self._waiting(Operation.STATE):
                self._enter_state(world, before, group)
        except CollectiveAborted as error:
            print(f"elastic: the world before broke while its state was handed over: {error}", file=sys.stderr, flush=True)
            self.coordinator.feed(StateSpoilt(str(error)))
        except TransferError as error:
            self.coordinator.end_process(str(error))
        self._donate, self._restore, self._kept_deal = world.joiner_ranks, world.snapshot, world.kept_deal
        self.snapshots.expect(world.restores_per_s)
        self._plan_step()
        self._show()
        self.coordinator.bury()

    def _record_for_the_dead(self, new: Plan) -> None:
        """Write what lost workers used of the newest step: they may have died between their vote and their record.

        That step may lie before a switch, so it is dealt as the world that committed it was.
        """
        plan = self._committed_plan
        if self._record is None or plan is None:
            return
        lost = plan.workers() - new.workers() - self._recorded_dead
        gone = [member.rank for member in plan.members if member.worker in lost]
        slots = [slot for rank in gone for slot in self.recorded_slots(self.committed, plan, rank)]
        self._record.write(self.committed, plan.generation, {s: self.sampler.ids(self.committed, s) for s in slots})
        self._recorded_dead |= lost

    def _hand_over(self, plan: Plan) -> None:
        """The others go on without this worker, but not without what it alone holds."""
        assert self.plan is not None and self.group is not None
        try:
            with self._waiting(Operation.STATE):
                self._hand_over_state(plan, self.plan, self.group)
        except CollectiveAborted as error:
            print(f"elastic: those who stay must restore a snapshot: {error}", file=sys.stderr, flush=True)

    def _read_state(self, snapshot: SnapshotId) -> None:
        """Every rank goes on from the snapshot, which its node's agent has ready."""
        if self.memory is None:
            self.coordinator.end_process(f"{snapshot} is to be restored, but the agent gave no way to its memory")
        try:
            self._read_snapshot(self.memory, snapshot)
        except (TransferError, Unreachable) as error:
            self.coordinator.end_process(f"the state cannot be restored: {error}")
        self.snapshots.restored(snapshot.step)
        self._has_state(snapshot.step)

    def _layer_errors(self) -> tuple[LayerError, ...]:
        """Of layers that were made from others as the state came, how far they are expected to be from what was lost."""
        return ()

    def _has_state(self, committed: int) -> None:
        """The state as of this step has been written into everything that holds it."""
        self.committed = committed
        self._committed_plan = None
        self._take_over()
        self.samples = self.sampler.samples_until(self.committed)
        self.coordinator.feed(StateReceived(self.committed, self._layer_errors()))
        self._forget_step()
        self._plan_step()
        self._show()

    # -- the end -------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _leave_loop(self) -> None:
        """User code has left the loop, perhaps in the middle of a step, which then never happened."""

    @abc.abstractmethod
    def _entered_after_loop(self) -> None:
        """A world was entered that continues after the last step: give nobody anything but what all have to make."""

    def close(self) -> None:
        """The training loop is over here: say so, and wait until it is over for all."""
        self._leave_loop()
        self.begin(Operation.END)
        self.coordinator.feed(self._loop_ended())
        while True:
            with self._waiting():
                answer = self.coordinator.ask_until(AskWorld(), lambda a: not isinstance(a, Wait | GoOn))
            match answer:
                case Finished():
                    return
                case MustConclude():
                    for conclude in self.on_end:
                        conclude()
                    self.coordinator.feed(HasConcluded())
                case HandOver(plan):
                    self._hand_over(plan)
                case EnterWorld(snapshot=None):
                    self._enter(answer)
                    self._entered_after_loop()
                case EnterWorld(snapshot=snapshot) if snapshot is not None and snapshot.step == self.committed:
                    self._enter(answer)  # the loop stays ended, but this worker may hold other parts from now on
                    self._read_state(snapshot)
                    self.coordinator.feed(self._loop_ended())
                case EnterWorld():
                    self.coordinator.end_process("its loop has ended, and the world goes back to a step before that")
                case _:
                    raise ProtocolError(f"{answer} after the loop: a fault of the runtime")

    # -- what people see -----------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        steps, self.to_announce = self.to_announce, []
        for step in steps:
            self.collector.step_ended(step)
        if self.rank == 0 and self.on_commit:
            self.begin(Operation.CALLBACK)
            self.timer.enter(Phase.OUTSIDE)
            self.timer.goes_aside(Aside.BUSY)
            for step in steps:
                for callback in self.on_commit:
                    callback(step)
            self.timer.enter(Phase.VOTE)

    def beat(self) -> None:
        """Count progress."""
        if self._page is not None:
            self._page.beat()

    def begin(self, operation: Operation) -> None:
        """Show what is begun now."""
        if self._page is not None:
            self._page.doing(operation)

    def begin_slot(self, step: int, slot: int) -> None:
        """Show which slot is begun, with the reading of its samples."""
        if self._page is not None:
            self._page.place(step, slot)
        self.begin(Operation.DATA)

    @contextlib.contextmanager
    def _waiting(self, operation: Operation = Operation.REGROUPING) -> Iterator[None]:
        """Show that this worker waits for others meanwhile, which is not a hang of its own."""
        if self._page is None:
            yield
            return
        before = self._page.doing(operation)
        self._page.waits(True)
        try:
            yield
        finally:
            self._page.waits(False)
            self._page.doing(before)

    def _show(self) -> None:
        if self._page is not None:
            self._page.show(
                generation=self.plan.generation if self.plan is not None else 0,
                committed=self.committed,
                samples=self.samples,
                loss=self.loss,
            )
