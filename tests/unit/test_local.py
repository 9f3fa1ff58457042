"""Rounds of local steps in a world of one: what they come to is what the formulas say."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic.config import WorkerConfig
from elastic.errors import ConfigError
from elastic.sampler import SlotSampler
from elastic.session import Session
from elastic.sync import AsyncLocalSGD, DiLoCo, NoLoCo, Rounds, StreamingDiLoCo
from elastic.sync.fragments import fragments_of
from elastic.sync.turns import DelayedNesterov
from tests.unit.test_session import data, model_and_optimizer

BATCH_SIZE, REPLICAS, EVERY = 2, 3, 4


SYNCS = [
    DiLoCo(EVERY),
    DiLoCo(EVERY, 1.0, 0.3, nesterov=False),
    DiLoCo(1, 0.5),
    StreamingDiLoCo(EVERY, 2),
    StreamingDiLoCo(EVERY, 2, mixing=0.5, outer_lr=0.7),
    StreamingDiLoCo(EVERY, 2, overlap=1, mixing=0.5, outer_lr=0.7),
    StreamingDiLoCo(2 * EVERY, 2, overlap=2, mixing=0.25),
    NoLoCo(EVERY, mean_every=1),
    NoLoCo(EVERY, 0.3, 1.0, 0.4, mean_every=1),
]
"""All of which one worker alone comes to by an outer SGD."""


class Run:
    """A prepared world of one, which computes all replicas one after the other."""

    def __init__(self, size: int, sync: Rounds, **options: Any) -> None:
        self.session = Session(WorkerConfig())
        self.model, self.optimizer = model_and_optimizer()
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=3, gamma=0.9)
        dataset = TensorDataset(*(tensor[:size] for tensor in data().tensors))
        loader: Any = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, num_workers=options.pop("readers", 0))
        self.model, self.optimizer, self.loader, self.scheduler = self.session.prepare(
            self.model, self.optimizer, loader, self.scheduler, **{"slots": REPLICAS, "sync": sync, **options}
        )
        self.batches = 0

    def train(self, epochs: int, *, clip: float = 0.0) -> None:
        for _ in self.session.epochs(epochs):
            for x, y in self.loader:
                self.batches += 1
                self.optimizer.zero_grad()
                loss = F.cross_entropy(self.model(x), y)
                self.session.log(loss=loss)
                loss.backward()
                if clip:
                    self.session.clip_grad_norm_(clip)
                self.optimizer.step()
                self.scheduler.step()


def steps_of(sync: Rounds, sizes: Sequence[int]) -> int:
    """Local steps of each replica in a round."""
    return max(1, min(sync.local_steps, min(size for size in sizes if size) // BATCH_SIZE))


def outer_of(sync: Rounds, parameters: Any) -> torch.optim.SGD:
    """The outer optimizer; an odd replica of NoLoCo takes the step of a heavy ball, which beta belongs to."""
    if isinstance(sync, NoLoCo):
        return torch.optim.SGD(parameters, lr=sync.beta, momentum=sync.alpha)
    return torch.optim.SGD(parameters, lr=sync.outer_lr, momentum=sync.momentum, nesterov=sync.nesterov)


def by_hand(size: int, sync: Rounds, rounds: int, clip: float) -> tuple[nn.Module, float]:
    """The same in plain PyTorch: one model, one optimizer and one scheduler for each replica."""
    whole, _ = model_and_optimizer()
    replicas: list[tuple[nn.Module, Any, Any]] = []
    for _ in range(REPLICAS):
        model, optimizer = model_and_optimizer()
        replicas.append((model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.9)))
    outer = outer_of(sync, whole.parameters())
    sampler = SlotSampler(size, BATCH_SIZE * sync.local_steps, REPLICAS, 0, True, False)
    count = getattr(sync, "fragments", 1)
    fragments = fragments_of([whole], list(whole.parameters()), count)
    tensors = data().tensors
    loss, overlap = 0.0, getattr(sync, "overlap", 0)
    to_come: list[int] = []  # places that the first replica is still to be brought up to date in

    def bring_up_to_date(model: nn.Module, places: Sequence[int]) -> None:
        mixing = getattr(sync, "mixing", 0.0)
        for place in places:
            own, agreed = list(model.parameters())[place].data, list(whole.parameters())[place].data
            own.copy_(mixing * own + (1 - mixing) * agreed)

    for step in range(1, rounds + 1):
        sizes = sampler.sizes(step)
        steps = steps_of(sync, sizes)
        moved: list[list[torch.Tensor]] = []
        losses = []
        for slot, (model, optimizer, scheduler) in enumerate(replicas):
            if len(fragments) == 1:
                model.load_state_dict(copy.deepcopy(whole.state_dict()))
            ids = sampler.ids(step, slot)
            given = []
            for piece in range(steps):
                own = list(ids[len(ids) * piece // steps : len(ids) * (piece + 1) // steps])
                if not own:  # in an epoch's last round a replica may have nothing; its learning rate goes on
                    scheduler.step()
                    continue
                optimizer.zero_grad()
                value = F.cross_entropy(model(tensors[0][own]), tensors[1][own])
                value.backward()
                given.append(float(value.detach()))
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                if to_come and piece + 1 == min(overlap, steps - 1):
                    bring_up_to_date(model, to_come)
                    to_come = []
            losses.append(sum(given) / max(1, len(given)))
            moved.append([p.detach() - q.detach() for p, q in zip(whole.parameters(), model.parameters(), strict=True)])
        fragment = fragments[(step - 1) % len(fragments)]
        for place, parameter in enumerate(whole.parameters()):
            parameter.grad = None
            if place not in fragment:
                continue
            total = sum(size * each[place] for size, each in zip(sizes, moved, strict=True))
            parameter.grad = total / sum(sizes)
        outer.step()
        runs_ahead = sampler.epoch_of(step + 1) == sampler.epoch_of(step) and steps_of(sync, sampler.sizes(step + 1)) > 1
        to_come = fragment if overlap and runs_ahead else []
        for model, _, _ in replicas[1 if to_come else 0 :]:
            bring_up_to_date(model, fragment)
        loss = sum(size * value for size, value in zip(sizes, losses, strict=True)) / sum(sizes)
    return whole, loss


@pytest.mark.parametrize("size", [24, 43], ids=["whole rounds", "a short last round"])
@pytest.mark.parametrize("sync", SYNCS, ids=repr)
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_a_round_is_what_the_paper_says(size: int, sync: Rounds, clip: float) -> None:
    run = Run(size, sync)
    run.train(3, clip=clip)
    rounds = 3 * len(run.loader)
    model, loss = by_hand(size, sync, rounds, clip)
    assert run.session.step == rounds
    for mine, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert run.session.loss == pytest.approx(loss, rel=1e-4)
    sampler = SlotSampler(size, BATCH_SIZE * sync.local_steps, REPLICAS, 0, True, False)
    counts = [steps_of(sync, sampler.sizes(s)) for s in range(1, rounds + 1)]
    replicas = [sum(each > 0 for each in sampler.sizes(s)) for s in range(1, rounds + 1)]
    assert run.batches == sum(a * b for a, b in zip(counts, replicas, strict=True))
    assert run.scheduler.last_epoch == sum(counts), "a scheduler takes a step with each local one of one replica"


def one_replica(size: int, sync: Rounds, rounds: int) -> tuple[nn.Module, int]:
    """In plain PyTorch: one replica that takes all local steps of a round; returns the model, and the steps of its schedule."""
    whole, _ = model_and_optimizer()
    model, optimizer = model_and_optimizer()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.9)
    outer: Any
    if isinstance(sync, AsyncLocalSGD):
        delay = sync.turns_of_momentum
        outer = DelayedNesterov(
            list(whole.parameters()), lr=sync.outer_lr, momentum=sync.momentum, delay=delay, share=sync.share
        )
    else:
        outer = outer_of(sync, whole.parameters())
    sampler = SlotSampler(size, BATCH_SIZE * sync.local_steps, REPLICAS, 0, True, False)
    tensors, ticks, begun = data().tensors, 0, copy.deepcopy(whole)
    turns = sync.turns if isinstance(sync, AsyncLocalSGD) else 1
    turn = {step for step in range(1, rounds + 1) if step % turns == 0 or step % sampler.steps_per_epoch == 0}
    for step in range(1, rounds + 1):
        ids = [sample for slot in range(REPLICAS) for sample in sampler.ids(step, slot)]
        batches = [ids[start : start + BATCH_SIZE] for start in range(0, len(ids), BATCH_SIZE)]
        whole_round = max(1, min(sync.local_steps, len(ids) // (BATCH_SIZE * REPLICAS)))
        for number, batch in enumerate(batches, 1):
            optimizer.zero_grad()
            F.cross_entropy(model(tensors[0][batch]), tensors[1][batch]).backward()
            optimizer.step()
            for _ in range(whole_round * number // len(batches) - whole_round * (number - 1) // len(batches)):
                scheduler.step()
        ticks += whole_round
        for parameter, start, own in zip(whole.parameters(), begun.parameters(), model.parameters(), strict=True):
            parameter.grad = (start - own).detach() if step in turn else None
        outer.step()
        if step in turn:
            begun = copy.deepcopy(whole)
            model.load_state_dict(whole.state_dict())
    return whole, ticks


@pytest.mark.parametrize("size", [24, 43], ids=["whole rounds", "a short last round"])
@pytest.mark.parametrize(
    "sync",
    [
        DiLoCo(EVERY, dynamic=True),
        NoLoCo(EVERY, mean_every=1, dynamic=True),
        AsyncLocalSGD(EVERY, 1),
        AsyncLocalSGD(EVERY, 2),
        AsyncLocalSGD(EVERY, 2, outer_lr=0.5, momentum=0.5, delay=3, share=0.2),
    ],
    ids=repr,
)
def test_dealt_by_speed_a_worker_alone_is_one_replica_that_takes_all_local_steps(size: int, sync: Rounds) -> None:
    run = Run(size, sync)
    run.train(3)
    model, ticks = one_replica(size, sync, 3 * len(run.loader))
    for mine, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert run.batches == 3 * sum(
        -(-sum(run.loader._engine.sampler.sizes(step)) // BATCH_SIZE) for step in range(1, len(run.loader) + 1)
    )
    assert run.scheduler.last_epoch == ticks


def test_delayed_nesterov_is_what_the_paper_says() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    lr, beta, delay, share = 0.7, 0.9, 3, 0.25
    optimizer = DelayedNesterov([parameter], lr=lr, momentum=beta, delay=delay, share=share)
    theta, momentum, total = parameter.detach().clone(), torch.zeros(2), torch.zeros(2)
    for turn in range(7):
        gradient = torch.tensor([0.1 * (turn + 1), -0.3])
        parameter.grad = gradient.clone()
        optimizer.step()
        total += gradient
        if (turn + 1) % delay == 0:
            momentum, total = beta * momentum + total / delay, torch.zeros(2)
            theta = theta - lr * ((1 - share * delay + share) * beta * momentum + gradient / delay)
        else:
            theta = theta - lr * (share * beta * momentum + gradient / delay)
        torch.testing.assert_close(parameter.detach(), theta)
    nesterov, plain = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    mine = DelayedNesterov([nesterov], lr=lr, momentum=beta, delay=1, share=0.0)
    theirs = torch.optim.SGD([plain], lr=lr, momentum=beta, nesterov=True)
    for turn in range(4):
        nesterov.grad = plain.grad = torch.tensor([0.2, turn * 0.1])
        mine.step()
        theirs.step()
        torch.testing.assert_close(nesterov, plain)


@pytest.mark.parametrize(("quantize", "off"), [("int8", 0.02), ("fp4", 0.3)])
@pytest.mark.parametrize("fragments", [1, 2])
def test_what_is_sent_in_few_bits_comes_to_nearly_the_same(quantize: Any, off: float, fragments: int) -> None:
    def sync(code: Any) -> Rounds:
        return DiLoCo(EVERY, quantize=code) if fragments == 1 else StreamingDiLoCo(EVERY, fragments, quantize=code)

    begun = [parameter.detach().clone() for parameter in model_and_optimizer()[0].parameters()]
    moved = []
    for code in (None, quantize):
        run = Run(24, sync(code))
        run.train(1)
        ended = zip(run.model.parameters(), begun, strict=True)
        moved.append(torch.cat([(parameter.detach() - before).view(-1) for parameter, before in ended]))
    error = float((moved[0] - moved[1]).norm() / moved[0].norm())
    assert 0 < error < off


@pytest.mark.parametrize("sync", [DiLoCo(EVERY), StreamingDiLoCo(EVERY, 2), DiLoCo(EVERY, quantize="int8")], ids=repr)
def test_a_round_that_is_not_finite_moves_nothing_and_the_next_one_is_sound(sync: Rounds) -> None:
    run = Run(24, sync)
    values: list[list[torch.Tensor]] = []
    for _ in run.session.epochs(4):
        for x, y in run.loader:
            run.batches += 1
            loss = F.cross_entropy(run.model(x), y) * (float("nan") if run.batches == sync.local_steps + 1 else 1.0)
            loss.backward()
            run.optimizer.step()
            run.scheduler.step()
            if run.session.committed:
                values.append([parameter.detach().clone() for parameter in run.model.parameters()])
    begun = list(model_and_optimizer()[0].parameters())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(values[0], begun, strict=True))
    assert all(bool(value.isfinite().all()) for value in values[-1])
    assert any(not torch.equal(mine, theirs) for mine, theirs in zip(values[0], values[-1], strict=True))


def test_layers_go_to_fragments_in_turns_and_the_rest_to_the_smallest() -> None:
    model = nn.Sequential(nn.Embedding(7, 2), nn.ModuleList(nn.Linear(2, 2) for _ in range(5)), nn.Linear(2, 7))
    parameters = list(model.parameters())
    found = fragments_of([model], parameters, 2)
    assert sorted(place for places in found for place in places) == list(range(len(parameters)))
    layers = [[2 * number + 1, 2 * number + 2] for number in range(5)]  # the embedding is first
    assert [place for layer in layers[::2] for place in layer] == [p for p in found[0] if 0 < p < 11]
    assert 0 in found[1], "it is smaller before it has the embedding"
    assert fragments_of([model], parameters, 1) == [list(range(len(parameters)))]
    with pytest.raises(ConfigError, match="fragments=6, and the model has 5 layer"):
        fragments_of([model], parameters, 6)


def test_readers_ahead_give_the_same_batches() -> None:
    found = []
    for readers in (0, 2):
        run = Run(43, DiLoCo(EVERY), readers=readers)
        run.train(2)
        found.append([parameter.detach().clone() for parameter in run.model.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DiLoCo(0), "a round has at least one local step"),
        (lambda: DiLoCo(outer_lr=0.0), "give a rate above 0"),
        (lambda: DiLoCo(momentum=1.0), "at least 0 and below 1"),
        (lambda: DiLoCo(momentum=0.0), "Nesterov's step needs a momentum"),
        (lambda: StreamingDiLoCo(4, 1), "give at least 2, or use DiLoCo"),
        (lambda: StreamingDiLoCo(5, 2), "every has to be a multiple of fragments"),
        (lambda: StreamingDiLoCo(4, 2, mixing=1.0), "at least 0 and below 1"),
        (lambda: StreamingDiLoCo(8, 2, overlap=4), "end before the next one begins, 4 local steps later: give 0 to 3"),
        (lambda: Run(24, StreamingDiLoCo(8, 4)), "fragments=4, and the model has 2 layer"),
        (lambda: DiLoCo(quantize="int4"), "choose int8 or fp4"),  # type: ignore[arg-type]
        (lambda: Run(24, DiLoCo(100)), "takes 200 samples for a round of one replica, and the dataset has 24"),
        (lambda: NoLoCo(0), "a round has at least one local step"),
        (lambda: NoLoCo(alpha=1.0), "at least 0 and below 1"),
        (lambda: NoLoCo(beta=0.0), "give a rate above 0"),
        (lambda: NoLoCo(alpha=0.9), r"below 2 \(1 - alpha\^2\) = 0.38, from where their differences grow"),
        (lambda: NoLoCo(gamma=1.5), r"= 1.5, from where"),
        (lambda: NoLoCo(gamma=0.0), "or replicas never come together"),
        (lambda: NoLoCo(beta=math.nan), "give a finite number"),
        (lambda: NoLoCo(mean_every=0), "give at least 1 round"),
        (lambda: NoLoCo(quantize="fp8"), "choose int8 or fp4"),  # type: ignore[arg-type]
        (lambda: Run(24, DiLoCo(4), shard_optimizer=True), "exclude each other"),
        (lambda: DiLoCo(quantize="fp4", feedback=True, dynamic=True), "leave one out"),
        (lambda: StreamingDiLoCo(8, 2, overlap=1, dynamic=True), "begins before that is known; leave one out"),
        (lambda: AsyncLocalSGD(5, 2), "every has to be a multiple of turns"),
        (lambda: AsyncLocalSGD(delay=-1), "or 0 for as many as there are"),
        (lambda: AsyncLocalSGD(delay=4, share=0.3), "at most 1 / delay"),
        (lambda: AsyncLocalSGD(momentum=1.0), "at least 0 and below 1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
