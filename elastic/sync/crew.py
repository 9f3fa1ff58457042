"""The workers of one replica: each computes a share of every local step, and all of them take the same update.

    forward, backward of a share -> sums in the order of the shares -> all say that they hold the sum -> the update

Nobody takes an update that not all hold the sum of. So whoever finds, in the next world, that another one has taken it can take
it, too; and if nobody has, all sum it up again. This file must never decide whether a replica goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic import measures
from elastic.buffers import CommittedBuffers
from elastic.group import Group, GroupPart
from elastic.measures import Measures
from elastic.reduction import Reduced, Reducer
from elastic.replica import Parts

TAG_MEET = 0x05356000
"""Apart from the tags of anything else on the same group."""
LATE = 0
"""Where in the numbers that travel along it stands how many members say that it is late."""


def share_of_batch(size: int, number: int, count: int) -> slice:
    """Return which of a batch's samples a member computes: as evenly as possible, the first ones more."""
    each, rest = divmod(size, count)
    start = number * each + min(number, rest)
    return slice(start, start + each + (number < rest))


class Crew:
    """One member's side of a replica that several workers train.

    Args:
        workers: the members, in order. number: which of them this one is.
        parts: what is trained. make_reducer: makes the reducer of the members' gradients, with `replicas` and `extras`.

    Attributes:
        must_apply: whether another member has taken its update.
    """

    def __init__(
        self, workers: Sequence[str], number: int, parts: Parts, make_reducer: Callable[..., Reducer]
    ) -> None:
        self.workers, self.number, self.size = tuple(workers), number, len(workers)
        self.buffers = CommittedBuffers(parts.models, self.size, parts.rules)
        self.measures = Measures()
        self._reducer = make_reducer(
            parts.parameters, replicas=self.size, extras=1 + self.buffers.extras + measures.EXTRAS
        )
        self._group: Group | None = None
        self._ranks: tuple[int, ...] = ()
        self._reduced: Reduced | None = None
        self._samples = 0
        self.must_apply = False

    # -- worlds --------------------------------------------------------------------------------------------------------

    def enter(self, group: Group, ranks: Sequence[int], done: int) -> None:
        """Take up a world in which all members are; `done` local steps are behind this one. Raises CollectiveAborted."""
        self._group, self._ranks = group, tuple(ranks)
        self._reducer.plan(GroupPart(group, self._ranks), range(self.size))
        others = self._meet(done)
        self.must_apply = max(others) > done
        if not self.must_apply:
            self._reduced = None  # nobody has taken the update: those who do not hold the sum need the others for it

    def _meet(self, value: int) -> list[int]:
        """Return what each other member says. Raises CollectiveAborted."""
        group = self._group
        assert group is not None
        posted = group.posted
        others = [rank for rank in self._ranks if rank != group.rank]
        landed = [torch.zeros(1, dtype=torch.int64) for _ in others]
        arriving = [group.take(tensor, rank, TAG_MEET) for tensor, rank in zip(landed, others, strict=True)]
        for rank in others:
            group.post(torch.tensor([value]), rank, TAG_MEET)
        for work in arriving:
            work.wait()
        group.forget_posted_to(others, posted)  # they have received everything that was posted before
        return [int(tensor) for tensor in landed]

    # -- a local step --------------------------------------------------------------------------------------------------

    def share(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return this member's samples of a batch."""
        return tuple(ids[share_of_batch(len(ids), self.number, self.size)])

    def begin_replica(self) -> None:
        """The replica's local steps begin with what the modules have."""
        self.buffers.adopt()

    def begin_step(self, samples: int) -> None:
        """A local step with so many samples begins: expect the gradients of this member's share."""
        self._samples = samples
        mine = len(range(samples)[share_of_batch(samples, self.number, self.size)])
        self.buffers.begin_slot()
        self.measures.begin_slot(mine)
        self.measures.weigh(float(mine))
        self._reducer.begin_slot(self.number, float(mine))

    def end_step(self, *, is_late: bool) -> None:
        """This member's share is computed."""
        mine = range(self._samples)[share_of_batch(self._samples, self.number, self.size)]
        left = self.buffers.of_slot(self.number) if mine else torch.full((self.buffers.extras,), -0.0, dtype=torch.float64)
        late = torch.tensor([float(is_late)], dtype=torch.float64)
        self._reducer.end_slot(torch.cat([late, left, self.measures.of_slot()]))

    def reduce(self) -> None:
        """Sum up, unless that is done, and wait until all members have. Raises CollectiveAborted."""
        if self._reduced is None:
            self._reduced = self._reducer.finish(float(self._samples))
        self._meet(0)

    def take(self) -> bool:
        """Make `grad` the mean over the batch, and buffers those of all members; returns whether any of them says it is late."""
        reduced = self._reduced
        assert reduced is not None
        extras: Tensor = reduced.extras
        filled = [n for n in range(self.size) if range(self._samples)[share_of_batch(self._samples, n, self.size)]]
        self._reducer.install(self._reducer.presence_after_reduction())
        self.buffers.commit(extras[1 : 1 + self.buffers.extras], filled)
        self.measures.commit(extras[1 + self.buffers.extras :])
        return bool(extras[LATE])

    def forget_step(self) -> None:
        """Nothing of a local step in progress is of use."""
        self._reduced, self.must_apply = None, False
        self._reducer.clear()

    def close(self) -> None:
        """Let go of the parameters: the members change."""
        self._reducer.close()
