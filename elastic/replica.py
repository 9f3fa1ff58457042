"""The step of a worker that holds the whole model: slots, whose gradients are summed over all workers.

User code drives it: the loader's next opens a slot, the optimizer's step ends it, and the step with the last one.
"""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elastic import measures
from elastic.buffers import CommittedBuffers, Rule
from elastic.capture import Capturer, restore
from elastic.control import Coordinator
from elastic.domain import Plan
from elastic.engine import Engine, Slot
from elastic.errors import CollectiveAborted, ConfigError, ProtocolError
from elastic.failpoints import FailPoint, reach, reach_inside
from elastic.group import Group, Messages
from elastic.memory import SnapshotMemory
from elastic.progress import Operation, ProgressPage
from elastic.protocol import EnterWorld, LoopEnded, StateSpoilt, Warmed
from elastic.records import SampleRecord
from elastic.reduction import Reduced, Reducer, Reduction
from elastic.sampler import SlotSampler
from elastic.sharding import OptimizerShards
from elastic.snapshots import SnapshotId
from elastic.state import TrainingState
from elastic.timers import Phase
from elastic.transfer import receive_state, serve_state
from elastic.zero import Zero


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


class ReplicaEngine(Engine):
    """Drives the steps of a worker that is a replica."""

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
        more_extras: int = 0,
    ) -> None:
        super().__init__(coordinator, sampler, page=page, record=record, memory=memory)
        self.parts = parts
        self.buffers = CommittedBuffers(parts.models, sampler.slots, parts.rules)
        self.zero = Zero(parts.optimizers) if parts.shards_optimizer else None
        shards = self.zero.shards if self.zero is not None else None
        self.state = parts.state(self.measures, self.buffers.copies, shards)
        self._make_reducer = functools.partial(
            Reducer,
            replicas=replicas,
            reduction=reduction,
            extras=self.buffers.extras + measures.EXTRAS + more_extras,
            shared=coordinator.settings.shares_memory,
            on_progress=self._gradient_came,
        )
        self.reducer = self._make_reducer(parts.parameters)
        if memory is not None and snapshot_every:
            self.take_snapshots(Capturer(self.state, memory, buffers=3 if snapshot_every == 1 else 2), snapshot_every)
        self.clips: list[Callable[[], None]] = []
        self.inner_steps: list[Callable[[], object]] = [self._inner_step(each) for each in parts.optimizers.values()]
        self.before_clipping: list[Callable[[], object]] = []  # what reduced gradients go through first (unscaling)
        self.on_skip: list[Callable[[], object]] = []  # what a step without an update calls in place of the optimizers
        self.on_abandon: list[Callable[[], object]] = []  # what forgets an update that was begun and never completed
        self._warm_steps = tuple(self.inner_steps)
        self._stepped: set[int] = set()
        self._must_warm = joins

    def _inner_step(self, optimizer: Optimizer) -> Callable[[], object]:
        """What updates the parameters, or this worker's part of them."""
        return optimizer.step if self.zero is None else self.zero.shards.stepping(optimizer, optimizer.step)

    # -- what the loader asks --------------------------------------------------------------------------------------

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

    def next_slot(self) -> Slot | None:
        """Return the next slot of the data epoch that user code is in, or None when the next step belongs to another.

        Blocks while the world is being regrouped. Raises SystemExit when the world goes on without this worker.
        """
        self.end_iteration()
        self.beat()
        if self._must_warm:
            return self._open_slot(self._throwaway(counts=False))
        if not self._settle():
            return None
        assert self.plan is not None
        self.snapshots.step_ended(self.committed, self.plan.generation, time.monotonic())
        return self._open_slot(self._choose())

    def recorded_slots(self, step: int, plan: Plan, rank: int) -> list[int]:
        return [slot for slot, owner in enumerate(self._owners(step, plan)) if owner == rank]

    def _owners(self, step: int, plan: Plan) -> Sequence[int]:
        """The rank that computes each slot of the step in progress, or has of the newest one, in a world."""
        return plan.owners

    def _throwaway(self, *, counts: bool) -> Slot:
        """Some slot of the step in progress that is computed for nothing."""
        slot = next(slot for slot, size in enumerate(self.sampler.sizes(self.step)) if size)
        return Slot(self.step, slot, self.sampler.ids(self.step, slot), counts=counts, is_last=True)

    def _choose(self) -> Slot:
        remaining = self.reducer.remaining_slots()
        if not remaining:
            # Nothing to compute (an epoch's short last step, or all was kept through a regroup), but the code behind
            # optimizer.step() must run for this step too: a throwaway slot carries it.
            return self._throwaway(counts=True)
        slot = remaining[0]
        return Slot(self.step, slot, self.sampler.ids(self.step, slot), counts=True, is_last=len(remaining) == 1)

    def _open_slot(self, slot: Slot) -> Slot:
        self.slot = slot
        self.begin_slot(slot.step, slot.slot)
        self._stepped.clear()
        self.measures.begin_slot(len(slot.ids))
        self.committed_in_slot = False
        self.clips = []
        self.buffers.begin_slot()
        real = slot.counts and slot.slot in self.reducer.remaining_slots()
        sizes = set(self.sampler.sizes(slot.step)) - {0}
        self.reducer.begin_slot(slot.slot if real else None, float(len(slot.ids)) if real and len(sizes) > 1 else None)
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
        self.reducer.end_slot(torch.cat([self.buffers.of_slot(slot.slot), self.measures.of_slot(), *self._more_of_slot()]))

    def _more_of_slot(self) -> Sequence[Tensor]:
        """What else is folded of the present slot, as float64 vectors."""
        return ()

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
            raise ConfigError(
                f"{call} came outside the loop over the prepared loader: call it for a slot, before its step"
            )
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
        if len(self._stepped) == len(self.inner_steps):
            self._end_batch(slot)

    def _end_batch(self, slot: Slot) -> None:
        """All optimizers were stepped: the slot is over, and with the last one the step."""
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
            self.timer.enter(Phase.REDUCE)
            self._end_slot()
            self.timer.enter(Phase.OUTSIDE)
        else:
            self.reducer.discard_slot()
        if slot.is_last:
            self._commit_step()

    @property
    def schedule_steps(self) -> int:
        """How many steps a scheduler takes for the present iteration: as many as the optimizer's step has made updates."""
        return int(self.committed_in_slot)

    def clip(self, request: Callable[[], None]) -> None:
        """Remember a clipping: it is done when the step commits, since until then peers may be reading the gradient."""
        if self.slot is not None and self.slot.counts and self.slot.is_last:
            self.clips.append(request)

    # -- the end of a step -------------------------------------------------------------------------------------------

    def _reduce(self) -> Reduced:
        return self.reducer.finish(self._divisor())

    def _presence(self) -> Sequence[bool]:
        return self.reducer.presence()

    def _presence_after_reduction(self) -> Sequence[bool]:
        return self.reducer.presence_after_reduction()

    def _output_is_finite(self) -> bool:
        return self.reducer.output_is_finite()

    def _forget_step(self) -> None:
        self.reducer.clear()

    def _plan_step(self) -> None:
        assert self.plan is not None and self.group is not None
        group, owners = self._reduction(self.plan, self.group)
        self.reducer.plan(group, owners, self._empty_slots())

    def _reduction(self, plan: Plan, group: Group) -> tuple[Messages, Sequence[int]]:
        """Between whom the step is reduced, and which of them computes each slot."""
        return group, self._owners(self.step, plan)

    def _has_more_to_do(self) -> bool:
        return bool(self.reducer.remaining_slots())

    def _groups_hash(self) -> int:
        groups = [
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            for optimizer in self.parts.optimizers.values()
        ]
        return zlib.crc32(repr(groups).encode())

    def _update(self, step: int, reduced: Reduced, presence: Sequence[bool], *, commit: bool) -> None:
        assert self.plan is not None
        if self.zero is not None:
            self.zero.check(self.rank, self.plan.world_size)
        self.reducer.install(presence)
        slots = [slot for slot, size in enumerate(self.sampler.sizes(step)) if size]
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

    def _gather(self, zero: Zero) -> None:
        """Have what the others have updated; only then is the step committed here."""
        assert self.group is not None
        try:
            with self._waiting(Operation.STATE):
                zero.gather(self.group)
        except CollectiveAborted as error:
            for forget in self.on_abandon:
                forget()
            self.coordinator.feed(StateSpoilt(str(error)))
            raise

    # -- the state ---------------------------------------------------------------------------------------------------

    def _enter_state(self, world: EnterWorld, before: Plan | None, group: Group | None) -> None:
        if self.zero is not None:
            self.zero.enter(world, before, group, self.state)

    def _hand_over_state(self, plan: Plan, before: Plan, group: Group) -> None:
        assert self.zero is not None
        self.zero.hand_over(plan, before, group, self.committed, self.state)

    def _pass_state(self, joiners: tuple[int, ...]) -> int | None:
        assert self.plan is not None and self.group is not None
        donors = self._donors(joiners)
        if self.rank in joiners:
            reach_inside(FailPoint.JOINER_COPYING)
            return receive_state(self.group, self._living_state(), donors)
        if self.rank in donors:
            serve_state(self.group, self._living_state(), donors, joiners, self.committed)
        return None

    def _donors(self, joiners: Sequence[int]) -> tuple[int, ...]:
        """The ranks that give the state to joiners."""
        assert self.plan is not None
        return tuple(rank for rank in range(self.plan.world_size) if rank not in joiners)

    def _living_state(self) -> TrainingState:
        """What a joiner is given."""
        return self.state

    def _must_settle(self) -> bool:
        return self.zero is not None and self.zero.must_settle

    def _settle_state(self, joins: bool) -> None:
        assert self.group is not None and self.zero is not None
        self.zero.settle(self.group, self.committed, joins, self.state)

    def _read_snapshot(self, memory: SnapshotMemory, snapshot: SnapshotId) -> None:
        restore(self.state, memory, snapshot)

    def _take_over(self) -> None:
        self.buffers.received()

    # -- the end -----------------------------------------------------------------------------------------------------

    def _entered_after_loop(self) -> None:
        return

    def _leave_loop(self) -> None:
        if self.slot is not None and not self.committed_in_slot:
            self.slot = None
            self.reducer.discard_slot()
        self.end_iteration()

    def _loop_ended(self) -> LoopEnded:
        return LoopEnded(self.state.digest_model(), self.samples, bool(self.on_end))

    # -- what people see -----------------------------------------------------------------------------------------------

    def _gradient_came(self) -> None:
        self.beat()
        self.begin(Operation.BACKWARD)

    def on_forward(self, module: nn.Module) -> None:
        """A forward of a prepared model has ended (a module hook): the process makes progress.

        Raises:
            ConfigError: it lies between the steps of two optimizers.
        """
        self.beat()
        self.begin(Operation.FORWARD)
        self.timer.ran_forward()
        if 0 < len(self._stepped) < len(self.inner_steps) and module.training and torch.is_grad_enabled():
            raise ConfigError(
                "a model ran forward after one optimizer's step() and before another's, but all optimizers step together once "
                "the step is reduced: compute all losses first, or train in one optimizer"
            )
