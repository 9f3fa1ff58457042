"""Snapshots on this node: the workers' slices in the agent's memory, and what the controller asks of them.

It performs and decides nothing: what is captured and when is the workers', what is restored or written to the durable tier
is the controller's. It must never look into a tensor, and never makes training wait.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from agent.durable import Durable
from agent.memory import HeldSlice, MemoryService
from elastic.checksum import crc32
from elastic.domain import (
    NO_STEP,
    AssembleSnapshot,
    CheckpointFound,
    CheckpointSaved,
    FindCheckpoint,
    FindSnapshots,
    SaveCheckpoint,
    SnapshotAssembled,
    SnapshotHolding,
    SnapshotsFound,
)
from elastic.errors import CheckpointError, TransferError
from elastic.snapshots import Slice, SnapshotId


class NodeSnapshots:
    """The snapshots that this node holds.

    Args:
        job: Whose they are.
        socket_path: Where the node's workers ask for memory.
        budget_bytes: What snapshots may take.
    """

    def __init__(self, job: str, socket_path: Path, budget_bytes: int) -> None:
        self.socket_path = socket_path
        self._job = job
        self._memory = MemoryService(socket_path, budget_bytes)
        self._durables: dict[tuple[str, int], Durable] = {}

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

    # -- restoring -------------------------------------------------------------------------------------------------

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
        try:
            if order.checkpoint:
                await self._read_checkpoint(order)
            else:
                self._check_all_here(order)
        except (CheckpointError, TransferError) as error:
            return SnapshotAssembled(order.search, str(error))
        return SnapshotAssembled(order.search)

    def _check_all_here(self, order: AssembleSnapshot) -> None:
        here = {one.slice.index for one in self._held(SnapshotId(order.step, order.generation))}
        missing = sorted(set(range(order.slices)) - here)
        if missing:
            sources = {source.slice: source.node for source in order.sources}
            nodes = sorted({sources.get(index, "no node") for index in missing})
            raise TransferError(f"slices {missing} are not here, but on {', '.join(nodes)}")

    def _held(self, snapshot: SnapshotId) -> list[HeldSlice]:
        return [one for one in self._memory.held() if one.slice.snapshot == snapshot]

    async def _read_checkpoint(self, order: AssembleSnapshot) -> None:
        durable = self._durable(order.target)
        newest = (await durable.newest(order.step + 1)).found
        if newest is None or newest.path != order.checkpoint:
            raise CheckpointError(f"The checkpoint {order.checkpoint} is not seen from this node: mount it everywhere.")
        fd = os.memfd_create("elastic-checkpoint", os.MFD_CLOEXEC)
        try:
            piece = await durable.read(newest, fd)
        except BaseException:
            os.close(fd)
            raise
        self._memory.drop_adopted()
        self._memory.adopt(piece, fd)

    # -- the durable tier ------------------------------------------------------------------------------------------

    def _durable(self, target: str, keep: int = 1) -> Durable:
        if (target, keep) not in self._durables:
            self._durables[target, keep] = Durable(target, job=self._job, keep=keep)
        return self._durables[target, keep]

    async def look(self, order: FindCheckpoint) -> CheckpointFound:
        """Look for the newest whole checkpoint."""
        try:
            newest = await self._durable(order.target).newest()
        except CheckpointError as error:
            return CheckpointFound(order.search, refusal=str(error))
        if newest.found is None:
            return CheckpointFound(order.search, passed_over=newest.passed_over)
        snapshot = newest.found.marker.snapshot.snapshot
        return CheckpointFound(
            order.search, newest.found.path, snapshot.step, snapshot.generation, newest.passed_over
        )

    async def save(self, order: SaveCheckpoint) -> CheckpointSaved:
        """Write the newest stable snapshot of a world to the durable tier."""
        copies: list[tuple[Slice, int]] = []
        try:
            copies = await self._copied(order)
            path = await self._durable(order.target, order.keep).write(copies)
        except (CheckpointError, TransferError) as error:
            return CheckpointSaved(order.number, refusal=str(error))
        finally:
            for _, fd in copies:
                os.close(fd)
        if path is None:
            return CheckpointSaved(order.number, refusal="a newer one was asked for before its turn came")
        return CheckpointSaved(order.number, copies[0][0].snapshot.step, path)

    async def _copied(self, order: SaveCheckpoint) -> list[tuple[Slice, int]]:
        """Copies of all slices of one snapshot, since writing takes longer than the workers can do without the memory."""
        self._memory.pause(True)
        try:
            await self._memory.check()
            slices = self._stable_slices(order)
            size_bytes = sum(one.slice.stored_bytes for one in slices)
            if size_bytes > self._memory.free_bytes:
                raise CheckpointError(
                    f"A checkpoint needs {size_bytes >> 20} MiB beside the snapshots, and {self._memory.free_bytes >> 20} MiB of "
                    "--snapshot-memory are free: set it higher on every node."
                )
            return await asyncio.to_thread(_copy, slices)
        finally:
            self._memory.pause(False)

    def _stable_slices(self, order: SaveCheckpoint) -> list[HeldSlice]:
        snapshots = {one.slice.snapshot for one in self._memory.held() if one.slice.snapshot.step <= self.stable}
        for snapshot in sorted(snapshots, reverse=True):
            slices = {one.slice.index: one for one in self._held(snapshot)}
            if slices.keys() == set(range(next(iter(slices.values())).slice.count)):
                return [slices[index] for index in sorted(slices)]
        raise CheckpointError(
            f"No stable snapshot is whole on node {order.world.members[0].node}: a checkpoint of a job on several nodes is not "
            "written yet."
            if self.stable != NO_STEP
            else "No snapshot is stable yet."
        )


def _copy(slices: Sequence[HeldSlice]) -> list[tuple[Slice, int]]:
    """Copy slices to memory files of their own, and see to it that nobody has written to them meanwhile."""
    copies: list[tuple[Slice, int]] = []
    try:
        for one in slices:
            fd = os.memfd_create("elastic-checkpoint", os.MFD_CLOEXEC)
            copies.append((one.slice, fd))
            done = 0
            while done < one.slice.stored_bytes:
                done += os.sendfile(fd, one.fd, done, one.slice.stored_bytes - done)
            with mmap.mmap(fd, one.slice.stored_bytes, prot=mmap.PROT_READ) as copy, memoryview(copy) as view:
                payload_crc = crc32(view[: one.slice.end - one.slice.begin])
                description_crc = crc32(view[one.slice.description_at :])
            if (payload_crc, description_crc) != (one.slice.payload_crc, one.slice.description_crc):
                raise CheckpointError(
                    f"Slice {one.slice.index} of step {one.slice.snapshot.step} was written to while it was copied."
                )
    except BaseException:
        for _, fd in copies:
            os.close(fd)
        raise
    return copies
