"""The step of a worker: slots, reduction, verdict, commit, and what happens when a world breaks in between.

The engine runs on the main thread, inside calls that user code makes anyway: the loader's next, the optimizer's step,
the end of the script. It asks the coordinator what it may do and never decides who lives, who leads, or which step is
restored. User code sees more iterations after a failure, never an exception.
"""

from __future__ import annotations

import contextlib
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elastic import measures, verdict
from elastic.buffers import CommittedBuffers, Rule
from elastic.capture import Capturer, restore
from elastic.control import Coordinator
from elastic.domain import Plan
from elastic.errors import CollectiveAborted, ConfigError, ProtocolError, TransferError, Unreachable
from elastic.failpoints import FailPoint, reach, reach_inside
from elastic.group import Group
from elastic.memory import SnapshotMemory
from elastic.progress import ProgressPage
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
    Warmed,
)
from elastic.records import SampleRecord
from elastic.reduction import Reduced, Reducer, Reduction
from elastic.sampler import SlotSampler
from elastic.sharding import OptimizerShards
from elastic.snapshots import SnapshotId
from elastic.snapshotter import Snapshotter
from elastic.state import TrainingState
from elastic.transfer import receive_state, send_state
from elastic.zero import Zero

LOSS = "loss"  # the measure that is shown to people


@dataclass(frozen=True, slots=True)
class Slot:
    """One micro-batch that user code is about to compute.

    Attributes:
        step, slot: Logical coordinates; they seed everything random.
        ids: Sample ids.
        counts: False for a throwaway slot: nothing of it is kept.
        is_last: Whether the step is reduced at the end of this slot.
    """

    step: int
    slot: int
    ids: tuple[int, ...]
    counts: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class Parts:
    """What user code handed over.

    Attributes:
        models, optimizers, parameters: What is trained.
        stateful: Schedulers and the like; the state goes to joiners, and nothing else is done with it.
        more_models: Modules that are not trained here and whose tensors belong to the state (an average of weights).
        rules: What a commit makes of buffers.
        shards_optimizer: Whether each worker holds a part of the optimizers' state alone.
    """

    models: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    stateful: Mapping[str, Any]
    parameters: Sequence[nn.Parameter]
    more_models: Mapping[str, nn.Module] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    shards_optimizer: bool = False

    def state(
        self,
        measured: measures.Measures,
        buffers: Mapping[str, Tensor] | None = None,
        shards: OptimizerShards | None = None,
    ) -> TrainingState:
        """Return all of it as the state that joiners are given."""
        stateful = {**self.stateful, "elastic.measures": measured}
        return TrainingState({**self.models, **self.more_models}, self.optimizers, stateful, buffers, shards)


def reach_voted() -> None:
    """The vote is on its way, and nothing is known of the others'."""
    reach(FailPoint.VOTED)


