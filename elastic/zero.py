"""ZeRO-1 in the life of a worker: what becomes of its part of the optimizers' state as worlds come and go.

    a step            update the own part -> everybody sends what it has updated to all (`gather`)
    a world switches  leavers hand their parts to those who stay, over the old group (`enter`, `hand_over`); then all take
                      their parts of the new cut, joiners too, over the new group (`settle`)
    anything else     whatever a lost worker held is in no other one: all read a snapshot, and hold the parts of their ranks

Until the first step nothing is moved, since every part follows from what the optimizers were born with.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.optim import Optimizer

from elastic.domain import Plan, PlanKind
from elastic.errors import ProtocolError
from elastic.group import Group
from elastic.protocol import EnterWorld
from elastic.resharding import Move, ParameterGather, move_shards
from elastic.sharding import Cut, OptimizerShards
from elastic.state import TrainingState


class Zero:
    """One worker's part, and how it changes.

    Attributes:
        shards: which part.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self.shards = OptimizerShards(optimizers)
        self._gather = ParameterGather(self.shards)
        self._move: Move | None = None

    def expect(self, rank: int, world_size: int) -> None:
        """Hold as much as a member with this rank will, whose world is not known yet."""
        self.shards.recut(Cut(rank % world_size, world_size))

    def gather(self, group: Group) -> None:
        """After an update: everybody gets what the others have updated. Raises CollectiveAborted."""
        self._gather.run(group)

    def check(self, rank: int, world_size: int) -> None:
        """Before an update: raise ProtocolError unless this worker holds the part that is its own."""
        if self.shards.cut != Cut(rank, world_size):
            raise ProtocolError(
                f"rank {rank} of {world_size} holds part {self.shards.cut.index} of {self.shards.cut.count} of the optimizer's "
                "state: a fault of the runtime"
            )

    @property
    def must_settle(self) -> bool:
        """Whether parts are still to be moved in the world that was entered."""
        return self._move is not None

    def enter(self, world: EnterWorld, before: Plan | None, group: Group | None, state: TrainingState) -> None:
        """This worker is in a new world.

        Args:
            before, group: the world before, if this worker was in it.

        Raises:
            CollectiveAborted: a member of the world before is gone.
        """
        size = world.plan.world_size
        staying = tuple(rank for rank in range(size) if rank not in world.joiner_ranks)
        self._move = None
        if world.snapshot is not None:
            self.shards.recut(Cut(world.rank, size))
            return
        if world.rank in world.joiner_ranks:
            self.shards.recut(Cut(world.rank, size))
        elif self.shards.is_untouched:
            self.shards.recut(Cut(staying.index(world.rank), len(staying)))
        elif world.plan.kind is not PlanKind.SWITCH:
            return  # the loop has ended everywhere: no part is needed any more, and some may be lost
        else:
            assert before is not None and group is not None
            self._among_those_who_stay(before, world.plan, group, world.committed, state)
        move = Move(staying, tuple(range(size)))
        self._move = None if move.is_idle else move

    def hand_over(self, plan: Plan, before: Plan, group: Group, step: int, state: TrainingState) -> None:
        """The world goes on as `plan` without this worker: give its part to the others. Raises CollectiveAborted."""
        if not self.shards.is_untouched:
            self._among_those_who_stay(before, plan, group, step, state)

    def settle(self, group: Group, step: int, joins: bool, state: TrainingState) -> None:
        """All members of the new world: take the parts of its cut.

        Raises:
            CollectiveAborted: a member is gone; what is here is then of no use. TransferError: so if it came damaged.
        """
        move, self._move = self._move, None
        if move is None:
            return
        if joins:
            entries, new = state.described_tensors()
            move_shards(group, step, entries, move, None, new)
        else:
            entries, old, new = state.recut(Cut(group.rank, group.size))
            move_shards(group, step, entries, move, old, new)

    def _among_those_who_stay(self, before: Plan, plan: Plan, group: Group, step: int, state: TrainingState) -> None:
        """Over the old group: whoever is also in the new world holds a part of a cut over all of these, in their new order."""
        ranks = [before.rank_of(member.worker) for member in plan.members]
        move = Move(tuple(range(before.world_size)), tuple(rank for rank in ranks if rank is not None))
        if move.is_idle:
            return
        if group.rank in move.after:
            entries, old, new = state.recut(Cut(move.after.index(group.rank), len(move.after)))
            move_shards(group, step, entries, move, old, new)
        else:
            entries, old = state.described_tensors()
            move_shards(group, step, entries, move, old, None)
