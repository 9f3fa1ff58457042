"""Parameters that several layers use: each use has a copy and a gradient of its own, and all copies get the sum.

The sum is in the order of the layers, in one process too, so that a cut between two uses changes no bit. Of each stage that
has a use one rank sends what it has to every rank of the others. This file must never decide who holds a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from elastic.domain import Plan
from elastic.group import Group, Work
from elastic.pipeline.layers import Layers, Use

TAG = (1 << 27) + 64
"""Above the tags of activations, and below a verdict's."""


class Ties:
    """The tied parameters of a model, and their gradients in one step.

    Attributes:
        gradients: for the number of each tied parameter that is held here, the sum over all uses.
        presence: for the number of each use, whether any of them has a gradient.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self.gradients: dict[int, Tensor] = {}
        self.presence: dict[int, bool] = {}

    def forget(self) -> None:
        """The step is over, or will be done again."""
        self.gradients, self.presence = {}, {}

    def add_up(
        self, group: Group, plan: Plan, output: Mapping[int, Tensor], present: Mapping[int, bool]
    ) -> None:
        """Exchange the gradients and add them. Raises CollectiveAborted.

        Args:
            output, present: for the number of each parameter held here, its reduced gradient and whether there is one.
        """
        self.forget()
        arriving: list[list[tuple[int, Tensor, Work | None]]] = []
        for tie, uses in enumerate(self._layers.uses):
            numbers = [self._layers.number_of(use) for use in uses]
            mine = [number for number in numbers if number in output]
            if not mine:
                continue
            parts: list[tuple[int, Tensor, Work | None]] = []
            for place, (use, number) in enumerate(zip(uses, numbers, strict=True)):
                tag = TAG + 64 * tie + place
                if number in output:
                    flat = output[number].reshape(-1)
                    message = torch.cat([flat, torch.full((1,), float(present[number]), dtype=flat.dtype)]).cpu()
                    parts.append((number, message, None))
                    for rank in _readers(plan, group.rank, uses, use.layer):
                        group.post(message, rank, tag)
                else:
                    holders = plan.holders_of(use.layer)
                    source = holders[_position(plan, group.rank) % len(holders)]
                    like = output[mine[0]]
                    message = torch.empty(like.numel() + 1, dtype=like.dtype)
                    parts.append((number, message, group.take(message, source, tag)))
            arriving.append(parts)
        for parts in arriving:
            self._add(parts, output)

    def _add(self, parts: Sequence[tuple[int, Tensor, Work | None]], output: Mapping[int, Tensor]) -> None:
        total: Tensor | None = None
        is_present = False
        for _, message, work in parts:
            if work is not None:
                work.wait()
            is_present |= bool(message[-1] > 0)
            total = message[:-1] if total is None else torch.add(total, message[:-1])
        assert total is not None
        for number, _, work in parts:
            if work is None:
                self.gradients[number] = total.clone().to(output[number].device).view(output[number].shape)
            self.presence[number] = is_present


def _position(plan: Plan, rank: int) -> int:
    """A rank's place among those of its stage."""
    return plan.stages[plan.stage_of(rank)].ranks.index(rank)


def _readers(plan: Plan, own: int, uses: Sequence[Use], layer: int) -> list[int]:
    """The ranks that take what this one has of a use: each of another stage with a use asks one of ours."""
    readers = []
    mine = plan.holders_of(layer)
    for other in plan.stages:
        if other.ranks != mine and any(other.first <= use.layer < other.last for use in uses):
            place = _position(plan, own)
            readers += [rank for number, rank in enumerate(other.ranks) if number % len(mine) == place]
    return readers
