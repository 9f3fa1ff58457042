"""The same job ends with the same bits, however many workers it has."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.jobs import Job

pytestmark = pytest.mark.e2e

ADAMW: tuple[object, ...] = ()  # the defaults: AdamW, dropout, batch norm, clipping, a scheduler
SGD = ("--optimizer", "sgd", "--clip", 0)
PLAIN_SGD = ("--optimizer", "sgd", "--plain-model", "--no-scheduler", "--samples", 1203)  # with slots that are empty


@pytest.mark.parametrize(
    ("workers", "train"),
    [(1, ADAMW), (3, ADAMW), (4, ADAMW), (4, SGD), (3, PLAIN_SGD)],
    ids=["1-adamw", "3-adamw", "4-adamw", "4-sgd-no-clip", "3-plain-sgd"],
)
def test_any_number_of_workers_ends_with_the_bits_of_one_process(
    job: Job, undisturbed: Callable[..., str], workers: int, train: tuple[object, ...]
) -> None:
    job.let_go()
    done = job.ended(job.run(workers, train=(*train, *job.held)))
    assert done.code == 0, done.err
    summary = job.summary()
    assert summary["state"] == "succeeded" and summary["incidents_total"] == 0
    assert summary["samples"] == 2 * (1203 if "--samples" in train else 1217)
    assert len(job.results()) == workers
    assert job.fingerprint() == undisturbed(*train)


def test_fast_reduction_ends_too(job: Job) -> None:
    job.let_go()
    done = job.ended(job.run(3, train=("--reduction", "fast", *job.held)))
    assert done.code == 0, done.err
    assert job.summary()["state"] == "succeeded"
    assert job.fingerprint()  # whatever it is, it is one
