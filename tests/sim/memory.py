"""What an agent's memory holds of snapshots, and how agents protect them; the deciding code is the real one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from elastic.domain import Plan, SnapshotHolding
from elastic.snapshots import SnapshotId
from recovery.placement import ProtectionGroup
from recovery.plan import protection_groups

MISSES = 0.05  # of captures that were agreed on


@dataclass(frozen=True)
class Shot:
    """One slice."""

    snapshot: SnapshotId
    index: int
    digest: int


@dataclass
class Memory:
    """Of one agent; it dies with it, and outlives its workers."""

    buffers: dict[str, list[Shot | None]] = field(default_factory=dict)  # of each worker that ever was
    parity: set[SnapshotId] = field(default_factory=set)
    protected: SnapshotId | None = None
    readable: dict[SnapshotId, tuple[Shot, ...]] = field(default_factory=dict)  # assembled for this node's workers

    def shots(self, snapshot: SnapshotId) -> dict[int, Shot]:
        """Slices of one snapshot, by number."""
        return {shot.index: shot for shot in self._held() if shot.snapshot == snapshot}

    def _held(self) -> list[Shot]:
        captured = [shot for buffers in self.buffers.values() for shot in buffers if shot is not None]
        return [*captured, *(shot for shots in self.readable.values() for shot in shots)]

    def holdings(self) -> tuple[SnapshotHolding, ...]:
        snapshots = {shot.snapshot for shot in self._held()}
        return tuple(
            SnapshotHolding(s.step, s.generation, tuple(sorted(self.shots(s))), s in self.parity)
            for s in sorted(snapshots | self.parity)
        )

    def has_all_of(self, node: str, snapshot: SnapshotId, plan: Plan) -> bool:
        """Whether all slices are here that workers of this node captured."""
        mine = {member.rank for member in plan.members if member.node == node}
        return mine <= set(self.shots(snapshot))


def group_of(plan: Plan, node: str) -> ProtectionGroup | None:
    """The protection group of a node in a world."""
    return next((group for group in protection_groups(plan) if node in group.nodes), None)


def assemble(
    memories: Mapping[str, Memory], plan: Plan, snapshot: SnapshotId, sources: Mapping[int, str], decoded: tuple[str, ...]
) -> int | None:
    """The state of a snapshot, if every slice can be read from its source or decoded from the rest of its group."""
    digests = set()
    for index, node in sources.items():
        shot = memories[node].shots(snapshot).get(index) if node in memories else None
        if shot is None:
            return None
        digests.add(shot.digest)
    for node in decoded:
        group = group_of(plan, node)
        assert group is not None
        others = [n for n in group.nodes if n != node and n in memories]
        whole = [n for n in others if memories[n].has_all_of(n, snapshot, plan) and snapshot in memories[n].parity]
        if len(whole) < group.k:
            return None
    assert len(digests) <= 1, f"slices of {snapshot} are of different states: {digests}"
    return digests.pop() if digests else None


class Capturer:
    """A worker's buffers, as its agent's memory holds them."""

    def __init__(self, memory: Memory, worker: str, buffers: int, random: Random) -> None:
        self._memory = memory
        self._random = random
        self._buffers: list[Shot | None] = [None] * buffers
        memory.buffers[worker] = self._buffers
        self.digest = 0  # of the worker's state
        self.cost_s = 0.001

    @property
    def protected(self) -> SnapshotId | None:
        return self._memory.protected

    def _free(self, generation: int, stable: int) -> list[int]:
        return [
            number
            for number, shot in enumerate(self._buffers)
            if shot is None
            or shot.snapshot.step < stable
            or (shot.snapshot.generation != generation and shot.snapshot.step != stable)
        ]

    def has_room(self, generation: int, stable: int) -> bool:
        self.show_stable(stable)
        return bool(self._free(generation, stable))

    def show_stable(self, step: int) -> None:
        self._stable = step

    def capture(self, step: int, generation: int, index: int, count: int) -> bool:
        free = self._free(generation, self._stable)
        if not free or self._random.random() < MISSES:
            return False  # what was free has become stable with this very verdict, or its memory is still being made
        number = min(free, key=lambda n: (shot.snapshot.step if (shot := self._buffers[n]) is not None else -1, n))
        self._buffers[number] = Shot(SnapshotId(step, generation), index, self.digest)
        return True

    def discard(self, snapshot: SnapshotId) -> None:
        self._buffers[:] = [None if shot is not None and shot.snapshot == snapshot else shot for shot in self._buffers]

    def finish(self) -> None:
        return
