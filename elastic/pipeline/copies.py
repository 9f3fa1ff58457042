"""Layers of another stage that a worker keeps up with, so that they are there, bit by bit, if that stage is lost.

It holds them with an optimizer of its own. Before each vote it is given their gradients, and with the commit it updates them as
their own stage does: a gradient goes over the link for each step, and neither parameters nor moments. This file must never
decide which layers these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from elastic.domain import LayerCopy, Plan
from elastic.group import Group, Work
from elastic.pipeline.layers import Layers

TAG = (1 << 27) + (1 << 24)
"""Above the tags of what the stages exchange, and below a verdict's."""


class Copies:
    """The layers that one worker keeps up with, or gives the gradients of.

    Args:
        layers: of the model.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._gradients: dict[int, Tensor] = {}

    def exchange(self, group: Group, plan: Plan, gradients: Mapping[int, Tensor]) -> None:
        """Give and take the gradients of a step. Raises CollectiveAborted.

        Args:
            gradients: for the number of each parameter of this worker's stage, the sum over all slots.
        """
        self._gradients = {}
        works: list[Work] = []
        for copy, giver, taker in _pairs(plan):
            for number in self._layers.parameter_numbers(range(copy.first, copy.last)) if group.rank == giver else ():
                group.post(gradients[number].cpu(), taker, TAG + number)
            if group.rank == taker:
                for number, parameter in self._parameters(copy):
                    memory = torch.empty(parameter.shape, dtype=parameter.dtype)
                    works.append(group.take(memory, giver, TAG + number))
                    self._gradients[number] = memory
        for work in works:
            work.wait()

    def install(self, plan: Plan, rank: int, presence: Sequence[bool]) -> list[nn.Parameter]:
        """Make the gradients those of the layers that are kept up with; returns these parameters."""
        found = []
        for copy in plan.copies:
            for number, parameter in self._parameters(copy) if rank in copy.ranks else ():
                parameter.grad = self._gradients[number].to(parameter.device) if presence[number] else None
                found.append(parameter)
        self._gradients = {}
        return found

    def differing(self, group: Group, plan: Plan, step: int) -> list[int]:
        """Return the layers that are kept up with here and are not what their stage has. Raises CollectiveAborted."""
        arriving: list[tuple[int, Tensor, Tensor, Work]] = []
        for copy, giver, taker in _pairs(plan):
            if group.rank not in (giver, taker):
                continue
            for number in range(copy.first, copy.last):
                mine = torch.tensor([step, self._layers.crc([number])])
                if group.rank == giver:
                    group.post(mine, taker, TAG + number)
                else:
                    theirs = torch.zeros_like(mine)
                    arriving.append((number, mine, theirs, group.take(theirs, giver, TAG + number)))
        for _, _, _, work in arriving:
            work.wait()
        return [number for number, mine, theirs, _ in arriving if not torch.equal(mine, theirs)]

    def _parameters(self, copy: LayerCopy) -> Iterator[tuple[int, nn.Parameter]]:
        numbers = range(copy.first, copy.last)
        held = [parameter for number in numbers for parameter in self._layers[number].parameters()]
        return zip(self._layers.parameter_numbers(numbers), held, strict=True)


def _pairs(plan: Plan) -> Iterator[tuple[LayerCopy, int, int]]:
    """Who gives what to whom."""
    for copy in plan.copies:
        givers = plan.holders_of(copy.first)
        for place, taker in enumerate(copy.ranks):
            yield copy, givers[place % len(givers)], taker