class Engine:
    """Drives one worker's steps."""

    def __init__(
        self,
        coordinator: Coordinator,
        parts: Parts,
        sampler: SlotSampler,
        *,
        replicas: int,
        reduction: Reduction,
        joins: bool,
        page: ProgressPage | None,
        record: SampleRecord | None,
        memory: SnapshotMemory | None = None,
        snapshot_every: int = 0,
    ) -> None:
        self.coordinator = coordinator
        self.sampler = sampler
        self.parts = parts
        self.buffers = CommittedBuffers(parts.models, sampler.slots, parts.rules)
        self.measures = measures.Measures()
        self.zero = Zero(parts.optimizers) if parts.shards_optimizer else None
        shards = self.zero.shards if self.zero is not None else None
        self.state = parts.state(self.measures, self.buffers.copies, shards)
        self.reducer = Reducer(
            parts.parameters,
            replicas=replicas,
            reduction=reduction,
            extras=self.buffers.extras + measures.EXTRAS,
            shared=coordinator.settings.shares_memory,
            on_progress=self.beat,
        )
        self.memory = memory
        self.snapshots = Snapshotter(every=snapshot_every)
        if memory is not None and snapshot_every:
            capturer = Capturer(self.state, memory, buffers=3 if snapshot_every == 1 else 2)
            self.snapshots = Snapshotter(capturer, snapshot_every)
        self.plan: Plan | None = None
        self.rank = 0
        self.group: Group | None = None
        self.committed = 0
        self.samples = 0
        self.slot: Slot | None = None
        self.committed_in_slot = False  # the optimizer step of the present slot was the commit
        self.clips: list[Callable[[], None]] = []
        self.reduced: Reduced | None = None
        self.to_announce: list[int] = []  # committed steps whose callbacks have not run
        self.on_commit: list[Callable[[int], None]] = []
        self.stop_asked = False
        self.inner_steps: list[Callable[[], object]] = [self._inner_step(each) for each in parts.optimizers.values()]
        self.before_clipping: list[Callable[[], object]] = []  # what reduced gradients go through first (unscaling)
        self.on_skip: list[Callable[[], object]] = []  # what a step without an update calls in place of the optimizers
        self.on_abandon: list[Callable[[], object]] = []  # what forgets an update that was begun and never completed
        self._warm_steps = tuple(self.inner_steps)
        self._stepped: set[int] = set()
        self._must_warm = joins
        self._donate: tuple[int, ...] = ()
        self._restore: SnapshotId | None = None  # what all ranks read the state from
        self._loop_epoch = 0  # epoch whose loop over the loader user code is in
        self._page = page
        self._record = record
        self.on_end: list[Callable[[], None]] = []
        self._committed_plan: Plan | None = None  # the world that committed the newest step, if this worker was in it
        self._recorded_dead: set[str] = set()  # whose share of that step this worker has recorded for them

    def _inner_step(self, optimizer: Optimizer) -> Callable[[], object]:
        """What updates the parameters, or this worker's part of them."""
        return optimizer.step if self.zero is None else self.zero.shards.stepping(optimizer, optimizer.step)

    # -- what the loader asks --------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The step in progress, counted from 1."""
        return self.committed + 1

    def end_iteration(self) -> None:
        """End the present slot, and with it the step if it was committed: user code asks for more.

        Raises:
            ConfigError: an optimizer was not stepped in this iteration.
        """
        slot, self.slot = self.slot, None
        if slot is None:
            return
        if self.committed_in_slot:
            reach(FailPoint.STEP_ENDED)
        if not slot.counts:
            self.reducer.discard_slot()
            self.buffers.restore()
            self._say_warm()
        elif len(self._stepped) < len(self.inner_steps):
            raise ConfigError(
                f"{len(self.inner_steps) - len(self._stepped)} of {len(self.inner_steps)} prepared optimizers were not "
                f"stepped in an iteration of step {slot.step}: call every optimizer's step() once per iteration"
            )
        self._announce()

    def _say_warm(self) -> None:
        if self._must_warm:
            self._must_warm = False
            self.coordinator.feed(Warmed())
            reach_inside(FailPoint.JOINER_READY)

    def begin_epoch(self) -> None:
        """User code enters its loop over the loader, for the epoch of the step in progress."""
        self._loop_epoch = self.epoch()

    def next_slot(self) -> Slot | None:
        """Return the next slot of the data epoch that user code is in, or None when the next step belongs to another.

        Blocks while the world is being regrouped. Raises SystemExit when the world goes on without this worker.
        """
        self.end_iteration()
        self.beat()
        if self._must_warm:
            slot = Slot(self.step, 0, self.sampler.ids(self.step, 0), counts=False, is_last=True)
            return self._open_slot(slot)
        if not self._settle():
            return None
        assert self.plan is not None
        self.snapshots.step_ended(self.committed, self.plan.generation, time.monotonic())
        return self._open_slot(self._choose())

    @property
    def stopping(self) -> bool:
        """Whether a verdict has said that all leave the loop after the newest step."""
        return self.coordinator.machine.stopping

    @property
    def loss(self) -> float:
        """Mean over the newest step of what was logged as loss; NaN before."""
        return self.measures.mean(LOSS)

    def _settle(self) -> bool:
        """Wait out a regroup, adopt a new world, pass the state on to joiners; returns whether the epoch goes on."""
        while True:
            self._regroup(self.step)
            if self.stopping and self.rank not in self._donate:
                return False
            joining = self.rank in self._donate
            if not joining and self.epoch() != self._loop_epoch:
                # What user code does now (a scheduler's step) belongs to the state that joiners are given after it.
                return False
            joiners, self._donate = self._donate, ()
            snapshot, self._restore = self._restore, None
            try:
                if snapshot is not None:
                    with self._waiting():
                        self._read_state(snapshot)
                elif joiners:
                    with self._waiting():
                        self._pass_state(joiners)
                if self._must_settle():
                    with self._waiting():
                        self._settle_shards(joining)
            except CollectiveAborted as error:
                self.coordinator.feed(CollectiveBroke(str(error)))
                continue
            if joining:
                self.begin_epoch()  # whatever epoch it was when this worker began to warm up
            return True

    def epoch(self) -> int:
        """Return the data epoch of the step in progress."""
        return self.sampler.epoch_of(self.step)

    def own_slots(self) -> list[int]:
        """Return the slots of a step that this worker computes, as they are dealt now."""
        return [] if self.plan is None else [slot for slot, owner in enumerate(self.plan.owners) if owner == self.rank]

    def _choose(self) -> Slot:
        remaining = self.reducer.remaining_slots()
        if not remaining:
            # Nothing to compute (an epoch's short last step, or all was kept through a regroup), but the code behind
            # optimizer.step() must run for this step too: a throwaway slot carries it.
            return Slot(self.step, 0, self.sampler.ids(self.step, 0), counts=True, is_last=True)
        slot = remaining[0]
        return Slot(self.step, slot, self.sampler.ids(self.step, slot), counts=True, is_last=len(remaining) == 1)

    def _open_slot(self, slot: Slot) -> Slot:
        self.slot = slot
        self._stepped.clear()
        self.measures.begin_slot(len(slot.ids))
        self.committed_in_slot = False
        self.clips = []
        self.buffers.begin_slot()
        real = slot.counts and slot.slot in self.reducer.remaining_slots()
        sizes = set(self.sampler.sizes(slot.step)) - {0}
        self.reducer.begin_slot(
            slot.slot if real else None, float(len(slot.ids)) if real and len(sizes) > 1 else None
        )
        if real and slot.is_last:
            self.reducer.arm()
        return slot

    def _divisor(self) -> float | Callable[[Tensor], float]:
        """What the sum over slots is divided by, so that it is the mean over the global batch's samples or weights."""
        if self.measures.weighs:
            return lambda folded: measures.total_weight(folded[self.buffers.extras :])
        sizes = [size for size in self.sampler.sizes(self.step) if size]
        return float(len(sizes) if len(set(sizes)) == 1 else sum(sizes))

    def _empty_slots(self) -> tuple[int, ...]:
        return tuple(slot for slot, size in enumerate(self.sampler.sizes(self.step)) if size == 0)

    def _end_slot(self) -> None:
        slot = self.slot
        assert slot is not None
        self.reducer.end_slot(torch.cat([self.buffers.of_slot(slot.slot), self.measures.of_slot()]))

    def measure(self, name: str, value: float, call: str) -> None:
        """Take a slot's value for the mean over its step.

        Raises:
            ConfigError: there is no slot, or it is over and what it leaves for the step has been summed.
        """
        self._refuse_outside_the_slot(call)
        self.measures.give(name, value)

    def weigh(self, weight: float) -> None:
        """Take what the present slot weighs among the slots of its step. Raises ConfigError if that comes too late."""
        self._refuse_outside_the_slot("session.weight()")
        self.measures.weigh(weight)
        self.reducer.weigh(weight)

    def _refuse_outside_the_slot(self, call: str) -> None:
        if self.slot is None:
            raise ConfigError(f"{call} came outside the loop over the prepared loader: call it for a slot, before its step")
        if len(self._stepped) == len(self.inner_steps):
            raise ConfigError(
                f"{call} came after optimizer.step(), when the mean over the step's slots is made already: call it before"
            )

    # -- what the optimizer asks -----------------------------------------------------------------------------------

    def optimizer_step(self, index: int) -> None:
        """User code called step() of one optimizer; the last of them ends the slot, and perhaps the step."""
        slot = self.slot
        if slot is None:
            raise ProtocolError(
                "optimizer.step() was called outside the prepared loader's loop: step only inside `for ... in loader`"
            )
        self._stepped.add(index)
        if len(self._stepped) < len(self.inner_steps):
            return
        if not slot.counts:
            # A joiner's own weights do not matter, since it is given the state; its optimizer's memory does: pages that
            # are touched now need not be touched while its peers wait. They need not wait for the word until then: what
            # may take long the first time (fetching, compiling) is behind it.
            self._say_warm()
            if self.zero is not None:
                self.zero.expect(self.coordinator.settings.rank, self.coordinator.settings.world_size)
            for inner in self._warm_steps:
                inner()
            return
        if slot.slot in self.reducer.remaining_slots():
            self._end_slot()
        else:
            self.reducer.discard_slot()
        if slot.is_last:
            self._commit_step()

    def clip(self, request: Callable[[], None]) -> None:
        """Remember a clipping: it is done when the step commits, since until then peers may be reading the gradient."""
        if self.slot is not None and self.slot.counts and self.slot.is_last:
            self.clips.append(request)

    def _commit_step(self) -> None:
        """Reduce, vote and commit the step in progress; on a broken world regroup and try again.

        Returns without a commit when the regrouped world gives this worker something to do before it.
        """
        step = self.step
        while True:
            try:
                if self._try_commit(step):
                    return
                reason = "sealed"
            except CollectiveAborted as error:
                reason = str(error)
                self.coordinator.feed(CollectiveBroke(reason))
            if self._regroup(step) or self._donate or self.reducer.remaining_slots() or self._must_settle():
                return  # a joiner is given the state at the next fetch, where all who give it are at the same point

    def _try_commit(self, step: int) -> bool:
        group = self.group
        assert group is not None and self.plan is not None
        with self._waiting():
            reduced = self.reducer.finish(self._divisor())
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
            presence=self.reducer.presence(),
            measures_hash=zlib.crc32(repr(self.measures.agreement).encode()),
            snapshots=self.snapshots.vote(step, self.plan, time.monotonic()),
        )
        with self._waiting():
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

    def _groups_hash(self) -> int:
        """Hash of what the optimizers are about to do; it must be equal on all workers."""
        groups = [
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            for optimizer in self.parts.optimizers.values()
        ]
        return zlib.crc32(repr(groups).encode())

    def _apply(self, step: int, presence: Sequence[bool], *, commit: bool) -> None:
        reduced = self.reduced
        assert reduced is not None and self.plan is not None
        if self.zero is not None:
            self.zero.check(self.rank, self.plan.world_size)
        self.snapshots.finish()
        self.reducer.install(presence)
        slots = sum(1 for size in self.sampler.sizes(step) if size)
        reach_inside(FailPoint.APPLYING)
        for deed in (*self.before_clipping, *((*self.clips, *self.inner_steps) if commit else self.on_skip)):
            deed()
        if commit and self.zero is not None:
            self._gather(self.zero)
        if commit:
            self.buffers.commit(reduced.extras[: self.buffers.extras], slots)
        else:
            self.buffers.restore()
        self.measures.commit(reduced.extras[self.buffers.extras :])
        if self._record is not None:
            mine = {slot: self.sampler.ids(step, slot) for slot in self.own_slots()}
            self._record.write(step, self.plan.generation, mine)
        self.committed, self._committed_plan, self._recorded_dead = step, self.plan, set()
        self.samples += self.sampler.samples(step)
        self.reduced = None
        self.committed_in_slot = True
        self.reducer.clear()
        self.to_announce.append(step)
        self.coordinator.feed(Applied(step))
        self._plan_step()
        self._show()

    def _gather(self, zero: Zero) -> None:
        """Have what the others have updated; only then is the step committed here."""
        assert self.group is not None
        try:
            with self._waiting():
                zero.gather(self.group)
        except CollectiveAborted as error:
            for forget in self.on_abandon:
                forget()
            self.coordinator.feed(StateSpoilt(str(error)))
            raise

    # -- worlds ----------------------------------------------------------------------------------------------------

    def _regroup(self, step: int) -> bool:
        """Wait for the next world and enter it; returns whether `step` was committed on the way."""
        committed = False
        while True:
            with self._waiting():
                answer = self.coordinator.ask_until(AskWorld(), lambda a: not isinstance(a, Wait))
            match answer:
                case FinishStep(finished):
                    # Others saw this step's verdict pass, and this worker holds the whole reduced gradient.
                    presence = self.reducer.presence_after_reduction()
                    self._apply(finished, presence, commit=self.reducer.output_is_finite())
                    committed = True
                case EnterWorld():
                    self._enter(answer)
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
        if self.zero is not None:
            try:
                with self._waiting():
                    self.zero.enter(world, before, group, self.state)
            except CollectiveAborted as error:
                self.coordinator.feed(StateSpoilt(str(error)))
            except TransferError as error:
                self.coordinator.end_process(str(error))
        self._donate, self._restore = world.joiner_ranks, world.snapshot
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
        slots = [slot for slot, owner in enumerate(plan.owners) if plan.members[owner].worker in lost]
        self._record.write(self.committed, plan.generation, {s: self.sampler.ids(self.committed, s) for s in slots})
        self._recorded_dead |= lost

    def _plan_step(self) -> None:
        """Tell the reducer who owns which slots of the step in progress."""
        assert self.plan is not None and self.group is not None
        self.reducer.plan(self.group, self.plan.owners, self._empty_slots())

    def _pass_state(self, joiners: tuple[int, ...]) -> None:
        """Every rank that holds the state gives a share of it to every rank that does not."""
        assert self.plan is not None and self.group is not None
        donors = tuple(rank for rank in range(self.plan.world_size) if rank not in joiners)
        if self.rank not in joiners:
            try:
                send_state(self.group, self.state, donors, joiners, self.committed)
            except TransferError as error:
                # The joiner knows too, and ends; the fence that follows costs the others one regroup.
                print(f"elastic: {error}", file=sys.stderr, flush=True)
            return
        reach_inside(FailPoint.JOINER_COPYING)
        self._has_state(receive_state(self.group, self.state, donors))

    def _hand_over(self, plan: Plan) -> None:
        """The others go on without this worker, but not without its part of the optimizers' state."""
        assert self.zero is not None and self.plan is not None and self.group is not None
        try:
            with self._waiting():
                self.zero.hand_over(plan, self.plan, self.group, self.committed, self.state)
        except CollectiveAborted as error:
            print(f"elastic: those who stay must restore a snapshot: {error}", file=sys.stderr, flush=True)

    def _must_settle(self) -> bool:
        return self.zero is not None and self.zero.must_settle

    def _settle_shards(self, joins: bool) -> None:
        """Every member takes its part of the optimizers' state in this world."""
        assert self.group is not None and self.zero is not None
        try:
            self.zero.settle(self.group, self.committed, joins, self.state)
        except TransferError as error:
            self.coordinator.end_process(str(error))

    def _read_state(self, snapshot: SnapshotId) -> None:
        """Every rank goes on from the snapshot, which its node's agent has ready."""
        if self.memory is None:
            self.coordinator.end_process(f"{snapshot} is to be restored, but the agent gave no way to its memory")
        try:
            restore(self.state, self.memory, snapshot)
        except (TransferError, Unreachable) as error:
            self.coordinator.end_process(f"the state cannot be restored: {error}")
        self.snapshots.restored(snapshot.step)
        self._has_state(snapshot.step)

    def _has_state(self, committed: int) -> None:
        """The state as of this step has been written into everything that holds it."""
        self.committed = committed
        self._committed_plan = None
        self.buffers.received()
        self.samples = self.sampler.samples_until(self.committed)
        self.coordinator.feed(StateReceived(self.committed))
        self.reducer.clear()
        self._plan_step()
        self._show()

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The training loop is over here: say so, and wait until it is over for all."""
        if self.slot is not None and not self.committed_in_slot:
            self.slot = None  # the loop was left in the middle of a step, which then never happened
            self.reducer.discard_slot()
        self.end_iteration()
        self.coordinator.feed(LoopEnded(self.state.digest_model(), self.samples, bool(self.on_end)))
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
                case EnterWorld():
                    self.coordinator.end_process("its loop has ended, and the world goes back to a step before that")
                case _:
                    raise ProtocolError(f"{answer} after the loop: a fault of the runtime")

    # -- what people see -------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        steps, self.to_announce = self.to_announce, []
        if self.rank == 0:
            for step in steps:
                for callback in self.on_commit:
                    callback(step)

    def on_forward(self, module: nn.Module) -> None:
        """A forward of a prepared model has ended (a module hook): the process makes progress.

        Raises:
            ConfigError: it lies between the steps of two optimizers.
        """
        self.beat()
        if 0 < len(self._stepped) < len(self.inner_steps) and module.training and torch.is_grad_enabled():
            raise ConfigError(
                "a model ran forward after one optimizer's step() and before another's, but all optimizers step together once "
                "the step is reduced: compute all losses first, or train in one optimizer"
            )

    def beat(self) -> None:
        """Count progress."""
        if self._page is not None:
            self._page.beat()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Show that this worker waits for others meanwhile, which is not a hang of its own."""
        if self._page is None:
            yield
            return
        self._page.waits(True)
        try:
            yield
        finally:
            self._page.waits(False)

    def _show(self) -> None:
        if self._page is not None:
            self._page.show(
                generation=self.plan.generation if self.plan is not None else 0,
                committed=self.committed,
                samples=self.samples,
                loss=self.loss,
            )


