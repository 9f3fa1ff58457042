"""Pipelines that train by themselves for some steps and then agree: the rounds of DiLoCo, stage by stage.

A round is a step of the job. In each of its local steps the slots go through the stages, and every worker updates its layers with
the gradients of the slots that came to it, and of no others. What a worker's layers have moved is then summed over the workers of
their stage, and the step of the outer optimizer is the committed one. Only the parameters between two rounds, and what the outer
optimizer has of them, are ever moved, captured or compared: inner optimizers are a worker's own, and begin anew with layers that
come to it. A round that breaks is computed again from its begin.

With random routing a slot goes to another worker of the next stage in each local step, so that workers of a stage learn from each
other's samples and stay nearer together (section 3 of arXiv 2506.10911): drawn from the seed, the world and the local step.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elastic import measures
from elastic.buffers import CommittedBuffers
from elastic.domain import Plan, Stage
from elastic.engine import LOSS, Slot
from elastic.errors import ConfigError
from elastic.failpoints import FailPoint, reach
from elastic.group import Group, GroupPart
from elastic.pipeline.actions import ActionKind, Route, make_actions
from elastic.pipeline.engine import TAG, HeldStage, PipelineEngine
from elastic.pipeline.executor import Batch, Deeds
from elastic.pipeline.layers import Layer, OptimizerFactory, SchedulerFactory
from elastic.pipeline.paths import all_visits
from elastic.progress import Operation
from elastic.quantize import Code
from elastic.reduction import Reducer, Reduction
from elastic.sampler import Permutation, SlotSampler
from elastic.sync import DiLoCo

TAG_NORM = TAG + 2
_RECEIVES = (ActionKind.RECEIVE_INPUT, ActionKind.RECEIVE_GRADIENT)


@dataclass(frozen=True, slots=True)
class Inner:
    """What a worker's local steps are made of.

    Attributes:
        optimizer_fn, scheduler_fn: as in `session.pipeline`; a scheduler takes a step with each local one.
        max_norm: to which the gradient of a local step is clipped, over one worker of each stage; 0 for not at all.
        random: whether slots are routed anew in each local step.
    """

    optimizer_fn: OptimizerFactory
    scheduler_fn: SchedulerFactory | None
    max_norm: float = 0.0
    random: bool = False


def outer_of(sync: DiLoCo) -> OptimizerFactory:
    """Return what makes the outer optimizer of a layer."""
    return functools.partial(torch.optim.SGD, lr=sync.outer_lr, momentum=sync.momentum, nesterov=sync.nesterov)


def pieces_of(ids: Sequence[int], batch_size: int) -> list[tuple[int, ...]]:
    """Return what a slot has in each local step; of a slot that is not full, fewer local steps."""
    return [tuple(ids[start : start + batch_size]) for start in range(0, len(ids), batch_size)]


def local_steps_before(sampler: SlotSampler, step: int, batch_size: int) -> int:
    """Return the local steps of all rounds before one: an epoch's last round may have fewer than the others."""

    def steps_of(number: int) -> int:
        return -(-max(sampler.sizes(number)) // batch_size)

    per_epoch = sampler.steps_per_epoch
    epochs, rounds = divmod(step - 1, per_epoch)
    return epochs * ((per_epoch - 1) * steps_of(1) + steps_of(per_epoch)) + rounds * steps_of(1)


def random_routes(stages: Sequence[Stage], slots: int, key: str) -> list[tuple[int, ...]]:
    """Draw for each slot a rank at each stage, such that no two ranks of a stage differ by more than one slot."""
    columns = []
    for number, stage in enumerate(stages):
        order = Permutation(slots, f"elastic.routes {key} {number}".encode()).take(0, slots)
        column = [0] * slots
        for place, slot in enumerate(order):
            column[slot] = stage.ranks[place % len(stage.ranks)]
        columns.append(column)
    return list(zip(*columns, strict=True))


def partner_in(stage: Stage, own: Stage, rank: int) -> int:
    """Return the rank of another stage that stands beside one of the own stage: alike for those who ask and are asked."""
    return stage.ranks[own.ranks.index(rank) * len(stage.ranks) // len(own.ranks)]


class RoundsEngine(PipelineEngine):
    """Drives the rounds of a worker that is part of a pipeline.

    Args:
        sync: how workers of a stage agree. inner: what local steps are made of. Others as of `PipelineEngine`.
    """

    def __init__(self, *args: Any, sync: DiLoCo, inner: Inner, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sync, self.inner = sync, inner
        self._batch_size = self.sampler.batch_size // sync.every
        self._inner: dict[int, tuple[list[nn.Parameter], Optimizer, Any]] = {}  # layer -> its parameters and what trains them
        self._local: Reducer | None = None
        self._local_buffers: CommittedBuffers | None = None
        self._local_of: object = None  # the stage that these are of
        self._phi: list[Tensor] = []  # the committed parameters, while local steps are taken
        self._begun: dict[int, Any] = {}  # layer -> what its schedule was as the round began
        self._samples_here, self._computed_s = 0, 0.0  # of the round, by this worker
        if self.layers.uses:
            names = ", ".join(f"{use.layer}.{use.name}" for use in self.layers.uses[0])
            raise ConfigError(
                f"{names} are one parameter, whose gradients would have to be added up over stages in each local step: untie "
                "them, or leave out sync="
            )

    # -- what is read --------------------------------------------------------------------------------------------------

    def pieces(self, step: int, slot: int) -> list[tuple[int, tuple[int, ...]]]:
        batches = pieces_of(self.sampler.ids(step, slot), self._batch_size)
        return [(number * self.sampler.slots + slot, ids) for number, ids in enumerate(batches)]

    def own_slots(self) -> list[int]:
        return [] if self.inner.random else super().own_slots()  # whose they are is drawn when they are due

    # -- local steps ---------------------------------------------------------------------------------------------------

    def _compute(self, step: int) -> None:
        """All local steps of the round, and what they come to. Raises CollectiveAborted."""
        stage = self._stage_now()
        plan, group = self.plan, self.group
        assert plan is not None and group is not None
        if plan.paths:
            raise ConfigError(
                "--swap-ends and --skip-ratio send slots through layers in another order, and with sync= workers take steps by "
                "themselves: leave one out"
            )
        local, buffers = self._local_parts(stage)
        parameters = self._parameters(stage)
        self._phi = [parameter.detach().clone() for parameter in parameters]
        self._begun, self._samples_here, self._computed_s = {}, 0, 0.0
        self._inner = {number: each for number, each in self._inner.items() if number in stage.numbers}
        for number in stage.numbers:
            self._begin_layer(self.layers[number], step)
        buffers.adopt()
        each = [pieces_of(self.sampler.ids(step, slot), self._batch_size) for slot in range(plan.slots)]
        losses: list[tuple[float, int]] = []
        for number in range(max(map(len, each))):
            batches = [batches[number] if number < len(batches) else () for batches in each]
            self._local_step(stage, local, buffers, step, number, batches, losses)
            reach(FailPoint.LOCAL_STEP)
        if self._page is not None:
            self._page.computed(self._computed_s)
        self._give(stage, parameters, losses)
        self._is_computed = True

    def _parameters(self, stage: HeldStage) -> list[nn.Parameter]:
        return [p for number in stage.numbers for p in self.layers[number].parameters()]

    def _local_parts(self, stage: HeldStage) -> tuple[Reducer, CommittedBuffers]:
        if self._local_of is not stage:
            if self._local is not None:
                self._local.close()
            names = {f"model.{number}." for number in stage.numbers}
            rules = {name: rule for name, rule in self.parts.rules.items() if name.startswith(tuple(names))}
            self._local_buffers = CommittedBuffers(self.layers.models(stage.numbers), self.sampler.slots, rules)
            self._local = Reducer(
                self._parameters(stage),
                replicas=1,
                extras=self._local_buffers.extras + measures.EXTRAS,
                on_progress=self.beat,
            )
            self._local_of = stage
        assert self._local is not None and self._local_buffers is not None
        return self._local, self._local_buffers

    def _begin_layer(self, layer: Layer, step: int) -> None:
        """Have an inner optimizer for a layer, with the schedule of the round's begin."""
        parameters = layer.parameters()
        if not parameters:
            return
        known = self._inner.get(layer.number)
        if known is None or any(mine is not theirs for mine, theirs in zip(known[0], parameters, strict=True)):
            optimizer = self.inner.optimizer_fn(parameters)
            layer.check_optimizer(optimizer)
            scheduler = None if self.inner.scheduler_fn is None else self.inner.scheduler_fn(optimizer)
            if scheduler is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that no step of the optimizer came before
                    for _ in range(local_steps_before(self.sampler, step, self._batch_size)):
                        scheduler.step()
            known = self._inner[layer.number] = parameters, optimizer, scheduler
        _, optimizer, scheduler = known
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        self._begun[layer.number] = groups, None if scheduler is None else copy.deepcopy(scheduler.state_dict())

    def _local_step(
        self,
        stage: HeldStage,
        local: Reducer,
        buffers: CommittedBuffers,
        step: int,
        number: int,
        batches: Sequence[tuple[int, ...]],
        losses: list[tuple[float, int]],
    ) -> None:
        plan, group, batch = self.plan, self.group, self.batch
        assert plan is not None and group is not None and batch is not None
        place, ordinal = plan.stage_of(self.rank), local_steps_before(self.sampler, step, self._batch_size) + number + 1
        sizes = [len(ids) for ids in batches]
        empty = tuple(slot for slot, size in enumerate(sizes) if not size)
        routes: Sequence[Route] = plan.all_routes()
        if self.inner.random:
            routes = random_routes(plan.stages, plan.slots, f"{self.sampler.seed} {plan.generation} {ordinal}")
        actions = make_actions(plan.stages, routes, self.parts.schedule, empty)[self.rank]
        mine = [slot for slot, route in enumerate(routes) if route[place] == self.rank and sizes[slot]]
        self._samples_here += sum(sizes[slot] for slot in mine)
        begun = group.posted
        if mine:
            others = tuple(slot for slot in range(plan.slots) if slot not in mine)
            local.plan(GroupPart(group, (self.rank,)), [0] * plan.slots, others)
        several = len({sizes[slot] for slot in mine}) > 1

        def fetch(slot: int) -> Batch:
            self.slot = Slot(step, slot, batches[slot], counts=True, is_last=False)
            self.begin_slot(step, slot)
            read = batch(step, number * plan.slots + slot, batches[slot])
            self.begin(Operation.FORWARD)
            return read

        def begin(slot: int) -> None:
            local.begin_slot(slot, float(sizes[slot]) if several else None)

        def end(slot: int, extras: Tensor) -> None:
            local.end_slot(extras)

        def measured(slot: int, loss: float | None) -> Tensor:
            if loss is not None:
                losses.append((loss, sizes[slot]))
            return torch.zeros(measures.EXTRAS, dtype=torch.float64)

        deeds = Deeds(fetch, begin, end, measured, self.beat, self._waiting)
        visits = all_visits(plan.stages, plan.slots)
        self._computed_s += stage.executor.run(actions, ordinal, visits, sizes, group, buffers, deeds)
        self.slot = None
        if mine:
            reduced = local.finish(float(sum(sizes[slot] for slot in mine) if several else len(mine)))
            local.install(local.presence_after_reduction())
            buffers.commit(reduced.extras[: buffers.extras], mine)
        self._clip_locally(group, plan, self._parameters(stage))
        for layer in stage.numbers:
            self._step_layer(layer)
        if mine:
            local.clear()
        # Whoever has sent something in this local step has received all that was sent to it in those before.
        group.forget_posted_to({action.peer for action in actions if action.kind in _RECEIVES}, begun)

    def _step_layer(self, number: int) -> None:
        if number not in self._inner:
            return
        parameters, optimizer, scheduler = self._inner[number]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        for parameter in parameters:
            parameter.grad = None

    def _clip_locally(self, group: Group, plan: Plan, parameters: Sequence[nn.Parameter]) -> None:
        """Clip the gradient of a local step by its norm over this worker's layers and those of one worker of each other stage."""
        if not self.inner.max_norm:
            return
        own = plan.stages[plan.stage_of(self.rank)]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)).double().square().sum().cpu() if gradients else torch.zeros(())
        squares = torch.zeros(len(plan.stages), dtype=torch.float64)
        works = []
        for number, stage in enumerate(plan.stages):
            if stage is own:
                squares[number] = norms
                continue
            for rank in stage.ranks:
                if partner_in(own, stage, rank) == self.rank:
                    group.post(norms.reshape(1).double(), rank, TAG_NORM)
            works.append(group.take(squares[number : number + 1], partner_in(stage, own, self.rank), TAG_NORM))
        with self._waiting():
            for work in works:
                work.wait()
        self.norm = math.sqrt(float(squares.sum()))
        factor = min(1.0, self.inner.max_norm / (self.norm + 1e-6))
        for gradient in gradients:
            gradient.mul_(factor)

    # -- the end of a round --------------------------------------------------------------------------------------------

    def _give(self, stage: HeldStage, parameters: Sequence[nn.Parameter], losses: list[tuple[float, int]]) -> None:
        """What these layers have moved is the gradient of one slot, which stands for all that came here."""
        plan = self.plan
        assert plan is not None
        (slot,) = (slot for slot in self._givers(plan) if plan.route(slot)[plan.stage_of(self.rank)] == self.rank)
        stage.reducer.begin_slot(slot)
        with torch.no_grad():
            for parameter, phi in zip(parameters, self._phi, strict=True):
                parameter.grad = (phi - parameter) * float(self._samples_here)
        counted = sum(size for _, size in losses)
        self.measures.begin_slot(counted)
        self.measures.give(LOSS, math.fsum(loss * size for loss, size in losses) / counted if counted else math.nan)
        stage.reducer.end_slot(torch.cat([stage.buffers.of_slot(slot), self.measures.of_slot()]))
        self._restore_parameters()

    def _restore_parameters(self) -> None:
        """The parameters are the committed ones again."""
        if not self._phi or self._stage is None:
            return
        with torch.no_grad():
            for parameter, phi in zip(self._parameters(self._stage), self._phi, strict=True):
                parameter.copy_(phi)
                parameter.grad = None
        self._phi = []

    def _givers(self, plan: Plan) -> list[int]:
        """The first slot of each rank of this worker's stage."""
        place = plan.stage_of(self.rank)
        first: dict[int, int] = {}
        for slot in range(plan.slots):
            first.setdefault(plan.route(slot)[place], slot)
        return sorted(first.values())

    def _summed_slots(self, step: int) -> list[int]:
        assert self.plan is not None
        return self._givers(self.plan)

    def _divisor(self) -> float:
        return float(self.sampler.samples(self.step))

    def _reducer_options(self) -> dict[str, Any]:
        if not self.sync.quantize:
            return {"in_place": False}
        return {
            "in_place": False,
            "replicas": self.sampler.slots,  # each slot is written in code by itself
            "reduction": Reduction.ORDERED,
            "shared": False,
            "code": Code(self.sync.quantize),
        }

    def _abandon(self) -> None:
        if self._local is not None:
            self._local.discard_slot()
            self._local.clear()
        self._restore_parameters()
        for number, (groups, scheduled) in self._begun.items():
            if number not in self._inner:
                continue
            _, optimizer, scheduler = self._inner[number]
            for mine, theirs in zip(optimizer.param_groups, groups, strict=True):
                mine.update(theirs)
            if scheduler is not None:
                scheduler.load_state_dict(scheduled)
        self._begun = {}
        super()._abandon()

    def _drop_stage(self) -> None:
        self._phi, self._begun = [], {}
        super()._drop_stage()
