"""Bad input: one sentence that says what is wrong and how to proceed, a non-zero exit, and nothing left running."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from elastic.config import WorkerConfig
from elastic.errors import ConfigError
from elastic.session import Session
from tests.e2e.jobs import TRAIN, Done, Job

pytestmark = pytest.mark.e2e


def assert_one_sentence(done: Done, said: str, *, code: int = 2) -> None:
    """Fail unless the command ended with this code and one line of a person's language on stderr."""
    assert done.code == code, done
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) == 1 and said in done.err, done.err


@pytest.mark.parametrize("verb", ["run", "agent"])
def test_a_script_that_is_not_there(job: Job, verb: str) -> None:
    done = job.elastic(verb, "no-such-script.py")
    assert_one_sentence(done, "there is no script 'no-such-script.py': check the path")
    job.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nproc-per-node", "many"), "'many' is not a positive number, cpu, gpu or auto"),
        (("--nnodes", "4:2"), "'4:2' must have 1 <= MIN <= MAX"),
        (("--failure-timeout", "-1"), "-1"),
        (("--nproc-per-nod", "2"), "Did you mean"),
        (("--label", "x"), "--label 'x' is not KEY=VALUE"),
        (("--controller", "nowhere"), "--controller 'nowhere' is not HOST:PORT"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_bad_option(job: Job, options: tuple[str, ...], said: str) -> None:
    assert_one_sentence(job.elastic("run", *options, TRAIN), said)
    job.assert_nothing_is_left()


def test_a_controller_that_cannot_be_reached(job: Job) -> None:
    nobody = "127.0.0.1:9"
    for command in ("status", "events", "stop"):
        assert_one_sentence(job.elastic(command, "--controller", nobody), f"no controller answers at {nobody}")
    done = job.elastic("run", "--controller", nobody, "--connect-timeout", 1, TRAIN, timeout_s=20)
    assert_one_sentence(done, "no controller answered within 1 s (--connect-timeout)", code=1)
    job.assert_nothing_is_left()


def test_an_agent_of_another_job_and_a_second_agent_of_the_same_name(job: Job) -> None:
    job.controller("--job", "mine", "--nnodes", "1:2")
    done = job.ended(job.agent("b", 1, "--job", "yours"))
    assert_one_sentence(done, "node b belongs to job 'yours', this controller runs 'mine'", code=1)
    job.agent("a", 1, "--job", "mine")
    job.wait_for(lambda status: status["nodes"], "the agent")
    twin = job.ended(job.agent("a", 1, "--job", "mine", name="twin"))
    assert_one_sentence(twin, "node id 'a' is already attached", code=1)
    assert job.ask("stop").code == 0
    for name in ("agent-a", "controller"):
        job.ended(job.started[name])
    job.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("workers", "train", "said"),
    [
        (2, ("--samples", 23), "the dataset holds 23 samples, fewer than one global batch of 6 slots x 4"),
        (2, ("--slots", 1, "--virtual-replicas", 1), "slots=1 cannot feed 2 workers"),
        (2, ("--uneven",), "the initial parameters or buffers (seed the model's construction on every worker alike)"),
    ],
    ids=["short dataset", "few slots", "uneven start"],
)
def test_a_job_that_cannot_train(job: Job, workers: int, train: tuple[object, ...], said: str) -> None:
    done = job.ended(job.run(workers, train=train))
    assert done.code == 1 and "Traceback" not in done.err
    assert said in job.summary()["reason"]
    assert len([line for line in done.err.splitlines() if line.startswith("[controller] failed: ") and said in line]) == 1
    job.assert_nothing_is_left()


def test_a_loader_that_cannot_be_dealt_ends_the_job_without_a_traceback(job: Job) -> None:
    script = job.folder / "script.py"
    script.write_text(
        "import elastic, torch\n"
        "from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset\n"
        "model = torch.nn.Linear(2, 2)\n"
        "loader = DataLoader(TensorDataset(torch.randn(8, 2)), sampler=SubsetRandomSampler([1, 2]))\n"
        "elastic.join().prepare(model, torch.optim.SGD(model.parameters()), loader)\n"
    )
    done = job.ended(job.run(2, script=script))
    assert done.code == 1 and "Traceback" not in done.err
    assert "a sampler of its own" in job.summary()["reason"] and "a sampler of its own" in done.err
    job.assert_nothing_is_left()


