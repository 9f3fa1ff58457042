"""The session in a world of one: what it trains is what plain PyTorch would, and user code sees what it was promised."""

from __future__ import annotations

import pickle
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

SIZE, BATCH_SIZE, SLOTS = 45, 4, 3  # four steps of an epoch, the last one of nine samples in slots of three


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(SIZE, 5, generator=generator), torch.randint(0, 3, (SIZE,), generator=generator)
    )


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


class Run:
    """A prepared world of one."""

    def __init__(self, size: int = SIZE, **options: Any) -> None:
        self.session = Session(WorkerConfig())
        self.model, self.optimizer = model_and_optimizer()
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=3, gamma=0.5)
        dataset = TensorDataset(*(tensor[:size] for tensor in data().tensors))
        loader: Any = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True)
        self.model, self.optimizer, self.loader, self.scheduler = self.session.prepare(
            self.model, self.optimizer, loader, self.scheduler, **{"slots": SLOTS, **options}
        )

    def train(self, epochs: int, *, clip: float = 0.0) -> None:
        for _ in self.session.epochs(epochs):
            for x, y in self.loader:
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(x), y).backward()
                if clip:
                    self.session.clip_grad_norm_(clip)
                self.optimizer.step()
                self.scheduler.step()


@pytest.mark.parametrize("size", [SIZE, 43, 38], ids=["equal slots", "unequal slots", "an empty slot"])
@pytest.mark.parametrize("reduction", ["ordered", "fast"])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_it_trains_what_plain_torch_trains_on_the_global_batch(size: int, reduction: str, clip: float) -> None:
    run = Run(size, reduction=reduction, virtual_replicas=2)
    run.train(2, clip=clip)

    model, optimizer = model_and_optimizer()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    sampler = SlotSampler(size, BATCH_SIZE, SLOTS, 0, True, False)
    for step in range(1, 2 * sampler.steps_per_epoch + 1):
        ids = [i for slot in range(SLOTS) for i in sampler.ids(step, slot)]
        x, y = (tensor[ids] for tensor in data().tensors)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # the mean over all samples, however they were dealt
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()

    assert run.session.step == 2 * sampler.steps_per_epoch == 2 * len(run.loader)
    assert run.scheduler.last_epoch == scheduler.last_epoch
    for mine, plain in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


def test_an_epoch_uses_every_sample_once_in_slots_of_a_batch() -> None:
    run = Run()
    seen: list[torch.Tensor] = []
    for x, y in run.loader:
        assert len(x) <= BATCH_SIZE
        seen.append(x)
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
    rows = {tuple(row.tolist()) for row in torch.cat(seen)}
    assert len(torch.cat(seen)) == SIZE and rows == {tuple(row.tolist()) for row in data().tensors[0]}


def test_the_optimizer_and_the_scheduler_act_once_per_step() -> None:
    run = Run()
    before = [p.detach().clone() for p in run.model.parameters()]
    committed = []
    for iteration, (x, y) in enumerate(run.loader, 1):
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        run.scheduler.step()
        committed.append(run.session.committed)
        same = all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
        assert same == (iteration < SLOTS)
        assert run.session.step == run.scheduler.last_epoch == iteration // SLOTS
        if iteration == SLOTS:
            break
    assert committed == [False, False, True]


def test_callbacks_run_once_for_each_step_when_the_next_fetch_begins() -> None:
    run = Run()
    heard: list[int] = []
    run.session.on_commit(heard.append)
    for x, y in run.loader:
        assert heard == list(range(1, run.session.step + 1))
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
    assert heard == [1, 2, 3, 4]


def test_the_norm_is_that_of_the_whole_batch_once_the_step_is_committed() -> None:
    run = Run()
    norms: list[float] = []
    for x, y in run.loader:
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        norm = run.session.clip_grad_norm_(1e9)
        run.optimizer.step()
        if run.session.committed:
            norms.append(float(norm))
    ids = [i for slot in range(SLOTS) for i in SlotSampler(SIZE, BATCH_SIZE, SLOTS, 0, True, False).ids(1, slot)]
    model, _ = model_and_optimizer()
    x, y = (tensor[ids] for tensor in data().tensors)
    F.cross_entropy(model(x), y).backward()
    assert norms[0] == pytest.approx(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)), rel=1e-5)
    assert len(norms) == 4


def test_the_logged_loss_is_the_mean_over_the_slots() -> None:
    run = Run()
    logged = []
    for x, y in run.loader:
        run.optimizer.zero_grad()
        loss = F.cross_entropy(run.model(x), y)
        loss.backward()
        run.session.log(loss=loss)
        logged.append(loss.item())
        run.optimizer.step()
        if run.session.committed:
            break
    assert run.session.loss == pytest.approx(sum(logged) / SLOTS)


def test_a_loss_that_is_logged_too_late_for_its_step_is_an_error() -> None:
    run = Run()
    for x, y in run.loader:
        loss = F.cross_entropy(run.model(x), y)
        loss.backward()
        run.optimizer.step()
        with pytest.raises(ConfigError, match=r"log\(loss=...\) came after optimizer.step\(\)"):
            run.session.log(loss=loss)
        break


def test_a_gradient_that_is_not_finite_skips_the_update_but_not_the_step() -> None:
    run = Run()
    before = [p.detach().clone() for p in run.model.parameters()]
    for x, y in run.loader:
        run.optimizer.zero_grad()
        (F.cross_entropy(run.model(x), y) * float("inf")).backward()
        run.optimizer.step()
        if run.session.committed:
            break
    assert run.session.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_state_dicts_are_what_they_were_and_can_be_pickled() -> None:
    run = Run()
    run.train(1)
    plain_model, plain_optimizer = model_and_optimizer()
    plain_scheduler = torch.optim.lr_scheduler.StepLR(plain_optimizer, step_size=3, gamma=0.5)
    for bound, plain in ((run.model, plain_model), (run.optimizer, plain_optimizer), (run.scheduler, plain_scheduler)):
        state = pickle.loads(pickle.dumps(bound.state_dict()))
        assert list(state) == list(plain.state_dict())
        plain.load_state_dict(state)


def test_leaving_the_loader_ends_the_epochs() -> None:
    run = Run()
    epochs = []
    for epoch in run.session.epochs(5):
        epochs.append(epoch)
        for x, y in run.loader:
            run.optimizer.zero_grad()
            F.cross_entropy(run.model(x), y).backward()
            run.optimizer.step()
            if run.session.step == 2:
                break
    run.session.close()
    assert epochs == [0] and run.session.step == 2
