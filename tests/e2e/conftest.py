"""Fixtures of the end-to-end tests: a job that cleans up after itself, and what an undisturbed run ends with."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.jobs import TRAIN, Job


@pytest.fixture
def job() -> Iterator[Job]:
    """A job, ended whatever happens."""
    with Job() as started:
        yield started


def fingerprint_of(*train: object) -> str:
    """What a world of one without an agent ends with."""
    with Job() as alone:
        done = alone.call(sys.executable, TRAIN, *train, "--out", alone.folder / "out", timeout_s=900)
        assert done.code == 0, done.err
        return alone.fingerprint()


@pytest.fixture(scope="session")
def undisturbed() -> Callable[..., str]:
    """`fingerprint_of`, computed once for the same arguments."""
    return functools.cache(fingerprint_of)
