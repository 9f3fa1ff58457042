"""The word at the end of a step: everybody comes to the same one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore, Store

import elastic.verdict
from elastic.errors import CollectiveAborted
from elastic.verdict import Decision, Outcome, Vote, VoteMismatch, cast
from tests.unit.worlds import connect, in_processes, in_threads, two_groups

YES = Vote(
    step=7,
    generation=3,
    complete=True,
    finite=True,
    groups_hash=-(2**63),
    next_generation=3,
    stop=False,
    presence=[True, False, False],
)


def both(first: Vote, second: Vote) -> list[Outcome]:
    with two_groups() as groups:
        votes = [first, second]
        return in_threads(2, lambda rank: cast(groups[rank], votes[rank]))


def changed(**fields: Any) -> Vote:
    return dataclasses.replace(YES, **fields)


@pytest.mark.parametrize(
    ("first", "second", "decision"),
    [
        (YES, YES, Decision.COMMIT),
        (YES, changed(finite=False), Decision.SKIP),
        (changed(complete=False), YES, Decision.RETRY),
        (changed(complete=False), changed(finite=False), Decision.RETRY),
    ],
)
def test_one_voice_is_enough_against_a_commit(first: Vote, second: Vote, decision: Decision) -> None:
    outcomes = both(first, second)
    assert [outcome.decision for outcome in outcomes] == [decision] * 2
    assert outcomes[0].reason == outcomes[1].reason != ""


def test_what_one_has_all_have_and_the_least_ready_decides() -> None:
    other = changed(next_generation=5, stop=True, presence=[False, True, False])
    for outcome in both(YES, other):
        assert outcome.presence == [True, True, False]
        assert outcome.stop
        assert outcome.next_generation == 3


@pytest.mark.parametrize("field", ["step", "generation", "groups_hash", "measures_hash"])
def test_a_difference_is_named_on_every_rank(field: str) -> None:
    other = changed(**{field: 2**63 - 1})

    def one(rank: int) -> str:
        with pytest.raises(VoteMismatch) as caught:
            cast(groups[rank], [YES, other][rank])
        return str(caught.value)

    with two_groups() as groups:
        messages = in_threads(2, one)
    words = elastic.verdict._EQUAL
    for message in messages:
        assert [name for name in words if words[name] in message.partition(" do not agree on ")[2]] == [field]


def test_a_world_of_one_decides_alone() -> None:
    group = connect(HashStore(), 0, 1)
    assert cast(group, YES).decision is Decision.COMMIT


def test_a_lost_peer_ends_the_vote() -> None:
    with two_groups() as groups:
        groups[1].abort("gone")
        with pytest.raises(CollectiveAborted):
            cast(groups[0], YES)


def vote_in_both_ways(rank: int, size: int, store: Store, report: Callable[[Any], None]) -> None:
    group = connect(store, rank, size)
    vote = changed(next_generation=3 + rank, presence=[rank == place for place in range(size)])
    direct = cast(group, vote)
    elastic.verdict._DIRECT_SIZE_MAX = 1
    reduced = cast(group, vote)
    group.settle()  # a rank that closes its connections while others still read would break them
    report((direct, reduced))


@pytest.mark.parametrize("size", [3, 4])
def test_both_ways_of_exchanging_votes_agree(size: int, tmp_path: Path) -> None:
    with in_processes(size, vote_in_both_ways, tmp_path) as peers:
        reports = [peer.report() for peer in peers]
    assert all(report == reports[0] for report in reports)
    direct, reduced = reports[0]
    assert direct == reduced
    assert direct.presence == [True] * size and direct.next_generation == 3
