"""What a real loop does besides training: measures, weights, stopping, saving, scaling, reading ahead, averaging."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as torch_clip_grad_norm_
from torch.utils.data import DataLoader, Dataset, TensorDataset

from elastic.config import WorkerConfig
from elastic.errors import ConfigError
from elastic.progress import ProgressPage
from elastic.session import Session

SIZE, BATCH_SIZE, SLOTS = 48, 4, 3


def data(size: int = SIZE) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(size, 5, generator=generator), torch.randint(0, 3, (size,), generator=generator)
    )


def network() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def prepared(
    *more: Any, session: Session | None = None, dataset: Any = None, workers: int = 0
) -> tuple[Session, Any, Any, Any]:
    """A world of one over a small network with AdamW."""
    session = session or Session(WorkerConfig())
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader: Any = DataLoader(
        dataset or data(), batch_size=BATCH_SIZE, shuffle=True, num_workers=workers, timeout=60 if workers else 0
    )
    _, _, loader, *_ = session.prepare(model, optimizer, loader, *more, slots=SLOTS)
    return session, model, optimizer, loader


def bits(model: nn.Module) -> list[bytes]:
    return [t.detach().numpy().tobytes() for t in model.state_dict().values()]


# -- measures and weights ------------------------------------------------------------------------------------------


def test_a_mean_is_over_all_samples_of_the_step_and_known_after_it() -> None:
    session, model, optimizer, loader = prepared(dataset=data(21))  # a step of 12 and one of 9
    given: list[tuple[float, int]] = []
    means = []
    for x, y in loader:
        assert math.isnan(session.mean("never"))
        given.append((float(y.float().mean()), len(y)))
        session.mean("target", y.float().mean())
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if session.committed:
            means.append(session.mean("target"))
            total = sum(value * count for value, count in given)
            assert means[-1] == pytest.approx(total / sum(count for _, count in given))
            given = []
    assert len(means) == 2


def test_nan_is_as_good_as_no_value_and_names_are_bounded() -> None:
    session, model, optimizer, loader = prepared()
    for number, (x, y) in enumerate(loader):
        session.mean("sometimes", 5.0 if number == 1 else math.nan)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if session.committed:
            break
    assert session.mean("sometimes") == 5.0
    with pytest.raises(ConfigError, match="one name too many"):
        for _ in loader:
            for number in range(40):
                session.mean(f"name {number}", 1.0)


def test_a_value_that_comes_too_late_for_its_step_is_refused() -> None:
    session, model, optimizer, loader = prepared()
    with pytest.raises(ConfigError, match=r"mean\('late', ...\) came after optimizer.step\(\)"):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            session.mean("late", 1.0)


def test_a_value_or_a_weight_outside_the_loop_is_refused() -> None:
    session, *_ = prepared()
    for call in (lambda: session.mean("x", 1.0), lambda: session.log(loss=1.0), lambda: session.weight(3)):
        with pytest.raises(ConfigError, match="outside the loop"):
            call()


def test_a_step_without_any_gradient_is_clipped_to_nothing() -> None:
    session, _, optimizer, loader = prepared()
    for _ in loader:
        norm = session.clip_grad_norm_(1.0)
        optimizer.step()
        if session.committed:
            break
    assert norm.item() == 0.0


def token_losses(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """The mean over the samples whose target is not 0, and how many those are."""
    keep = y != 0
    return F.cross_entropy(model(x)[keep], y[keep]), int(keep.sum())


def test_weights_make_the_gradient_a_mean_over_all_tokens() -> None:
    session, model, optimizer, loader = prepared()
    plain = network()
    seen: list[tuple[Tensor, Tensor]] = []
    for x, y in loader:
        seen.append((x, y))
        loss, tokens = token_losses(model, x, y)
        session.weight(tokens)
        loss.backward()
        optimizer.step()
        if session.committed:
            break
    whole_x, whole_y = torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])
    token_losses(plain, whole_x, whole_y)[0].backward()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_a_slot_without_a_token_weighs_nothing_and_one_that_is_not_weighed_is_refused() -> None:
    session, model, optimizer, loader = prepared()
    for number, (x, y) in enumerate(loader):
        session.weight(0 if number == 0 else 2)
        F.cross_entropy(model(x)[:0] if number == 0 else model(x), y[:0] if number == 0 else y).backward()
        optimizer.step()
        if session.committed:
            break
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    with pytest.raises(ConfigError, match="not in this one"):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    session, *_, loader = prepared()
    with pytest.raises(ConfigError, match="is no weight"):
        for _ in loader:
            session.weight(-1)


# -- stopping and saving -------------------------------------------------------------------------------------------


def test_stop_ends_all_loops_after_the_step_and_saving_runs_once() -> None:
    session, model, optimizer, loader = prepared()
    saved: list[int] = []
    session.on_end(lambda: saved.append(session.step))
    epochs = 0
    for _ in session.epochs(10):
        epochs += 1
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            if session.step == 5:
                assert session.stop() is False
            optimizer.step()
    assert (session.step, epochs) == (6, 2)
    assert session.stop(False) is True and saved == []
    assert list(loader) == [] and list(session.epochs(20)) == []
    session.close()
    assert saved == [6]


# -- mixed precision -----------------------------------------------------------------------------------------------


def scaled_run(session: Session, broken_slot: int, clip: float) -> tuple[list[bytes], list[float]]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    session, model, optimizer, loader = prepared(scaler, session=session)
    scales = []
    number = 0
    for _ in session.epochs(3):
        for x, y in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss * float("inf") if number == broken_slot else loss).backward()
            number += 1
            scaler.unscale_(optimizer)
            if clip:
                session.clip_grad_norm_(clip)
            scaler.step(optimizer)
            scaler.update()
            if session.committed:
                scales.append(scaler.get_scale())
    return bits(model), scales


def test_a_scaler_unscales_what_was_reduced_and_skips_what_is_not_finite() -> None:
    _, scales = scaled_run(Session(WorkerConfig()), broken_slot=13, clip=0.1)
    # Twelve steps, the fifth of which is skipped: it grows after three good ones in a row.
    assert scales == [1024, 1024, 2048, 2048, 1024, 1024, 1024, 2048, 2048, 2048, 4096, 4096]


def test_scaling_by_powers_of_two_changes_no_bit() -> None:
    with_scaler, _ = scaled_run(Session(WorkerConfig()), broken_slot=-1, clip=0.1)
    session, model, optimizer, loader = prepared()
    for _ in session.epochs(3):
        for x, y in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.clip_grad_norm_(0.1)
            optimizer.step()
    assert bits(model) == with_scaler


def test_a_scaler_refuses_an_optimizer_that_is_not_prepared() -> None:
    scaler = torch.amp.GradScaler("cpu")
    _, model, _, loader = prepared(scaler)
    for x, y in loader:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        with pytest.raises(ConfigError, match="not prepared"):
            scaler.step(torch.optim.SGD(model.parameters(), lr=0.1))
        break


# -- reading ahead -------------------------------------------------------------------------------------------------


class Augmented(Dataset[tuple[Tensor, int]]):
    """Samples that are different each time they are read."""

    def __len__(self) -> int:
        return 45

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(5) + random.random() + index, index % 3


def read(workers: int) -> Iterator[list[Any]]:
    session, model, optimizer, loader = prepared(dataset=Augmented(), workers=workers)
    for _ in session.epochs(3):
        for x, y in loader:
            yield [x.tolist(), y.tolist()]
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def test_data_loader_workers_read_the_same_bits() -> None:
    assert list(read(2)) == list(read(0))


# -- states and buffers --------------------------------------------------------------------------------------------


class Counter:
    """A user's object with a state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_extra_states_and_averages_travel_with_the_training_state() -> None:
    states = []
    for seed in (1, 2):
        session = Session(WorkerConfig())
        counter, average = Counter(), copy.deepcopy(network())
        counter.count = seed
        with torch.no_grad():
            next(average.parameters()).fill_(seed)
        session.extra_state("counter", counter)
        session.extra_state("average", average)
        prepared(session=session)
        assert session._engine is not None
        states.append((session._engine.state, counter, average))
    (donor, _, source), (joiner, counter, average) = states
    for into, of in zip(joiner.adopt(donor.manifest(), donor.small()), donor.tensors(), strict=True):
        into.copy_(of)
    assert counter.count == 1 and bits(average) == bits(source)


