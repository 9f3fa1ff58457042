"""Fixtures of the end-to-end tests: a job that cleans up after itself, and what an undisturbed run ends with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.jobs import TRAIN, Job


@pytest.fixture
def job() -> Iterator[Job]:
    """A job, ended whatever happens."""
    with Job() as started:
        yield started


@pytest.fixture(scope="session")
def undisturbed() -> Callable[..., str]:
    """What a world of one without an agent ends with: the fingerprint for these arguments, computed once."""
    known: dict[tuple[object, ...], str] = {}

    def fingerprint(*train: object) -> str:
        if train not in known:
            with Job() as alone:
                done = alone.call(sys.executable, TRAIN, *train, "--out", alone.folder / "out")
                assert done.code == 0, done.err
                known[train] = alone.fingerprint()
        return known[train]

    return fingerprint
