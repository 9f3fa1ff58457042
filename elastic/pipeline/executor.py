"""Runs a worker's actions: forwards and backwards of its layers, and the tensors that come and go in between.

Every layer is a graph of its own, and its randomness a function of (seed, step, slot, layer): so no bit depends on where
the model is cut, in which order the slots come, or who runs them. What is sent and received has the shape that the survey
found; nothing is announced. What is posted stays alive until the verdict shows that all have it. This file must never
decide who does what.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elastic.buffers import CommittedBuffers
from elastic.errors import ConfigError
from elastic.group import Group, Work
from elastic.pipeline.actions import Action, ActionKind
from elastic.pipeline.layers import MODEL, Layer, Layers
from elastic.pipeline.paths import Visit
from elastic.pipeline.survey import (
    Boundary,
    Survey,
    Tensors,
    as_tensors,
    buffers_kept,
    entering,
    leaving,
    loss_of,
    run_backward,
)
from elastic.seeding import seed_everything

TAG = 1 << 26
"""Above the tags of a reduction, and below a verdict's."""
_TENSORS_MAX = 64
_HOPS = 8
"""So many hops of a slot have tags of their own: two ranks are not that often neighbours on its way."""
_RECEIVES_AHEAD = 2

Batch = tuple[Tensors, Any]
"""What the first layer is given, and what the loss is."""


@dataclass(slots=True)
class _InFlight:
    """A visit of a slot between its forward and its backward here.

    Attributes:
        leaves, results: for each layer what went in and what came out, with its graph; empty where it is recomputed.
    """

    leaves: list[Tensors] = field(default_factory=list)
    results: list[Tensors] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)


@dataclass(slots=True)
class Deeds:
    """What an executor has others do.

    Attributes:
        batch: gives a slot's inputs and target; asked only by the first and the last stage.
        begin_backward: expects the gradients of a slot, of all its visits here.
        end_backward: has them, and the slot's extras.
        measured: takes a slot's loss, on the last stage, and returns what the slot adds to the step's measures.
        beat: counts progress.
        waiting: the context of a wait for others.
    """

    batch: Callable[[int], Batch]
    begin_backward: Callable[[int], None]
    end_backward: Callable[[int, Tensor], None]
    measured: Callable[[int, float | None], Tensor]
    beat: Callable[[], None]
    waiting: Callable[[], AbstractContextManager[None]]


