"""Rounds after which all replicas agree on the step of one outer optimizer: DiLoCo, for the whole model or in parts.

What a replica has moved away from the committed parameters is summed in the order of the slots, as gradients are. Where only a
part of the model is agreed on at a time, the other parts stay a replica's own from round to round, and are lost with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elastic.feedback import ErrorFeedback
from elastic.quantize import Code
from elastic.reduction import Reducer, Reduction
from elastic.sync import DiLoCo, StreamingDiLoCo
from elastic.sync.fragments import fragments_of
from elastic.sync.local import OUTER, LocalEngine


class OuterEngine(LocalEngine):
    """Drives the rounds of DiLoCo and StreamingDiLoCo."""

    sync: DiLoCo | StreamingDiLoCo

    def _begin_agreement(self) -> Mapping[str, Optimizer]:
        sync, parts = self.sync, self.parts
        self.overlap = sync.overlap
        self._outer = torch.optim.SGD(
            list(parts.parameters), lr=sync.outer_lr, momentum=sync.momentum, nesterov=sync.nesterov
        )
        self._fragments = fragments_of(parts.models.values(), parts.parameters, sync.fragments)
        self._feedbacks: list[ErrorFeedback] = []
        self._reducers = [self.reducer]
        if sync.fragments > 1 or sync.quantize:
            self.reducer.close()
            self._reducers = [self._reducer_for([parts.parameters[place] for place in each]) for each in self._fragments]
        self._theta: dict[int, list[Tensor]] = {}  # slot -> its replica's own parameters as the round began, unless they are phi
        self._ended: dict[int, list[Tensor]] = {}  # slot -> those with which it has ended the round
        return {OUTER: self._outer}

    def _reducer_for(self, parameters: Sequence[nn.Parameter]) -> Reducer:
        if not self.sync.quantize:
            return self._make_reducer(parameters)
        code = Code(self.sync.quantize)
        feedback = ErrorFeedback(code) if self.sync.feedback else None
        self._feedbacks += [] if feedback is None else [feedback]
        return self._make_reducer(
            parameters,
            replicas=self.sampler.slots,  # each slot is written in code by itself
            reduction=Reduction.ORDERED,
            shared=False,
            code=code,
            feedback=feedback,
        )

    def _reducer_of(self, step: int) -> Reducer:
        return self._reducers[(step - 1) % len(self._reducers)]

    @property
    def _fragment(self) -> list[int]:
        """The places of the parameters that are agreed on after this round."""
        return self._fragments[(self.step - 1) % len(self._fragments)]

    def _start_of(self, slot: int) -> Sequence[Tensor]:
        if self._flight is not None and slot in self._ended:
            return self._ended[slot]  # what it will be brought up to date with is on its way
        return self._theta.get(slot, self._phi)

    def _contribute(self, slot: int, weight: float | None) -> None:
        for place in self._fragment:
            parameter = self.parts.parameters[place]
            moved = self._phi[place] - parameter
            parameter.grad = moved if weight is None else moved * weight
        for feedback in self._feedbacks:
            feedback.pauses = weight is not None
        if len(self._fragments) > 1:
            self._ended[slot] = self._own()

    def _groups_hash(self) -> int:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._outer.param_groups]
        return zlib.crc32(repr(groups).encode())

    def _agree(self, ahead: list[list[Tensor]]) -> None:
        self._outer.step()
        for feedback in self._feedbacks:
            feedback.commit()
        self._theta |= self._ended
        self._ended = {}
        for own in (*self._theta.values(), *ahead):
            for place in self._fragment:
                own[place].mul_(self.sync.mixing).add_(self.parts.parameters[place], alpha=1 - self.sync.mixing)

    def _forget_replicas(self) -> None:
        self._theta, self._ended = {}, {}
        for feedback in self._feedbacks:
            feedback.keep(())

    def _keep_replicas(self, own: set[int], again: set[int]) -> None:
        self._theta = {slot: theta for slot, theta in self._theta.items() if slot in own}
        self._ended = {slot: theta for slot, theta in self._ended.items() if slot in own - again}
        for feedback in self._feedbacks:
            feedback.keep(own)