def test_forwards_of_an_average_count_as_progress() -> None:
    page = ProgressPage(ProgressPage.create("test"))
    session, average = Session(WorkerConfig()), network()
    session._page = page
    session.extra_state("average", average)
    _, model, _, _ = prepared(session=session)
    before = page.read().progress
    with torch.no_grad():
        average(torch.randn(2, 5))
        model(torch.randn(2, 5))
    assert page.read().progress == before + 2


def test_a_prepared_model_can_be_copied_averaged_and_saved() -> None:
    _, model, optimizer, loader = prepared()
    copied = copy.deepcopy(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)  # of our own making
    for x, y in loader:
        for other in (copied, averaged, loaded):
            other(x)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert bits(copied) == bits(loaded) != bits(model)


def test_states_are_named_once_and_before_prepare() -> None:
    session = Session(WorkerConfig())
    session.extra_state("counter", Counter())
    with pytest.raises(ConfigError, match="taken"):
        session.extra_state("counter", Counter())
    prepared(session=session)
    with pytest.raises(ConfigError, match="before"):
        session.extra_state("other", Counter())
    with pytest.raises(ConfigError, match="before"):
        session.buffer_rule("*", "mean")


class Queue(nn.Module):
    """A queue of the newest samples, and a count of all, as contrastive learning keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("queue", torch.zeros(6))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.queue.copy_(torch.cat([self.queue[1:], x[:1, 0]]))
        self.seen += len(x)
        return self.linear(x)


def push(committed: Tensor, slots: Tensor) -> Tensor:
    """Take the newest element of each slot's queue."""
    return torch.cat([committed, slots[:, -1]])[-len(committed) :]