class Executor:
    """Runs actions on the layers of one stage.

    Args:
        layers: of the model. numbers: of those that are held here.
        surveys: for each size of a slot what goes between layers.
        loss_fn: of the last output and the target. autocast: the context of each forward.
        seed: the job's. recompute: whether forwards are done again for their backward instead of being kept.
    """

    def __init__(
        self,
        layers: Layers,
        numbers: range,
        surveys: Mapping[int, Survey],
        loss_fn: Callable[..., Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
        seed: int,
        *,
        recompute: bool = False,
    ) -> None:
        self._layers, self._numbers, self._surveys = layers, numbers, surveys
        self._loss_fn, self._autocast, self._seed, self._recompute = loss_fn, autocast, seed, recompute
        self._clones = frozenset().union(*(survey.clones for survey in surveys.values()))
        self._device = layers.device

    @property
    def is_last(self) -> bool:
        """Whether the stage computes the loss."""
        return self._numbers.stop == len(self._layers)

    def run(
        self,
        actions: Sequence[Action],
        step: int,
        visits: Sequence[Sequence[Visit]],
        sizes: Sequence[int],
        group: Group,
        buffers: CommittedBuffers,
        deeds: Deeds,
    ) -> float:
        """Do a step's actions, except for its reduction; returns how many seconds it computed.

        On an accelerator these are seconds of the host, which waits for it where a tensor is sent.

        Args:
            step: which. visits: of each slot, on its way through the stages. sizes: of each slot, in samples.
            group: of the whole world. buffers: of the layers of this stage.

        Raises:
            CollectiveAborted: a peer is gone.
            ConfigError: a layer or the loss gave something else than in the survey.
        """
        run = _Run(self, actions, step, visits, sizes, group, buffers, deeds)
        run.run()
        return run.compute_s

    def evaluate(self, batch: Batch, group: Group | None, route: Sequence[int], rank: int) -> float | None:
        """Send a batch forward along a route; returns its loss on the last rank, None elsewhere.

        Sizes are those of a slot that the survey knows. Raises as `run`.
        """
        inputs, target = batch
        here = route.index(rank)
        tensors = self._moved(inputs)
        survey = self._survey_for(inputs)
        tag = TAG - _TENSORS_MAX
        try:
            if here:
                assert group is not None
                tensors = self._received(group, survey.boundaries[self._numbers.start - 1], route[here - 1], tag)
            with torch.no_grad():
                for number in self._numbers:
                    tensors = self._evaluated(self._layers[number], tensors)
                if here + 1 < len(route):
                    assert group is not None
                    for index, tensor in enumerate(tensors):
                        group.send(tensor.cpu(), route[here + 1], tag + index).wait()
                    return None
                last = self._layers[len(self._layers) - 1]
                with self._autocast():
                    return float(loss_of(self._loss_fn, tensors, _on_device(target, self._device), last))
        finally:
            for number in self._numbers:
                self._layers[number].module.train()

    def _evaluated(self, layer: Layer, tensors: Tensors) -> Tensors:
        layer.module.eval()
        with self._autocast():
            results = as_tensors(layer.module(*(t.clone() for t in tensors)), layer.label)
        return tuple(result.detach().contiguous() for result in results)

    def _received(self, group: Group, boundary: Boundary, source: int, tag: int) -> Tensors:
        tensors = tuple(spec.empty() for spec in boundary)
        for work in [group.recv(tensor, source, tag + index) for index, tensor in enumerate(tensors)]:
            work.wait()
        return self._moved(tensors)

    def _survey_for(self, inputs: Tensors) -> Survey:
        size = len(inputs[0])
        if size not in self._surveys:
            raise ConfigError(
                f"pipeline.eval() was given a batch of {size} samples, but what goes between stages is agreed for batches of "
                f"{sorted(self._surveys)}: give it as many as a slot has"
            )
        return self._surveys[size]

    def _moved(self, tensors: Sequence[Tensor]) -> Tensors:
        return tuple(tensor.to(self._device) for tensor in tensors)


class _Run:
    """One step's actions."""

    def __init__(
        self,
        executor: Executor,
        actions: Sequence[Action],
        step: int,
        visits: Sequence[Sequence[Visit]],
        sizes: Sequence[int],
        group: Group,
        buffers: CommittedBuffers,
        deeds: Deeds,
    ) -> None:
        self._e, self._actions, self._step, self._visits, self._sizes = executor, actions, step, visits, sizes
        self._group, self._buffers, self._deeds = group, buffers, deeds
        self._flights: dict[tuple[int, int], _InFlight] = {}
        self._arriving: dict[tuple[ActionKind, int, int], tuple[Tensors, list[Work]]] = {}
        self._passing: dict[int, Tensors] = {}
        self._receives: Iterator[Action] = iter(
            [a for a in actions if a.kind in (ActionKind.RECEIVE_INPUT, ActionKind.RECEIVE_GRADIENT)]
        )
        self._targets: dict[int, Any] = {}
        self._extras: dict[int, Tensor] = {}
        self.compute_s = 0.0

    def run(self) -> None:
        for _ in range(_RECEIVES_AHEAD):
            self._expect_next()
        for action in self._actions:
            match action.kind:
                case ActionKind.RECEIVE_INPUT:
                    self._passing[action.slot] = self._arrived(action)
                case ActionKind.FORWARD:
                    with self._timed():
                        self._forward(action)
                case ActionKind.SEND_OUTPUT:
                    self._send(action, self._passing.pop(action.slot))
                case ActionKind.RECEIVE_GRADIENT:
                    self._flights[action.slot, action.place].gradients = self._gradients(action)
                case ActionKind.BACKWARD:
                    with self._timed():
                        self._backward(action)
                case ActionKind.SEND_GRADIENT:
                    self._send(action, self._leaf_gradients(action))
                case ActionKind.PASS_BY:
                    self._pass_by(action.slot)
                case ActionKind.REDUCE:
                    pass
            self._deeds.beat()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began_s = time.perf_counter()
        yield
        self.compute_s += time.perf_counter() - began_s

    def _visit(self, action: Action) -> Visit:
        return self._visits[action.slot][action.place]

    def _places(self, action: Action) -> list[int]:
        """The places of all visits of its slot here."""
        return [place for place, visit in enumerate(self._visits[action.slot]) if visit.stage == action.stage]

    # -- what comes and goes ---------------------------------------------------------------------------------------

    def _boundary(self, action: Action) -> Boundary:
        """What an action receives or sends."""
        if action.kind in (ActionKind.RECEIVE_INPUT, ActionKind.SEND_GRADIENT):
            return self._before(action)
        return self._survey(action.slot).boundaries[self._visit(action).layers[-1]]

    def _before(self, action: Action) -> Boundary:
        """What comes from the visit before."""
        return self._survey(action.slot).boundaries[self._visits[action.slot][action.place - 1].layers[-1]]

    def _survey(self, slot: int) -> Survey:
        return self._e._surveys[self._sizes[slot]]

    def _expect_next(self) -> None:
        """Have memory for what comes next but one or so, so that it can arrive while something is computed."""
        action = next(self._receives, None)
        if action is None:
            return
        boundary = self._boundary(action)
        if action.kind is ActionKind.RECEIVE_GRADIENT:
            boundary = tuple(spec for spec in boundary if spec.requires_grad)
        tensors = tuple(spec.empty() for spec in boundary)
        works = [
            self._group.take(tensor, action.peer, _tag(action, index))
            for index, tensor in enumerate(tensors)
        ]
        self._arriving[action.kind, action.slot, action.place] = tensors, works

    def _arrived(self, action: Action) -> Tensors:
        tensors, works = self._arriving.pop((action.kind, action.slot, action.place))
        with self._deeds.waiting():
            for work in works:
                work.wait()
        self._expect_next()
        return self._e._moved(tensors)

    def _gradients(self, action: Action) -> list[Tensor | None]:
        """The gradient of each tensor that was sent on; None of those that need none."""
        arrived = iter(self._arrived(action))
        return [next(arrived) if spec.requires_grad else None for spec in self._boundary(action)]

    def _send(self, action: Action, tensors: Sequence[Tensor]) -> None:
        for index, tensor in enumerate(tensors):
            self._group.post(tensor.cpu(), action.peer, _tag(action, index))

    def _leaf_gradients(self, action: Action) -> list[Tensor]:
        gradients = self._flights.pop((action.slot, action.place)).gradients
        sent = []
        for spec, gradient in zip(self._before(action), gradients, strict=True):
            if spec.requires_grad:
                sent.append(torch.zeros(spec.shape, dtype=spec.dtype) if gradient is None else gradient.contiguous())
        return sent

    # -- what is computed ------------------------------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        slot, visit = action.slot, self._visit(action)
        flight = self._flights[slot, action.place] = _InFlight()
        tensors = self._passing.pop(slot, None)
        is_last = action.place + 1 == len(self._visits[slot])
        if action.place == 0 or is_last:
            inputs, self._targets[slot] = self._deeds.batch(slot)
            if action.place == 0:
                tensors = self._e._moved(inputs)
        assert tensors is not None
        if action.place:
            for tensor, spec in zip(tensors, self._before(action), strict=True):
                tensor.requires_grad_(spec.requires_grad)
        self._buffers.restore()
        for number in visit.layers:
            leaves, results = self._layer(number, slot, tensors, keep=not self._e._recompute)
            self._check(number, slot, results)
            tensors = leaving(results)
            agreed = self._survey(slot).boundaries[number]
            for tensor, spec in zip(tensors, agreed, strict=True):
                tensor.requires_grad_(spec.requires_grad)
            flight.leaves.append(leaves)
            flight.results.append(() if self._e._recompute else results)
        loss = None
        if is_last:
            loss = self._loss(slot, flight, tensors)
        else:
            self._passing[slot] = tensors
        self._note_extras(slot, visit, loss)

    def _note_extras(self, slot: int, visit: Visit, loss: float | None) -> None:
        """What a visit has left in buffers, beside what others of the slot have, and the slot's measures."""
        found = torch.cat([self._buffers.of_slot(slot), self._deeds.measured(slot, loss)])
        before = self._extras.get(slot)
        if before is not None:
            names = [f"{MODEL}.{number}." for number in visit.layers]
            for place in self._buffers.places_of(names):
                before[place] = found[place]
            before[self._buffers.extras :] = found[self._buffers.extras :]
            found = before
        self._extras[slot] = found

    def _pass_by(self, slot: int) -> None:
        """The slot's gradient of these layers is nothing, and buffers stay as they are."""
        self._deeds.begin_backward(slot)
        self._buffers.restore()
        extras = torch.cat([self._buffers.of_slot(slot), self._deeds.measured(slot, None)])
        self._deeds.end_backward(slot, extras)

    def _layer(self, number: int, slot: int, tensors: Tensors, *, keep: bool) -> tuple[Tensors, Tensors]:
        """A layer's forward: what it was given, as leaves, and what it returned."""
        layer = self._e._layers[number]
        seed_everything(self._e._seed, self._step, slot, f"layer {number}")
        leaves, given = entering(tensors, number in self._e._clones)
        with self._e._autocast(), torch.set_grad_enabled(keep):
            results = as_tensors(layer.module(*given), layer.label)
        self._deeds.beat()
        return leaves, results

    def _check(self, number: int, slot: int, results: Tensors) -> None:
        agreed = self._survey(slot).boundaries[number]
        if len(results) != len(agreed) or any(
            (tuple(r.shape), r.dtype) != (s.shape, s.dtype) for r, s in zip(results, agreed, strict=True)
        ):
            found = ", ".join(f"{str(r.dtype).removeprefix('torch.')}{list(r.shape)}" for r in results)
            raise ConfigError(
                f"{self._e._layers[number].label} returned {found} in slot {slot} of step {self._step}, and "
                f"{', '.join(map(str, agreed))} before: shapes and dtypes between layers must stay as they are; pad, or pass "
                "autocast= to session.pipeline() instead of entering it outside"
            )

    def _loss(self, slot: int, flight: _InFlight, tensors: Tensors) -> float:
        leaves = tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)
        target = _on_device(self._targets.pop(slot), self._e._device)
        last = self._e._layers[len(self._e._layers) - 1]
        seed_everything(self._e._seed, self._step, slot, "loss")
        with self._e._autocast():
            loss = loss_of(self._e._loss_fn, leaves, target, last)
        torch.autograd.backward(loss)
        flight.gradients = [leaf.grad for leaf in leaves]
        return float(loss.detach())

    def _backward(self, action: Action) -> None:
        slot, places = action.slot, self._places(action)
        flight = self._flights[slot, action.place]
        if action.place == places[-1]:
            self._deeds.begin_backward(slot)
        self._targets.pop(slot, None)
        for number in reversed(self._visit(action).layers):
            leaves, results = flight.leaves.pop(), flight.results.pop()
            if self._e._recompute:
                with buffers_kept(self._e._layers[number].module):
                    leaves, results = self._layer(number, slot, leaves, keep=True)
            run_backward(results, flight.gradients)
            self._deeds.beat()
            flight.gradients = [leaf.grad for leaf in leaves]
        if action.place == places[0]:
            self._deeds.end_backward(slot, self._extras.pop(slot))
        if action.place == 0:
            del self._flights[slot, 0]


def _tag(action: Action, index: int) -> int:
    """Of a message between two visits: alike for who sends and who receives it."""
    backward = action.kind in (ActionKind.SEND_GRADIENT, ActionKind.RECEIVE_GRADIENT)
    hop = action.place + (action.kind in (ActionKind.SEND_OUTPUT, ActionKind.RECEIVE_GRADIENT))
    return TAG + (2 * (_HOPS * action.slot + hop % _HOPS) + backward) * _TENSORS_MAX + index


def _on_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in a target."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_on_device(each, device) for each in value)
    if isinstance(value, dict):
        return {key: _on_device(each, device) for key, each in value.items()}
    return value
