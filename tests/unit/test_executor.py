"""What a pipeline computes for a slot that goes another way is what autograd says of the layers in that order."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.buffers import CommittedBuffers
from elastic.domain import Stage
from elastic.group import Group
from elastic.pipeline.actions import Schedule, make_actions
from elastic.pipeline.executor import Batch, Deeds, Executor
from elastic.pipeline.layers import Layers
from elastic.pipeline.paths import all_visits
from elastic.pipeline.survey import survey

WIDTH, LAYERS, SLOTS = 5, 6, 4
CPU = torch.device("cpu")
STRAIGHT = tuple(range(LAYERS))
SWAPPED, SHORT = (0, 2, 1, 4, 3, 5), (0, 3, 5)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


def modules() -> list[nn.Module]:
    torch.manual_seed(3)
    return [Residual() for _ in range(LAYERS)]


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(SLOTS, 2, 3, WIDTH, generator=generator)
    return [((values[slot, 0],), values[slot, 1]) for slot in range(SLOTS)]


def by_hand(path: Sequence[int], batch: Batch) -> tuple[float, list[Tensor | None]]:
    layers = modules()
    (x,), target = batch
    for number in path:
        x = layers[number](x)
    loss = F.mse_loss(x, target)
    loss.backward()
    return float(loss.detach()), [p.grad for layer in layers for p in layer.parameters()]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", list(Schedule))
def test_each_slot_has_the_loss_and_the_gradients_of_its_way(schedule: Schedule, recompute: bool) -> None:
    layers = Layers(modules(), lambda parameters: torch.optim.SGD(parameters, lr=0.1), None, CPU)
    given = batches()
    found = survey(layers, F.mse_loss, *given[0], contextlib.nullcontext, 1)
    layers.hold(STRAIGHT)
    executor = Executor(
        layers, range(LAYERS), {3: found}, F.mse_loss, contextlib.nullcontext, 0, recompute=recompute
    )
    paths = (STRAIGHT, SWAPPED, SHORT, SWAPPED)
    stages = (Stage(0, LAYERS, (0,)),)
    parameters = [p for layer in layers.held for p in layer.parameters()]
    losses: dict[int, float] = {}
    gradients: dict[int, list[Tensor | None]] = {}

    def begin(slot: int) -> None:
        for parameter in parameters:
            parameter.grad = None

    def end(slot: int, extras: Tensor) -> None:
        gradients[slot] = [p.grad for p in parameters]

    def measured(slot: int, loss: float | None) -> Tensor:
        if loss is not None:
            losses[slot] = loss
        return torch.zeros(1, dtype=torch.float64)

    deeds = Deeds(lambda slot: given[slot], begin, end, measured, lambda: None, contextlib.nullcontext)
    actions = make_actions(stages, [(0,)] * SLOTS, schedule, (), paths)[0]
    nobody = cast(Group, None)
    buffers = CommittedBuffers(layers.models(STRAIGHT), SLOTS)
    executor.run(actions, 1, all_visits(stages, SLOTS, paths), [3] * SLOTS, nobody, buffers, deeds)
    for slot, path in enumerate(paths):
        loss, expected = by_hand(path, given[slot])
        assert losses[slot] == pytest.approx(loss)
        for mine, theirs in zip(gradients[slot], expected, strict=True):
            assert (mine is None) == (theirs is None), "a layer that is passed by has no gradient"
            if mine is not None and theirs is not None:
                torch.testing.assert_close(mine, theirs)