def test_buffer_rules_say_what_a_commit_makes_of_the_slots() -> None:
    session = Session(WorkerConfig())
    session.buffer_rule("model.queue", push)
    session.buffer_rule("*.seen", "delta")
    model = Queue()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader: Any = DataLoader(data(), batch_size=BATCH_SIZE, shuffle=True)
    model, optimizer, loader = session.prepare(model, optimizer, loader, slots=SLOTS)
    newest = []
    for x, y in loader:
        newest.append(float(x[0, 0]))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if session.step == 3:
            break
    assert model.seen.item() == 36
    assert model.queue.tolist() == pytest.approx(newest[-6:])


@pytest.mark.parametrize(
    ("name", "rule", "words"),
    [("model.nothing", "mean", "names no buffer"), ("*.seen", "median", "unknown")],
)
def test_a_wrong_rule_is_refused(name: str, rule: str, words: str) -> None:
    session = Session(WorkerConfig())
    session.buffer_rule(name, rule)
    model = Queue()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=words):
        session.prepare(model, optimizer, DataLoader(data(), batch_size=4), slots=SLOTS)


# -- what cannot work ----------------------------------------------------------------------------------------------


def test_clipping_gradients_that_are_not_there_is_refused() -> None:
    _, model, optimizer, loader = prepared()
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        with pytest.raises(ConfigError, match=r"call session.clip_grad_norm_\(max_norm\)"):
            torch_clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(ConfigError, match="clip_grad_value_"):
            nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        break


def test_a_forward_between_two_optimizers_is_refused() -> None:
    session = Session(WorkerConfig())
    first, second = network(), nn.Linear(3, 3)
    one = torch.optim.SGD(first.parameters(), lr=0.1)
    two = torch.optim.SGD(second.parameters(), lr=0.1)
    loader: Any = DataLoader(data(), batch_size=BATCH_SIZE)
    _, _, _, _, loader = session.prepare(first, second, one, two, loader, slots=SLOTS)
    for x, y in loader:
        F.cross_entropy(second(first(x)), y).backward()
        one.step()
        with pytest.raises(ConfigError, match="all optimizers step together"):
            second(first(x))
        first.eval()
        with torch.no_grad():
            first(x)  # an evaluation changes nothing
        two.step()
        break


def test_an_iteration_that_only_accumulates_is_refused() -> None:
    _, model, _, loader = prepared()
    with pytest.raises(ConfigError, match="step"):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()


def test_what_prepare_does_not_know_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Counter.*session.extra_state\(\)"):
        prepared(Counter())
