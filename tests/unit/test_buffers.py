"""Buffers: every slot starts from the committed copy, and a commit is the slots' mean, whoever computed them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elastic.buffers import SMALL_NUMEL, CommittedBuffers
from elastic.errors import ConfigError


class Counter(nn.Module):
    """A module that counts its own calls in a buffer of any size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


def statistics(slots: list[torch.Tensor]) -> tuple[list[torch.Tensor], nn.BatchNorm1d, CommittedBuffers]:
    """Run slots through one batch norm, as one worker would; return what each left for the fold."""
    norm = nn.BatchNorm1d(3)
    buffers = CommittedBuffers({"model": norm})
    left = []
    for slot, x in enumerate(slots):
        buffers.begin_slot()
        norm(x)
        left.append(buffers.of_slot(slot))
    return left, norm, buffers


def test_a_slot_does_not_see_what_the_slot_before_it_left() -> None:
    # Batch norm's kernels change running statistics without counting up their version.
    x, y = torch.randn(8, 3), torch.randn(8, 3)
    (_, second), _, _ = statistics([x, y])
    (first, _), _, _ = statistics([y, x])
    assert torch.equal(second[:6], first[:6])  # the count is slot 0's alone


def test_a_commit_is_the_mean_of_the_slots_and_one_count() -> None:
    left, norm, buffers = statistics([torch.randn(8, 3) for _ in range(4)])
    folded = left[0].clone()
    for other in left[1:]:
        folded += other
    buffers.commit(folded, range(4))
    mean = torch.stack([one[:3] for one in left]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean.float())
    assert norm.num_batches_tracked.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), buffers.copies.values(), strict=True))


def test_a_throwaway_slot_leaves_nothing() -> None:
    norm = nn.BatchNorm1d(3)
    buffers = CommittedBuffers({"model": norm})
    before = {name: copy.clone() for name, copy in buffers.copies.items()}
    buffers.begin_slot()
    norm(torch.randn(8, 3))
    buffers.restore()
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before.values(), strict=True))


def test_a_large_buffer_that_changes_is_an_error() -> None:
    model = Counter(SMALL_NUMEL + 1)
    buffers = CommittedBuffers({"model": model})
    assert buffers.extras == 0
    model(torch.zeros(1))
    with pytest.raises(ConfigError, match=r"buffer 'model.calls' \(4097 elements\) changes"):
        buffers.of_slot(0)


def test_a_buffer_that_two_models_share_travels_once() -> None:
    shared = Counter(4)
    assert CommittedBuffers({"a": nn.Sequential(shared), "b": nn.Sequential(shared)}).extras == 4
