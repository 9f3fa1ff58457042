"""Rounds of a pipeline: what a worker alone comes to is what the formulas say, and routes are drawn evenly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import elastic.sync
from elastic.config import WorkerConfig
from elastic.domain import Stage
from elastic.errors import ConfigError
from elastic.pipeline.rounds import RoundsEngine, local_steps_before, partner_in, pieces_of, random_routes
from elastic.sampler import SlotSampler
from elastic.session import Session
from elastic.sync import DiLoCo, NoLoCo, Sync

BATCH_SIZE, SLOTS, EVERY, CLIP = 2, 3, 4, 0.3


def data(size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(size, 5, generator=generator), torch.randint(0, 3, (size,), generator=generator))


def layers_of() -> list[nn.Module]:
    torch.manual_seed(5)
    return [nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)]


def inner_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def schedule_of(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)


def train(size: int, sync: Sync, epochs: int, **options: Any) -> tuple[Session, dict[str, torch.Tensor]]:
    session = Session(WorkerConfig())
    loader: Any = DataLoader(data(size), batch_size=BATCH_SIZE, shuffle=True)
    pipeline = session.pipeline(
        layers_of(), F.cross_entropy, inner_of, loader, scheduler_fn=schedule_of, slots=SLOTS, clip_grad_norm=CLIP, sync=sync,
        **options,
    )  # fmt: skip
    for _ in session.epochs(epochs):
        for _ in pipeline:
            pipeline.step()
    return session, pipeline.state_dict()


def by_hand(size: int, sync: DiLoCo, rounds: int) -> tuple[nn.Module, float]:
    """In plain PyTorch: one replica, whose local step has a batch of each slot."""
    model = nn.Sequential(*layers_of())
    inner, outer = inner_of(model.parameters()), torch.optim.SGD(
        model.parameters(), lr=sync.outer_lr, momentum=sync.momentum, nesterov=sync.nesterov
    )  # fmt: skip
    scheduler = schedule_of(inner)
    sampler = SlotSampler(size, BATCH_SIZE * EVERY, SLOTS, 0, True, False)
    x, y = data(size).tensors
    loss = math.nan
    for step in range(1, rounds + 1):
        phi = [parameter.detach().clone() for parameter in model.parameters()]
        each = [pieces_of(sampler.ids(step, slot), BATCH_SIZE) for slot in range(SLOTS)]
        losses: list[tuple[float, int]] = []
        for number in range(max(map(len, each))):
            inner.zero_grad()
            batches = [list(batches[number]) for batches in each if number < len(batches)]
            total = sum(map(len, batches))
            for batch in batches:
                value = F.cross_entropy(model(x[batch]), y[batch])
                losses.append((float(value.detach()), len(batch)))
                (value * len(batch) / total).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            inner.step()
            scheduler.step()
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), phi, strict=True):
                parameter.grad = before - parameter
                parameter.copy_(before)
        outer.step()
        loss = sum(value * count for value, count in losses) / sum(count for _, count in losses)
    return model, loss


@pytest.mark.parametrize("size", [24, 43], ids=["whole rounds", "a short last round"])
@pytest.mark.parametrize("random_routing", [False, True])
@pytest.mark.parametrize("sync", [DiLoCo(EVERY), DiLoCo(EVERY, 1.0, 0.3, nesterov=False)], ids=repr)
def test_a_round_is_what_the_paper_says(size: int, sync: DiLoCo, random_routing: bool) -> None:
    session, state = train(size, sync, 3, random_routing=random_routing)
    model, loss = by_hand(size, sync, session.step)
    for mine, theirs in zip(state.values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert session.loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("size", [24, 43])
def test_a_layer_that_comes_is_where_the_schedule_of_the_others_is(size: int) -> None:
    """Also behind epochs whose last round had fewer local steps."""
    session, _ = train(size, DiLoCo(EVERY), 3)
    engine = session._engine
    assert isinstance(engine, RoundsEngine)
    taken = engine._inner[0][2].last_epoch
    assert taken == local_steps_before(engine.sampler, engine.step, BATCH_SIZE)
    assert taken == sum(-(-max(engine.sampler.sizes(step)) // BATCH_SIZE) for step in range(1, engine.step))
    rate = engine._inner[0][1].param_groups[0]["lr"]
    engine._inner.clear()
    engine._begin_layer(engine.layers[0], engine.step)
    assert engine._inner[0][2].last_epoch == taken
    assert engine._inner[0][1].param_groups[0]["lr"] == pytest.approx(rate)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(4, 12), st.integers(0, 5))
def test_random_routes_load_all_workers_of_a_stage_alike(widths: list[int], slots: int, key: int) -> None:
    stages, first = [], 0
    for number, width in enumerate(widths):
        stages.append(Stage(number, number + 1, tuple(range(first, first + width))))
        first += width
    routes = random_routes(stages, slots, str(key))
    assert len(routes) == slots
    for number, stage in enumerate(stages):
        loads = [sum(route[number] == rank for route in routes) for rank in stage.ranks]
        assert sum(loads) == slots and max(loads) - min(loads) <= 1
    for own in stages:
        for other in stages:
            asked = [partner_in(other, own, rank) for rank in own.ranks]
            assert set(asked) <= set(other.ranks)


def test_routes_differ_from_local_step_to_local_step() -> None:
    stages = [Stage(0, 1, (0, 1, 2, 3)), Stage(1, 2, (4, 5, 6, 7))]
    found = {tuple(random_routes(stages, 8, f"7 1 {ordinal}")) for ordinal in range(20)}
    assert len(found) == 20


class Twice(nn.Module):
    """The same weight at both ends."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


@pytest.mark.parametrize(
    ("sync", "options", "words"),
    [
        (NoLoCo(EVERY), {}, "the stages of a pipeline agree by AllReduce"),
        (DiLoCo(EVERY, dynamic=True), {}, "without dynamic and"),
        (elastic.sync.AllReduce(), {"random_routing": True}, "for workers that train by themselves"),
        (DiLoCo(100), {}, "use a smaller every"),
    ],
)
def test_what_cannot_be_is_refused_in_words(sync: Sync, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(24, sync, 1, **options)


def test_tied_layers_are_refused_in_words() -> None:
    session = Session(WorkerConfig())
    linear = nn.Linear(5, 5)
    loader: Any = DataLoader(data(24), batch_size=BATCH_SIZE)
    layers = [Twice(linear), nn.Tanh(), Twice(linear)]
    with pytest.raises(ConfigError, match="are one parameter"):
        session.pipeline(layers, F.cross_entropy, inner_of, loader, slots=3, sync=DiLoCo(EVERY))
