"""Layers that go from worker to worker, and such as are made from others, between real groups."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import Store

from elastic.domain import Blend, LayerMove, Member, Plan, Stage
from elastic.group import Group
from elastic.pipeline.layers import Layers, Part
from elastic.pipeline.travel import Travel
from tests.unit.worlds import connect, in_processes

Report = Callable[[Any], None]
CPU = torch.device("cpu")
STEPS = 3


def layers_of(seed: int) -> Layers:
    """Four like layers with batch norm, trained for some steps, each worker's by other data."""
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(4)]
    layers = Layers(
        modules,
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        CPU,
    )
    layers.hold(range(4))
    for number in range(4):
        generator = torch.Generator().manual_seed(10 * seed + number)
        for _ in range(STEPS):
            layers[number].module(torch.randn(8, 4, generator=generator)).square().sum().backward()
            layers[number].step()
            layers[number].schedule()
            layers[number].module.zero_grad()
    return layers


def values_of(layers: Layers, number: int) -> list[list[float]]:
    tensors = (*layers[number].module.parameters(), *layers[number].module.buffers())
    return [tensor.detach().double().flatten().tolist() for tensor in tensors]


def plan_of(*stages: Stage) -> Plan:
    size = sum(len(stage.ranks) for stage in stages)
    return Plan(members=tuple(Member(worker=f"w{rank}", rank=rank) for rank in range(size)), stages=stages)


BLEND = Blend(1, (0, 2), (0.75, 0.25))
AFTER_A_LOSS = plan_of(Stage(0, 2, (0,)), Stage(2, 4, (1,))), plan_of(Stage(0, 1, (0,)), Stage(1, 4, (1, 2)))
"""Layer 1 is made by one who holds one of its sources; by two, of which one holds a source (it is a joiner's world, too)."""


def make_a_layer(rank: int, size: int, store: Store, report: Report, *, plan: Plan) -> None:
    layers = layers_of(7)
    own = [n for n in plan.layers_of(rank) if n != 1]
    layers.keep(own)
    group = connect(store, rank, size)
    made = Travel(layers).blend(group, [BLEND], plan, STEPS)
    layer = layers[1]
    if not made:
        report(None)
        return
    assert layer.optimizer is not None and not layer.optimizer.state
    report((values_of(layers, 1), layer.optimizer.param_groups[0]["lr"], layer.scheduler.last_epoch))


def test_a_lost_layer_is_the_same_average_for_all_who_hold_it(tmp_path: Path) -> None:
    whole = layers_of(7)
    first, second = values_of(whole, 0), values_of(whole, 2)
    for plan in AFTER_A_LOSS:
        with in_processes(plan.world_size, functools.partial(make_a_layer, plan=plan), tmp_path) as peers:
            reports = [peer.report() for peer in peers]
        makers = [found for rank, found in enumerate(reports) if rank in plan.holders_of(1)]
        assert all(found is None for rank, found in enumerate(reports) if rank not in plan.holders_of(1))
        for values, rate, epoch in makers:
            assert values == makers[0][0], "all who hold it hold the same bits"
            assert rate == 0.1 * 0.5**STEPS and epoch == STEPS, "the schedule goes on"
            *floats, count = zip(values, first, second, strict=True)
            for mine, one, other in floats:
                expected = [0.75 * a + 0.25 * b for a, b in zip(one, other, strict=True)]
                assert mine == torch.tensor(expected).double().tolist()
            assert count[0] == count[1] == [STEPS], "what is no number of floating point is not averaged"


def follow_a_layer(rank: int, size: int, store: Store, report: Report) -> None:
    layers = layers_of(rank)
    group = connect(store, rank, size)
    travel, moves = Travel(layers), [LayerMove(1, 3, (0,), (1,))]
    took = travel.move(group, moves, STEPS, {}, Part.MODEL)
    at_first = [values_of(layers, number) for number in (1, 2)]
    travel.follow(group, moves, STEPS)
    is_under_way = travel.is_under_way
    travel.arrive()
    states = []
    for number in (1, 2):
        optimizer = layers[number].optimizer
        assert optimizer is not None
        states += [{key: value.tolist() for key, value in state.items()} for state in optimizer.state.values()]
    report((took, is_under_way, travel.takes, at_first, states))


def test_optimizers_follow_what_trains(tmp_path: Path) -> None:
    with in_processes(2, follow_a_layer, tmp_path) as peers:
        giver, taker = (peer.report() for peer in peers)
    assert (giver[0], taker[0]) == (False, True) and giver[1] and taker[1] and (giver[2], taker[2]) == (False, True)
    assert giver[3] == taker[3] and giver[4] == taker[4] and giver[4]


ALONE = cast(Group, SimpleNamespace(rank=0))
WHOLE = plan_of(Stage(0, 4, (0,)))


def test_moments_may_be_averaged_too() -> None:
    layers = layers_of(7)
    before = {number: _moments(layers, number) for number in (0, 2)}
    assert Travel(layers).blend(ALONE, [replace(BLEND, moments=True)], WHOLE, STEPS)
    for made, first, second in zip(_moments(layers, 1), before[0], before[2], strict=True):
        torch.testing.assert_close(made, 0.75 * first + 0.25 * second)


class AlwaysMade(Travel):
    """Makes layer 1 at once."""

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers)
        self.blend(ALONE, [BLEND], WHOLE, STEPS)


def _moments(layers: Layers, number: int) -> list[torch.Tensor]:
    optimizer = layers[number].optimizer
    assert optimizer is not None
    return [optimizer.state[p][key].clone() for p in layers[number].parameters() for key in ("exp_avg", "exp_avg_sq")]


def test_the_expected_error_is_that_of_a_third_layer_which_is_as_like_as_the_two() -> None:
    layers = layers_of(7)
    layers[2].module.load_state_dict(layers[0].module.state_dict())
    (alike,) = AlwaysMade(layers).errors
    assert alike.error < 1e-6, "two that are the same leave no doubt about the third"
    with torch.no_grad():
        for number, place in ((0, 0), (2, 1)):
            for parameter in layers[number].parameters():
                parameter.zero_()
            layers[number].parameters()[0].view(-1)[place] = 3.0
    (apart,) = AlwaysMade(layers).errors
    assert apart.error == pytest.approx((0.75**2 + 0.25**2 + 1) ** 0.5), "of three that are orthogonal"
    copied = Travel(layers)
    copied.blend(ALONE, [Blend(1, (2,), (1.0,))], WHOLE, STEPS)
    assert copied.errors == (), "nothing is known of a copy of a partner"
