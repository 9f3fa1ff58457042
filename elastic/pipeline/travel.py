"""Layers that go from worker to worker: what trains moves while all wait, what the optimizer needs follows behind it.

    between two steps     parameters, buffers        both sides in `move`
    during the next one   state of the optimizers    on a thread, from `follow` on; `arrive` waits for it before the vote

So a step does not wait for two thirds of the bytes. Until the state has arrived nothing may be updated: those who give it have
not voted either, and cannot have changed it. This file must never decide who gives what to whom.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from elastic.domain import Blend, LayerError, LayerMove, Plan
from elastic.failpoints import FailPoint, reach_inside
from elastic.group import Group
from elastic.pipeline.layers import MODEL, Layer, Layers, Part
from elastic.state import TrainingState
from elastic.transfer import receive_state, serve_state


@dataclass(frozen=True, slots=True)
class _Errand:
    """One layer's state that is to be given or taken here, as part of a move."""

    move: LayerMove
    state: TrainingState


class Travel:
    """This worker's part in the moves of layers.

    Args:
        layers: of the model; those that are taken are held from then on, and none is released.

    Attributes:
        is_under_way: whether state still follows.
        takes: whether some of it comes here.
        errors: of the layers that were made here last, how far each is expected to be from what was lost.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.takes = False
        self.errors: tuple[LayerError, ...] = ()

    @property
    def is_under_way(self) -> bool:
        return self._thread is not None

    def move(
        self, group: Group, moves: Iterable[LayerMove], step: int, copies: Mapping[str, Tensor], part: Part = Part.ALL
    ) -> bool:
        """Give and take layers, one after the other; returns whether any came here.

        Args:
            moves: in ranks of the group. step: of the state. copies: of the committed buffers of what is held.
            part: of each layer's state.

        Raises:
            CollectiveAborted: a peer is gone. TransferError: what came is damaged, and this worker has to end.
        """
        errands = self._errands(group, moves, copies, part)
        _run(group, errands, step)
        return any(group.rank in errand.move.targets for errand in errands)

    def blend(self, group: Group, blends: Iterable[Blend], plan: Plan, step: int) -> bool:
        """Make lost layers from others, whose holders give them to whoever needs them; returns whether any are made here.

        All who make a layer get the same bits. It begins with the schedule of its sources, and without the state of an
        optimizer, or with the average of theirs. Raises as `move`.
        """
        made = False
        errors = []
        for blend in blends:
            sources: list[list[Tensor]] = []
            makers = plan.keepers_of(blend.layer)
            total: list[Tensor] = []
            for source, weight in zip(blend.sources, blend.weights, strict=True):
                holders = plan.keepers_of(source)
                takers = [rank for rank in makers if rank not in holders]
                if group.rank in makers:
                    self._layers.hold([blend.layer])
                    target = self._layers[blend.layer]
                    if group.rank in holders:
                        _copy(self._layers[source].state(), target.state())
                if group.rank in holders and takers:
                    serve_state(group, self._layers[source].state(), holders, takers, step)
                elif group.rank in takers:
                    receive_state(group, target.state(), holders, step)
                if group.rank in makers:
                    total = _added(total, _blended_of(target, blend), weight)
                    sources.append([p.detach().double().clone() for p in target.parameters()])
            if group.rank in makers:
                for tensor, value in zip(_blended_of(target, blend), total, strict=True):
                    tensor.copy_(value)
                if not blend.moments:
                    target.forget_optimizer()
                if len(sources) == 2:
                    errors.append(LayerError(blend.layer, _expected_error(sources[0], sources[1], *blend.weights)))
                made = True
        self.errors = tuple(errors)
        return made

    def follow(self, group: Group, moves: Iterable[LayerMove], step: int) -> None:
        """Begin to give and take the state of the optimizers of layers that have moved."""
        errands = self._errands(group, moves, {}, Part.OPTIMIZER)
        if not errands:
            return
        self.takes = any(group.rank in errand.move.targets for errand in errands)
        self._error = None
        self._thread = threading.Thread(target=self._follow, args=(group, errands, step), name="follow", daemon=True)
        self._thread.start()

    def arrive(self) -> None:
        """Wait until the state has come, or can never come. Raises as `move`."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join()  # each of its messages has the group's deadline
        if self._error is not None:
            raise self._error

    def _follow(self, group: Group, errands: Sequence[_Errand], step: int) -> None:
        try:
            reach_inside(FailPoint.STATE_FOLLOWING)
            _run(group, errands, step)
        except Exception as error:  # whatever it is, the main thread raises it
            self._error = error

    def _errands(
        self, group: Group, moves: Iterable[LayerMove], copies: Mapping[str, Tensor], part: Part
    ) -> list[_Errand]:
        errands = []
        for move in moves:
            for number in range(move.first, move.last):
                if group.rank in move.targets:
                    self._layers.hold([number])
                elif group.rank not in move.sources:
                    continue
                prefix = f"{MODEL}.{number}."
                own = {name: copy for name, copy in copies.items() if name.startswith(prefix)}
                errands.append(_Errand(move, self._layers.state([number], {}, own, part)))
        return errands


def _run(group: Group, errands: Sequence[_Errand], step: int) -> None:
    for errand in errands:
        move = errand.move
        if group.rank in move.targets:
            receive_state(group, errand.state, move.sources, step)
        else:
            serve_state(group, errand.state, move.sources, move.targets, step)


def _blended_of(layer: Layer, blend: Blend) -> list[Tensor]:
    """What of a layer is an average, as live tensors: parameters and buffers, maybe the optimizer's state."""
    return (layer.state() if blend.moments else TrainingState({MODEL: layer.module}, {}, {})).tensors()


def _expected_error(first: Sequence[Tensor], second: Sequence[Tensor], weight: float, other: float) -> float:
    """The distance of a mean of two layers from a third, over its norm, if all are of one norm and as like as those two."""
    if not first:
        return 0.0
    dot = sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))
    norms = [math.sqrt(sum(float((a * a).sum()) for a in each)) for each in (first, second)]
    cosine = dot / (norms[0] * norms[1]) if all(norms) else 0.0
    squared = weight**2 + other**2 + 2 * weight * other * cosine + 1 - 2 * cosine * (weight + other)
    return math.sqrt(max(0.0, squared))


def _copy(source: TrainingState, target: TrainingState) -> None:
    entries, tensors = source.described_tensors()
    for place, tensor in zip(target.adopt(entries, source.small()), tensors, strict=True):
        place.copy_(tensor)


def _added(total: list[Tensor], values: list[Tensor], weight: float) -> list[Tensor]:
    """Weighted sums in float64; what is no floating-point number is that of the first source."""
    if not total:
        return [v.double() * weight if v.is_floating_point() else v.clone() for v in values]
    return [t + v.double() * weight if v.is_floating_point() else t for t, v in zip(total, values, strict=True)]