# What prepare() and the session refuse, in a world of one ----------------------------------------------------------


class Endless(IterableDataset[torch.Tensor]):
    """A stream."""

    def __iter__(self) -> Any:
        yield torch.zeros(2)


SAMPLES = TensorDataset(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))


def bound(loader: Any = None, **options: Any) -> tuple[Session, Any, Any, Any]:
    """Return a session with a small model, its optimizer and a loader, all prepared."""
    session = Session(WorkerConfig())
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared = session.prepare(model, optimizer, DataLoader(SAMPLES, batch_size=4) if loader is None else loader, **options)
    return session, *prepared


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (lambda: DataLoader(SAMPLES, sampler=WeightedRandomSampler([1.0] * 8, 8)), "a sampler of its own (Weighted"),
        (lambda: DataLoader(SAMPLES, sampler=RandomSampler(SAMPLES, replacement=True)), "draws with replacement"),
        (
            lambda: DataLoader(SAMPLES, batch_sampler=BatchSampler(SequentialSampler(SAMPLES), 2, False)),
            "a batch sampler of its own",
        ),
        (lambda: DataLoader(SAMPLES, batch_size=None), "a batch sampler of its own (or batch_size=None)"),
        (lambda: DataLoader(Endless()), "IterableDataset"),
    ],
    ids=["sampler", "replacement", "batch sampler", "no batch size", "iterable"],
)
def test_a_loader_that_cannot_be_dealt(loader: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        bound(loader())
    assert "\n" not in str(raised.value) and ": " in str(raised.value)  # one sentence, with how to proceed


def test_a_batch_sampler_that_was_made_by_hand_is_not_taken_for_the_loaders_own() -> None:
    loader: Any = DataLoader(SAMPLES, batch_sampler=BatchSampler(RandomSampler(SAMPLES), 2, False))
    with pytest.raises(ConfigError, match="batch sampler"):
        bound(loader)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reduction": "exact"}, "reduction='exact' is unknown"),
        ({"slots": 3}, "fewer than one global batch"),
        ({"slots": 2, "virtual_replicas": 3}, "virtual_replicas=3 exceeds slots=2"),
        ({"slots": -1}, "slots=-1 is negative"),
        ({"virtual_replicas": 2}, "virtual_replicas=2 exceeds slots=1"),
    ],
    ids=str,
)
def test_options_of_prepare_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        bound(**options)


def test_prepare_called_twice() -> None:
    session, model, optimizer, _ = bound()
    with pytest.raises(ConfigError, match="called twice: pass everything to one call"):
        session.prepare(model, optimizer, DataLoader(SAMPLES, batch_size=4))


def test_a_closure() -> None:
    session, model, optimizer, loader = bound()
    with pytest.raises(ConfigError, match="without a closure"):
        for x, y in loader:
            optimizer.step(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
    assert session.step == 0


def test_an_optimizer_that_is_not_stepped() -> None:
    _, model, _, loader = bound()
    with pytest.raises(ConfigError, match="call every optimizer's step"):
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("name", ["epochs", "clip_grad_norm_", "log"])
def test_a_session_that_is_used_before_prepare(name: str) -> None:
    session = Session(WorkerConfig())
    arguments = {"epochs": (1,), "clip_grad_norm_": (1.0,), "log": ()}[name]
    with pytest.raises(ConfigError, match=f"session.{name}\\(\\) was called before session.prepare"):
        list(getattr(session, name)(*arguments) or ())


def test_things_that_prepare_does_not_know() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="does not know what to do with a str"):
        Session(WorkerConfig()).prepare(model, optimizer, "loader")
    with pytest.raises(ConfigError, match="exactly one DataLoader, got 1, 1 and 0"):
        Session(WorkerConfig()).prepare(model, optimizer)
    stranger = torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="that no prepared model has"):
        Session(WorkerConfig()).prepare(model, stranger, DataLoader(SAMPLES, batch_size=4))
