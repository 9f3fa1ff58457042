"""Snapshots on this node: the workers' slices in the agent's memory, what of them the controller asks, and what is told to
workers about them.

It performs and decides nothing: what is captured and when is the workers', what is restored the controller's. It must never
look into a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from agent.memory import MemoryService
from elastic.domain import AssembleSnapshot, FindSnapshots, SnapshotAssembled, SnapshotHolding, SnapshotsFound
from elastic.snapshots import SnapshotId


class NodeSnapshots:
    """The snapshots that this node holds.

    Args:
        socket_path: Where its workers ask for memory.
        budget_bytes: What snapshots may take.
    """

    def __init__(self, socket_path: Path, budget_bytes: int) -> None:
        self.socket_path = socket_path
        self._memory = MemoryService(socket_path, budget_bytes)

    async def start(self) -> None:
        """Serve the workers. Raises OSError."""
        await self._memory.start()

    async def close(self) -> None:
        """Let go of everything."""
        await self._memory.close()

    def worker_started(self, worker: str, pid: int) -> None:
        """A worker may ask for memory from now on."""
        self._memory.expect(worker, pid)

    def worker_ended(self, worker: str) -> None:
        """Its slices stay."""
        self._memory.worker_gone(worker)

    @property
    def stable(self) -> int:
        """Newest step whose snapshot the whole world holds, as far as this node's workers know; -1 for none."""
        return self._memory.stable

    def tick(self) -> None:
        """Let go of what nobody needs any more."""
        self._memory.forget_before(self.stable)

    async def find(self, order: FindSnapshots) -> SnapshotsFound:
        """Say which slices are here, whole and intact."""
        await self._memory.check()
        held: dict[SnapshotId, list[int]] = {}
        for one in self._memory.held():
            held.setdefault(one.slice.snapshot, []).append(one.slice.index)
        return SnapshotsFound(
            order.search,
            tuple(SnapshotHolding(s.step, s.generation, tuple(sorted(indices))) for s, indices in sorted(held.items())),
        )

    async def assemble(self, order: AssembleSnapshot) -> SnapshotAssembled:
        """Have every slice of a snapshot here, so that this node's workers can read it."""
        snapshot = SnapshotId(order.step, order.generation)
        here = {one.slice.index for one in self._memory.held() if one.slice.snapshot == snapshot}
        missing = sorted(set(range(order.slices)) - here)
        if missing:
            return SnapshotAssembled(order.search, _lack(missing, {s.slice: s.node for s in order.sources}))
        return SnapshotAssembled(order.search)


def _lack(missing: list[int], sources: Mapping[int, str]) -> str:
    nodes = sorted({sources.get(index, "no node") for index in missing})
    return f"slices {missing} are not here, but on {', '.join(nodes)}"
