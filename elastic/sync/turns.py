"""Rounds after which only some of the replicas give what they have moved, and the others go on: AsyncLocalSGD.

The turn of a slot comes with every so many rounds. What it gives then was made from the parameters that were agreed on at its
turn before, and all of that is applied by an outer optimizer whose momentum waits until everybody has had a turn.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elastic.quantize import Code
from elastic.reduction import Reducer, Reduction
from elastic.sync import AsyncLocalSGD
from elastic.sync.local import OUTER, LocalEngine


class DelayedNesterov(Optimizer):
    """SGD whose momentum moves in every `delay`-th step only, with the mean gradient of these (algorithm 3 of arXiv 2401.09135).

    Args:
        parameters: what it updates. lr, momentum: of Nesterov's step. delay: steps from one update of the momentum to the next.
        share: of the momentum that acts in the other steps, too.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, lr: float, momentum: float, delay: int, share: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "delay": delay, "share": share, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no loss to return
        """Update the parameters; one without a gradient has nothing new, and its momentum acts all the same."""
        for group in self.param_groups:
            group["steps"] += 1
            delay, share, beta = group["delay"], group["share"], group["momentum"]
            moves = group["steps"] % delay == 0
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(sum=torch.zeros_like(parameter), momentum=torch.zeros_like(parameter))
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                total, momentum = state["sum"].add_(gradient), state["momentum"]
                if moves:
                    momentum.mul_(beta).add_(total, alpha=1 / delay)
                    total.zero_()
                weight = beta * (1 - share * delay + share if moves else share)
                parameter.add_(momentum, alpha=-group["lr"] * weight).add_(gradient, alpha=-group["lr"] / delay)


class TurnEngine(LocalEngine):
    """Drives the rounds of AsyncLocalSGD."""

    sync: AsyncLocalSGD

    def _begin_agreement(self) -> Mapping[str, Optimizer]:
        sync, parameters = self.sync, list(self.parts.parameters)
        self._outer = DelayedNesterov(
            parameters, lr=sync.outer_lr, momentum=sync.momentum, delay=sync.turns_of_momentum, share=sync.share
        )
        if sync.quantize:
            self.reducer.close()
            self.reducer = self._make_reducer(
                parameters,
                replicas=self.sampler.slots,  # each slot is written in code by itself
                reduction=Reduction.ORDERED,
                shared=False,
                code=Code(sync.quantize),
            )
        self._reducer = self.reducer
        self._begun: dict[int, list[Tensor]] = {}  # slot -> the agreed parameters that its replica has begun with
        self._theta: dict[int, list[Tensor]] = {}  # slot -> its replica's own parameters, as the round began
        self._ended: dict[int, list[Tensor]] = {}  # slot -> those with which it has ended the round
        return {OUTER: self._outer}

    def _reducer_of(self, step: int) -> Reducer:
        return self._reducer

    def _reports(self, slot: int) -> bool:
        assert self._dealer is not None
        return (self.step + slot) % self.sync.turns == 0 or self._dealer.is_last(self.step)

    def _start_of(self, slot: int) -> Sequence[Tensor]:
        if slot not in self._begun:
            self._begun[slot] = [phi.clone() for phi in self._phi]
        return self._theta.get(slot, self._begun[slot])

    def _contribute(self, slot: int, weight: float | None) -> None:
        if self._reports(slot):
            assert weight is not None
            for parameter, begun in zip(self.parts.parameters, self._begun[slot], strict=True):
                parameter.grad = (begun - parameter) * weight
        else:
            self._ended[slot] = self._own()

    def _groups_hash(self) -> int:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._outer.param_groups]
        return zlib.crc32(repr(groups).encode())

    def _agree(self, ahead: list[list[Tensor]]) -> None:
        self._outer.step()
        self._theta = {slot: theta for slot, theta in (self._theta | self._ended).items() if not self._reports(slot)}
        self._begun = {slot: begun for slot, begun in self._begun.items() if slot in self._theta}
        self._ended = {}

    def _forget_replicas(self) -> None:
        self._begun, self._theta, self._ended = {}, {}, {}

    def _keep_replicas(self, own: set[int], again: set[int]) -> None:
        self._begun = {slot: begun for slot, begun in self._begun.items() if slot in own}
        self._theta = {slot: theta for slot, theta in self._theta.items() if slot in own}
        self._ended = {slot: theta for slot, theta in self._ended.items() if slot in own - again}
