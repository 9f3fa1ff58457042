"""Workers that train one replica between them: the same update for all, or for none, whenever a world breaks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from elastic.group import Group
from elastic.reduction import Reducer
from elastic.replica import Parts
from elastic.sync.crew import Crew, share_of_batch
from tests.unit.worlds import in_threads, two_groups


@given(st.integers(0, 40), st.integers(1, 7))
def test_shares_of_a_batch_are_all_of_it_in_order_and_as_even_as_can_be(size: int, count: int) -> None:
    parts = [list(range(size))[share_of_batch(size, number, count)] for number in range(count)]
    assert [sample for part in parts for sample in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and len(parts[0]) == max(map(len, parts))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


class Member:
    """One of two workers of a replica."""

    def __init__(self, number: int) -> None:
        self.model = network()
        parts = Parts({"model": self.model}, {}, {}, list(self.model.parameters()))
        self.crew = Crew(("a", "b"), number, parts, functools.partial(Reducer))
        self.crew.begin_replica()

    def compute(self, x: Tensor, y: Tensor, *, late: bool = False) -> None:
        """Forward and backward of this member's share of a batch."""
        ids = list(range(len(x)))
        mine = list(self.crew.share(ids)) or ids[:1]
        self.crew.begin_step(len(x))
        loss = F.mse_loss(self.model(x[mine]), y[mine])
        self.crew.measures.give("loss", float(loss.detach()))
        loss.backward()
        self.crew.end_step(is_late=late)

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def both(members: list[Member], deed: Any) -> list[Any]:
    return in_threads(2, lambda rank: deed(members[rank], rank))


def enter(members: list[Member], groups: list[Group], done: tuple[int, int]) -> None:
    both(members, lambda member, rank: member.crew.enter(groups[rank], (0, 1), done[rank]))


@pytest.mark.parametrize("size", [5, 1])
def test_a_local_step_is_that_of_one_worker_but_for_statistics_of_shares(size: int) -> None:
    x, y = torch.randn(size, 3), torch.randn(size, 1)
    members = [Member(0), Member(1)]
    for member in members:
        member.model.eval()  # batch norm as it is, so that shares do not matter
    alone = network().eval()
    F.mse_loss(alone(x), y).backward()
    with two_groups() as groups:
        enter(members, groups, (0, 0))
        both(members, lambda member, rank: member.compute(x, y, late=rank == 1))
        both(members, lambda member, _: member.crew.reduce())
        assert both(members, lambda member, _: member.crew.take()) == [True, True], "one says that it is late, all know"
    expected = torch.cat([p.grad.flatten() for p in alone.parameters() if p.grad is not None])
    assert torch.equal(members[0].gradient(), members[1].gradient())
    torch.testing.assert_close(members[0].gradient(), expected)
    loss = float(F.mse_loss(alone(x), y).detach())
    assert [member.crew.measures.mean("loss") for member in members] == pytest.approx([loss, loss])


def test_buffers_are_the_mean_of_those_who_had_samples() -> None:
    x, y = torch.randn(6, 3), torch.randn(6, 1)
    members = [Member(0), Member(1)]
    shares = []
    for part in (x[:3], x[3:]):
        model = network()
        model(part)
        shares.append(dict(model.named_buffers()))
    with two_groups() as groups:
        enter(members, groups, (0, 0))
        both(members, lambda member, _: member.compute(x, y))
        both(members, lambda member, _: (member.crew.reduce(), member.crew.take()))
    for member in members:
        buffers = dict(member.model.named_buffers())
        for name in ("1.running_mean", "1.running_var"):
            torch.testing.assert_close(buffers[name], (shares[0][name] + shares[1][name]) / 2)
        assert int(buffers["1.num_batches_tracked"]) == 1


def test_who_finds_that_another_has_taken_an_update_takes_it_too() -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    members = [Member(0), Member(1)]
    with two_groups() as groups:
        enter(members, groups, (0, 0))
        both(members, lambda member, _: member.compute(x, y))
        both(members, lambda member, _: member.crew.reduce())
    members[0].crew.take()
    taken = members[0].gradient()
    members[0].crew.forget_step()  # one has taken it, and the other has not come to it as the world breaks
    with two_groups() as groups:
        enter(members, groups, (1, 0))
        assert [member.crew.must_apply for member in members] == [False, True]
        members[1].crew.take()
        assert torch.equal(members[1].gradient(), taken)
        members[1].crew.forget_step()
        both(members, lambda member, _: member.compute(x, y))
        both(members, lambda member, _: (member.crew.reduce(), member.crew.take()))
        assert torch.equal(members[0].gradient(), members[1].gradient())


def test_if_nobody_has_taken_an_update_all_sum_it_up_again() -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    members = [Member(0), Member(1)]
    with two_groups() as groups:
        enter(members, groups, (0, 0))
        both(members, lambda member, _: member.compute(x, y))
        both(members, lambda member, _: member.crew.reduce())
    with two_groups() as groups:
        enter(members, groups, (0, 0))
        assert not any(member.crew.must_apply for member in members)
        both(members, lambda member, _: (member.crew.reduce(), member.crew.take()))
        assert torch.equal(members[0].gradient(), members[1].gradient())
