"""The steps of a worker that holds one stage of a model: its actions, the reduction over its stage, and its layers' travels.

User code asks for a step as a whole. A step that breaks is computed anew from its first slot in the next world, since what
is in flight belongs to several workers. Between two steps layers may come and go: over the old world's group from those who
leave, over the new one's to whoever is to hold them, and the committed state is then the same as if they had always been
there. This file must never decide who holds what.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from elastic import measures
from elastic.buffers import CommittedBuffers, Rule
from elastic.capture import Capturer, restore
from elastic.control import Coordinator
from elastic.digests import joined_digests
from elastic.domain import LayerError, LayerMove, Plan, PlanKind, Stage
from elastic.engine import LOSS, Engine, Slot
from elastic.errors import CollectiveAborted, ConfigError, ProtocolError, TransferError
from elastic.failpoints import FailPoint, reach, reach_inside
from elastic.group import Group, GroupPart, Work
from elastic.memory import SnapshotMemory
from elastic.payload import Section
from elastic.pipeline.actions import Action, Schedule, make_actions
from elastic.pipeline.copies import Copies
from elastic.pipeline.executor import Batch, Deeds, Executor
from elastic.pipeline.layers import MODEL, Layers, Part, haste, norm_of
from elastic.pipeline.moves import census, fill, handovers
from elastic.pipeline.paths import Visit, all_visits, fault_of
from elastic.pipeline.survey import Survey
from elastic.pipeline.ties import Ties
from elastic.pipeline.travel import Travel
from elastic.progress import Operation, ProgressPage
from elastic.protocol import CollectiveBroke, EnterWorld, LoopEnded, StateReceived
from elastic.records import SampleRecord
from elastic.reduction import Reduced, Reducer, Reduction
from elastic.sampler import SlotSampler
from elastic.seeding import preserved
from elastic.snapshots import SnapshotId
from elastic.timers import Phase
from elastic.transfer import receive_state, serve_state

TAG = 1 << 27
"""Above the tags of activations, and below a verdict's."""

@dataclass(frozen=True, slots=True)
class Parts:
    """What user code handed over.

    Attributes:
        surveys: for each size of a slot what goes between layers.
        loss_fn: of the last output and the target. autocast: the context of each forward.
        max_norm: to which the gradient is clipped; 0 for not at all.
        recompute: whether activations are computed again in the backward.
        stateful, rules: as in `session.prepare`.
    """

    layers: Layers
    surveys: Mapping[int, Survey]
    loss_fn: Callable[..., Tensor]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    schedule: Schedule
    seed: int
    max_norm: float = 0.0
    recompute: bool = False
    stateful: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)


@dataclass(slots=True)
class HeldStage:
    """What a worker has for the layers that it holds, until it holds others.

    Attributes:
        numbers: of the layers. parameters: the numbers of their parameters among those of all layers.
    """

    numbers: range
    parameters: list[int]
    buffers: CommittedBuffers
    reducer: Reducer
    executor: Executor


class PipelineEngine(Engine):
    """Drives the steps of a worker that is part of a pipeline."""

    def __init__(
        self,
        coordinator: Coordinator,
        parts: Parts,
        sampler: SlotSampler,
        *,
        replicas: int,
        reduction: Reduction,
        page: ProgressPage | None,
        record: SampleRecord | None,
        memory: SnapshotMemory | None = None,
        snapshot_every: int = 0,
        measures_norms: bool = False,
    ) -> None:
        super().__init__(coordinator, sampler, page=page, record=record, memory=memory)
        self.parts = parts
        self.layers = parts.layers
        self.batch: Callable[[int, int, tuple[int, ...]], Batch] | None = None
        self.norm = float("nan")
        self._replicas, self._reduction, self._measures_norms = replicas, reduction, measures_norms
        self._stage: HeldStage | None = None
        self.measures.give(LOSS, float("nan"))  # whoever has no slot agrees with the others on what is measured
        self._common = {**parts.stateful, "elastic.measures": self.measures}
        self._travel = Travel(self.layers)
        self._transfers: list[LayerMove] = []
        self._is_recut = False  # and what a lost stage had is yet to come here, or to be made
        self._actions: Sequence[Action] = ()
        self._visits: Sequence[Sequence[Visit]] = ()
        self._made_for: object = None
        self._part: GroupPart | None = None
        self._part_of: Group | None = None
        self._captured: object = None
        self._is_planned = self._is_computed = False
        self._has_left = False  # the loop, for good: nothing moves any more
        self._is_compared = False  # with the others of the stage, in this world
        self._ties = Ties(self.layers)
        self._copies_kept = Copies(self.layers)
        self._totals = torch.zeros(0)  # the norm of each parameter's gradient
        self._measured = torch.zeros(measures.EXTRAS, dtype=torch.float64)
        self._capturer: Capturer | None = None
        if memory is not None and snapshot_every:
            state = self.layers.state((), dict(self._common))
            self._capturer = Capturer(state, memory, buffers=3 if snapshot_every == 1 else 2)
            self.take_snapshots(self._capturer, snapshot_every)

    # -- a step --------------------------------------------------------------------------------------------------------

    def next_step(self) -> bool:
        """Whether there is another step in the data epoch that user code is in; blocks while the world is regrouped.

        Raises SystemExit when the world goes on without this worker.
        """
        if self.committed_in_slot:
            reach(FailPoint.STEP_ENDED)
        self._announce()
        self.beat()
        if self._is_over() and self.coordinator.machine.must_switch:
            return False  # nothing moves before the next loop: until then the world is the one that has trained
        if not self._settle():
            return False
        assert self.plan is not None
        self.committed_in_slot = False
        self._stage_now()
        # In a world that has just been entered nothing is due, so that what is still to follow is not captured.
        self.snapshots.step_ended(self.committed, self.plan.generation, time.monotonic())
        return True

    def run_step(self) -> bool:
        """Compute and commit the step in progress, in as many worlds as it takes.

        Returns False where it never will be: the loop is over for all.
        """
        step = self.step
        while True:
            try:
                self._compute(step)
            except CollectiveAborted as error:
                self._abandon()
                self.coordinator.feed(CollectiveBroke(str(error)))
            else:
                if self._commit_step():
                    return True
            self._abandon()
            if not self._settle():
                return False
            step = self.step

    def _compute(self, step: int) -> None:
        """All of this worker's forwards and backwards."""
        stage, actions = self._stage_now(), self._actions
        assert self.group is not None and self.batch is not None
        sizes = self.sampler.sizes(step)
        several = len(set(sizes) - {0}) > 1
        batch = self.batch

        def fetch(slot: int) -> Batch:
            ids = self.sampler.ids(step, slot)
            self.slot = Slot(step, slot, ids, counts=True, is_last=False)
            self.begin(Operation.DATA)
            read = batch(step, slot, ids)
            self.begin(Operation.FORWARD)
            return read

        def begin(slot: int) -> None:
            if self._page is not None:
                self._page.place(step, slot)
            stage.reducer.begin_slot(slot, float(sizes[slot]) if several else None)

        def end(slot: int, extras: Tensor) -> None:
            if not stage.reducer.end_slot(extras):
                raise ConfigError(
                    f"a parameter of layers {stage.numbers.start} to {stage.numbers.stop - 1} gets its gradient in several "
                    "pieces in one backward: use torch.utils.checkpoint with use_reentrant=False, or recompute=True"
                )

        def measured(slot: int, loss: float | None) -> Tensor:
            self.measures.begin_slot(sizes[slot])
            self.measures.give(LOSS, float("nan") if loss is None else loss)
            return self.measures.of_slot()

        deeds = Deeds(fetch, begin, end, measured, self.beat, self._waiting)
        self.timer.enter(Phase.FORWARD)
        compute_s = stage.executor.run(actions, step, self._visits, sizes, self.group, stage.buffers, deeds)
        if self._page is not None:
            self._page.computed(compute_s)
        self.timer.enter(Phase.REDUCE)
        self.slot = None
        self._is_computed = True

    def _await_state(self) -> None:
        """Have what followed the layers that have moved. Raises CollectiveAborted."""
        if not self._travel.is_under_way:
            return
        try:
            with self._waiting():
                self._travel.arrive()
        except TransferError as error:
            self.coordinator.end_process(str(error))
        if self._travel.takes:
            self.coordinator.feed(StateReceived(self.committed))

    def _compare(self, stage: HeldStage) -> None:
        """Before the first vote in a world: all who hold this stage hold the same, bit by bit. Raises CollectiveAborted."""
        part, group, plan = self._part, self.group, self.plan
        assert group is not None and plan is not None
        with self._waiting():
            unlike = self._copies_kept.differing(group, plan, self.committed)
        if unlike:
            self.coordinator.end_process(
                f"layers {unlike}, which are kept in duplicate, are not what their stage has after step {self.committed}: "
                "restore a snapshot"
            )
        if part is None or part.size == 1:
            return
        crc = self.layers.crc(stage.numbers, stage.buffers.copies)
        mine = torch.tensor([self.committed, crc])
        theirs = {peer: torch.zeros_like(mine) for peer in part.peers}
        with self._waiting():
            works = [part.take(tensor, peer, TAG + 1) for peer, tensor in theirs.items()]
            for peer in part.peers:
                part.post(mine, peer, TAG + 1)
            for work in works:
                work.wait()
        differing = [peer for peer, tensor in theirs.items() if not torch.equal(tensor, mine)]
        if differing:
            self.coordinator.end_process(
                f"layers {stage.numbers.start} to {stage.numbers.stop - 1} are not the same on all workers that hold them after "
                f"step {self.committed} (numbers {differing} of the stage differ from this one): restore a snapshot"
            )

    def _summed_slots(self, step: int) -> list[int]:
        """The slots that have something to give to the sum of a step."""
        return [slot for slot, size in enumerate(self.sampler.sizes(step)) if size]

    def _reducer_options(self) -> dict[str, Any]:
        """What is otherwise than as it mostly is with the sum of a stage."""
        return {}

    def _empty_slots(self) -> tuple[int, ...]:
        return tuple(slot for slot, size in enumerate(self.sampler.sizes(self.step)) if size == 0)

    def _abandon(self) -> None:
        """A step that was begun will be begun again."""
        self.slot = None
        self._is_computed = False
        if self.group is not None and self.group.aborted is not None:
            self._lose_state()
            self.group.drain()
        if self._stage is not None:
            self._stage.reducer.discard_slot()
            self._stage.reducer.clear()
            self._stage.buffers.restore()

    # -- the end of a step ---------------------------------------------------------------------------------------------

    def _reduce(self) -> Reduced:
        stage = self._stage_now()
        self._await_state()
        if not self._is_compared:
            self._compare(stage)
            self._is_compared = True
        reduced = stage.reducer.finish(self._divisor())
        assert self.plan is not None and self.group is not None
        output = dict(zip(stage.parameters, stage.reducer.output(), strict=True))
        present = dict(zip(stage.parameters, stage.reducer.presence_after_reduction(), strict=True))
        self._ties.add_up(self.group, self.plan, output, present)
        self._copies_kept.exchange(self.group, self.plan, {**output, **self._ties.gradients})
        finite = self._exchange_summaries(stage, reduced)
        return Reduced(finite, reduced.complete, reduced.extras)

    def _divisor(self) -> float:
        sizes = [size for size in self.sampler.sizes(self.step) if size]
        return float(len(sizes) if len(set(sizes)) == 1 else sum(sizes))

    def _exchange_summaries(self, stage: HeldStage, reduced: Reduced) -> bool:
        """Have what each stage knows of the whole step: whether its gradient is finite, its norms, the loss.

        All ranks of a stage know the same, and its first one tells it to the others.
        """
        assert self.plan is not None and self.group is not None
        finite = reduced.finite and all(bool(each.isfinite().all()) for each in self._ties.gradients.values())
        parts: list[Tensor] = []
        works = []
        mine = self.plan.stage_of(self.rank)
        for number, other in enumerate(self.plan.stages):
            if number == mine:
                parts.append(self._summary(stage, finite, reduced))
                continue
            counts = len(self.layers.parameter_numbers(range(other.first, other.last))) if self.parts.max_norm else 0
            last = measures.EXTRAS if number == len(self.plan.stages) - 1 else 0
            parts.append(torch.empty(1 + counts + last, dtype=torch.float64))
            works.append(self.group.take(parts[-1], other.ranks[0], TAG))
        if self.plan.stages[mine].ranks[0] == self.rank:
            for number, other in enumerate(self.plan.stages):
                for rank in other.ranks if number != mine else ():
                    self.group.post(parts[mine], rank, TAG)
        for work in works:
            work.wait()
        # A rank of this stage may have looked at other chunks of the gradient than this one: the verdict asks all.
        finite &= all(bool(part[0]) for part in parts)
        self._measured = parts[-1][-measures.EXTRAS :]
        ends = [len(part) for part in parts]
        ends[-1] -= measures.EXTRAS
        self._totals = torch.cat([part[1:end] for part, end in zip(parts, ends, strict=True)])
        return finite

    def _summary(self, stage: HeldStage, finite: bool, reduced: Reduced) -> Tensor:
        norms: list[float] = []
        if self.parts.max_norm:
            later = {self.layers.number_of(use) for uses in self.layers.uses for use in uses[1:]}
            pairs = zip(stage.parameters, stage.reducer.output(), strict=True)
            totals = [self._ties.gradients.get(number, gradient) for number, gradient in pairs]
            found = torch.stack(torch._foreach_norm(totals)).tolist() if totals else []  # one look at the device
            norms = [
                0.0 if number in later else norm for number, norm in zip(stage.parameters, found, strict=True)
            ]
        extras = reduced.extras[stage.buffers.extras :].tolist() if stage.executor.is_last else []
        return torch.tensor([float(finite), *norms, *extras], dtype=torch.float64)

    def _presence(self) -> Sequence[bool]:
        return self._on_all(self._stage_now().reducer.presence())

    def _presence_after_reduction(self) -> Sequence[bool]:
        return self._on_all(self._stage_now().reducer.presence_after_reduction())

    def _on_all(self, flags: Sequence[bool]) -> list[bool]:
        """Flags of this stage's parameters among those of all."""
        presence = [False] * self.layers.count_of_parameters
        for number, flag in zip(self._stage_now().parameters, flags, strict=True):
            presence[number] = flag
        for number, flag in self._ties.presence.items():
            presence[number] |= flag
        return presence

    def _output_is_finite(self) -> bool:
        assert self.reduced is not None
        return self.reduced.finite

    def _groups_hash(self) -> int:
        return 0  # layers may have optimizers of different settings; those of one layer are one worker's, or copies

    def _update(self, step: int, reduced: Reduced, presence: Sequence[bool], *, commit: bool) -> None:
        stage = self._stage_now()
        tied: dict[int, bool] = {}
        for uses in self.layers.uses:
            numbers = [self.layers.number_of(use) for use in uses]
            tied |= dict.fromkeys(numbers, any(presence[number] for number in numbers))
        after_ties = [tied.get(number, present) for number, present in enumerate(presence)]
        stage.reducer.install([after_ties[number] for number in stage.parameters])
        parameters = [p for number in stage.numbers for p in self.layers[number].parameters()]
        for number, parameter in zip(stage.parameters, parameters, strict=True):
            if number in self._ties.gradients and parameter.grad is not None:
                parameter.grad = self._ties.gradients[number]
        reach_inside(FailPoint.APPLYING)
        assert self.plan is not None
        copied = self.plan.copied_by(self.rank)
        kept_up = self._copies_kept.install(self.plan, self.rank, after_ties)
        if commit:
            self._clip([*parameters, *kept_up])
            if self._measures_norms and self._page is not None:
                self._page.reduced(norm_of(parameters))
            for number in (*stage.numbers, *copied):
                self.layers[number].step(self._haste(number, step))
            stage.buffers.commit(reduced.extras[: stage.buffers.extras], self._summed_slots(step))
        else:
            stage.buffers.restore()
        self.measures.commit(self._measured)
        for number in (*stage.numbers, *copied):
            self.layers[number].schedule()
        self._ties.forget()
        self._is_computed = False

    def _haste(self, number: int, step: int) -> float:
        """By how much faster a layer of this plan learns."""
        assert self.plan is not None
        since = next((each.step for each in self.plan.rebuilt if each.layer == number), None)
        return 1.0 if since is None else haste(step, since)

    def _clip(self, parameters: Sequence[nn.Parameter]) -> None:
        """Scale the gradient if its norm over the whole model is too large, as `clip_grad_norm_` does."""
        if not self.parts.max_norm:
            return
        self.norm = float(torch.linalg.vector_norm(self._totals))
        factor = min(1.0, self.parts.max_norm / (self.norm + 1e-6))
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _forget_step(self) -> None:
        self._is_computed = False
        if self._stage is not None:
            self._stage.reducer.clear()

    def _plan_step(self) -> None:
        self._is_planned = False

    def _has_more_to_do(self) -> bool:
        return not self._is_computed

    # -- the state -----------------------------------------------------------------------------------------------------

    def _stage_now(self) -> HeldStage:
        """What belongs to the layers that this worker holds in the present world, ready for the step in progress."""
        if self._is_planned and self._stage is not None:
            return self._stage
        plan, group = self.plan, self.group
        assert plan is not None and group is not None
        numbers, place = plan.layers_of(self.rank), plan.stage_of(self.rank)
        ranks, empty = plan.stages[place].ranks, self._empty_slots()
        stage = self._stage
        if stage is None or stage.numbers != numbers:
            stage = self._stage = self._make_stage(numbers)
        turned = stage, plan
        if self._capturer is not None and self._captured != turned:
            state = self.layers.state(numbers, dict(self._common), stage.buffers.copies)
            self._capturer.turn_to(state, Section(place, ranks))
            self._captured = turned
        if self._part is None or self._part_of is not group:
            self._part, self._part_of = GroupPart(group, ranks), group
        if self._made_for != (plan, empty):
            paths = plan.all_paths()
            self._actions = make_actions(plan.stages, plan.all_routes(), self.parts.schedule, empty, paths)[self.rank]
            self._visits = all_visits(plan.stages, plan.slots, paths)
            self._made_for = plan, empty
        summed = self._summed_slots(self.step)
        absent = [slot for slot in range(plan.slots) if slot not in summed]
        stage.reducer.plan(self._part, [ranks.index(route[place]) for route in plan.all_routes()], absent)
        self._is_planned = True
        return stage

    def _make_stage(self, numbers: range) -> HeldStage:
        if self._stage is not None:
            self._stage.reducer.close()
        parameters = [p for number in numbers for p in self.layers[number].parameters()]
        known = {f"{MODEL}.{number}." for number in numbers}
        rules = {name: rule for name, rule in self.parts.rules.items() if any(name.startswith(k) for k in known)}
        buffers = CommittedBuffers(self.layers.models(numbers), self.sampler.slots, rules)
        reducer = Reducer(
            parameters,
            extras=buffers.extras + measures.EXTRAS,
            on_progress=self.beat,
            **{
                "replicas": self._replicas,
                "reduction": self._reduction,
                "shared": self.coordinator.settings.shares_memory,
                "in_place": True,
                **self._reducer_options(),
            },
        )
        parts = self.parts
        executor = Executor(
            *(self.layers, numbers, parts.surveys, parts.loss_fn, parts.autocast, parts.seed), recompute=parts.recompute
        )
        return HeldStage(numbers, self.layers.parameter_numbers(numbers), buffers, reducer, executor)

    def _drop_stage(self) -> None:
        """The layers' tensors are others from now on."""
        if self._stage is not None:
            self._stage.reducer.close()
        self._stage = None

    def _enter_state(self, world: EnterWorld, before: Plan | None, group: Group | None) -> None:
        plan, joiners = world.plan, world.joiner_ranks
        if fault := census(plan, len(self.layers)):
            raise ProtocolError(f"the plan of generation {plan.generation} cannot be: {fault}; a fault of the runtime")
        if fault := self._fault_of_paths(plan):
            raise ConfigError(fault)
        own = plan.held_by(world.rank)
        self._transfers, self._is_recut, self._is_computed, self._is_compared = [], False, False, False
        self._lose_state()
        if self._has_left and world.snapshot is None and not plan.is_recut:
            return
        self._is_recut = plan.is_recut
        if plan.is_recut:
            if world.rank in joiners:
                self._drop_stage()
                self.layers.keep(())
            self._transfers = list(plan.moves)  # survivors hold what they held
            return
        if before is not None and plan.kind is PlanKind.SWITCH and world.rank not in joiners:
            assert group is not None
            self._travel.move(group, handovers(before, plan), self.committed, self._copies())
        else:
            if world.snapshot is not None or world.rank in joiners:
                self._drop_stage()
            elif before is not None and (missing := set(own) - {layer.number for layer in self.layers.held}):
                raise ProtocolError(f"layers {sorted(missing)} are nowhere to be had in generation {plan.generation}")
            self.layers.hold(own)
            self.layers.keep(own)
        # In a first world nobody needs to be given layers: all were born with the same.
        if plan.kind is PlanKind.SWITCH:
            self._transfers = list(plan.moves)
        elif plan.kind is PlanKind.FENCE and world.snapshot is None:
            self._transfers = list(fill(plan, joiners))

    def _fault_of_paths(self, plan: Plan) -> str:
        """Why slots cannot go the ways of a plan, in words; "" if they can."""
        for path in plan.paths:
            if fault := fault_of(path.layers, len(self.layers)):
                return f"a way through the layers cannot be: {fault}; a fault of the runtime"
            for before, after in pairwise(path.layers):
                for survey in self.parts.surveys.values():
                    given, taken = survey.boundaries[before], survey.boundaries[after - 1]
                    if [(spec.shape, spec.dtype) for spec in given] != [(spec.shape, spec.dtype) for spec in taken]:
                        return (
                            f"a slot would go from {self.layers[before].label} to {self.layers[after].label}, which takes "
                            f"{', '.join(map(str, taken))} and would be given {', '.join(map(str, given))}: layers can be "
                            "left out or change places only where all pass on alike (--swap-ends, --skip-ratio)"
                        )
        return ""

    def _hand_over_state(self, plan: Plan, before: Plan, group: Group) -> None:
        if not self._has_left:
            self._travel.move(group, handovers(before, plan), self.committed, self._copies())

    def _copies(self) -> Mapping[str, Tensor]:
        """The committed buffers of the layers that are held."""
        return {} if self._stage is None else self._stage.buffers.copies

    def _lose_state(self) -> None:
        """What follows the layers is not waited for any more: the group that it comes by is over."""
        with contextlib.suppress(CollectiveAborted, TransferError):
            self._travel.arrive()

    def _pass_state(self, joiners: tuple[int, ...]) -> int | None:
        assert self.plan is not None and self.group is not None
        donors = tuple(rank for rank in range(self.plan.world_size) if rank not in joiners)
        common = self.layers.state((), dict(self._common))
        received = None
        if self.rank in joiners:
            reach_inside(FailPoint.JOINER_COPYING)
            received = self.committed = receive_state(self.group, common, donors)
        else:
            serve_state(self.group, common, donors, joiners, self.committed)
        self._settle_state(self.rank in joiners)
        return received

    def _must_settle(self) -> bool:
        return bool(self._transfers) or self._is_recut

    def _settle_state(self, joins: bool) -> None:
        assert self.plan is not None and self.group is not None
        transfers, self._transfers = self._transfers, []
        blends, self._is_recut = self.plan.blends if self._is_recut else (), False
        if transfers or blends:
            reach_inside(FailPoint.LAYERS_MOVING)
        # A fence continues a step, and needs all; whoever comes in by one is told apart by what it has.
        follows = self.plan.kind is PlanKind.SWITCH
        part = Part.MODEL if follows else Part.ALL
        took = self._travel.move(self.group, transfers, self.committed, self._copies(), part)
        if follows:
            self._travel.follow(self.group, transfers, self.committed)
        took |= self._travel.blend(self.group, blends, self.plan, self.committed)
        own = self.plan.held_by(self.rank)
        if took or [layer.number for layer in self.layers.held] != sorted(own):
            self._drop_stage()
            self.layers.hold(own)
            self.layers.keep(own)
        if took and not joins and not follows:
            self.coordinator.feed(StateReceived(self.committed, self._layer_errors()))

    def _layer_errors(self) -> tuple[LayerError, ...]:
        return self._travel.errors

    def _read_snapshot(self, memory: SnapshotMemory, snapshot: SnapshotId) -> None:
        assert self.plan is not None
        restore(self.layers.state(sorted(self.plan.held_by(self.rank)), dict(self._common)), memory, snapshot)

    def _take_over(self) -> None:
        self._drop_stage()  # committed copies of buffers, too, are made anew from what was written

    # -- beside training -----------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch) -> float:
        """Return a batch's loss, everywhere; NaN where the world broke."""
        if (self.plan is None and not self._settle()) or self._is_recut:
            return float("nan")
        stage = self._stage_now()
        assert self.plan is not None and self.group is not None
        group = self.group
        route = [self._holders(each)[0] for each in self.plan.stages]
        value = torch.zeros(1, dtype=torch.float64)
        try:
            with self._waiting(Operation.EVALUATION), preserved():
                if self.rank in route:
                    loss = stage.executor.evaluate(batch, group, route, self.rank)
                    if loss is not None:
                        value[0] = loss
                self._spread(group, [value], route[-1], self._others(route[-1:]), TAG)
        except CollectiveAborted as error:
            self._broke(group, error)
            return float("nan")
        return float(value[0])

    def whole_state(self) -> dict[str, Tensor]:
        """Return the tensors of all layers, on the CPU. Raises CollectiveAborted."""
        if self.plan is None:
            self._settle()
        if self._is_recut:
            raise CollectiveAborted("A stage is lost, and made from others before the next step: ask again after it.")
        self._stage_now()
        assert self.plan is not None and self.group is not None
        group = self.group
        state: dict[str, Tensor] = {}
        mine = self.plan.stage_of(self.rank)
        try:
            with self._waiting():
                for place, stage in enumerate(self.plan.stages):
                    others = self._others(stage.ranks)
                    for number in range(stage.first, stage.last):
                        found = self.layers[number].module.state_dict()
                        tensors = [
                            t.detach().cpu().clone() if place == mine else torch.empty(t.shape, dtype=t.dtype)
                            for t in found.values()
                        ]
                        self._spread(group, tensors, self._holders(stage)[0], others, TAG)
                        state |= {self.layers.key_of(number, key): t for key, t in zip(found, tensors, strict=True)}
        except CollectiveAborted as error:
            self._broke(group, error)
            raise
        return state

    def _holders(self, stage: Stage) -> list[int]:
        """The ranks of a stage that have its layers: a joiner is given them when the next loop begins."""
        return [rank for rank in stage.ranks if rank not in self._donate]

    def _others(self, ranks: Sequence[int]) -> list[int]:
        """All other ranks that take part in what is done beside training."""
        assert self.plan is not None
        return [rank for rank in range(self.plan.world_size) if rank not in ranks and rank not in self._donate]

    def _spread(self, group: Group, tensors: Sequence[Tensor], source: int, targets: Sequence[int], tag: int) -> None:
        """Give tensors from one rank to others."""
        works: list[Work] = []
        for place, tensor in enumerate(tensors):
            if self.rank == source:
                works += [group.send(tensor.contiguous(), rank, tag + place) for rank in targets]
            elif self.rank in targets:
                works.append(group.recv(tensor, source, tag + place))
        for work in works:
            work.wait()

    def _broke(self, group: Group, error: CollectiveAborted) -> None:
        group.drain()
        self.coordinator.feed(CollectiveBroke(str(error)))

    # -- the end -------------------------------------------------------------------------------------------------------

    def _leave_loop(self) -> None:
        self._make_lost_layers()
        self._has_left = True
        self._lose_state()
        self._announce()

    def _entered_after_loop(self) -> None:
        if self._is_recut:
            self._make_lost_layers()
            self.coordinator.feed(self._loop_ended())

    def _make_lost_layers(self) -> None:
        """After the last step nobody begins another one, so all do it when they leave, or have left."""
        if not self._is_recut:
            return
        try:
            with self._waiting():
                self._settle_state(False)
        except (CollectiveAborted, TransferError) as error:
            self.coordinator.end_process(f"a lost stage could not be made from others: {error}")

    def _loop_ended(self) -> LoopEnded:
        """Of a stage the digest of each layer; the controller puts them together."""
        assert self.plan is not None
        copies = self._stage_now().buffers.copies
        digests = {
            number: self.layers.digest(number, {k: v for k, v in copies.items() if k.startswith(f"{MODEL}.{number}.")})
            for number in self.plan.layers_of(self.rank)
        }
        return LoopEnded(joined_digests(digests), self.samples, bool(self.on_end))

    def recorded_slots(self, step: int, plan: Plan, rank: int) -> list[int]:
        return [slot for slot in range(plan.slots) if plan.route(slot)[-1] == rank]

    def own_slots(self) -> list[int]:
        if self.plan is None:
            return []
        return [s for s in range(self.plan.slots) if self.rank in (self.plan.route(s)[0], self.plan.route(s)[-1])]
