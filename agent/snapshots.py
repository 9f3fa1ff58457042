"""Snapshots on this node: the workers' slices in the agent's memory, the keeper that protects them, and what the controller
asks of both.

It performs and decides nothing: what is captured and when is the workers', what is restored or written to the durable tier
is the controller's, how shards are exchanged the keeper's. It must never look into a tensor, and never makes training wait.
"""

from __future__ import annotations

import asyncio
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from agent.durable import Durable
from agent.keeping import KeeperProcess, Launch
from agent.keys import Keys
from agent.memory import HeldSlice, MemoryService
from agent.orders import AssemblyOrder, KeeperSettings
from agent.protection import World
from agent.store import StoreService
from elastic.checksum import crc32
from elastic.domain import (
    NO_STEP,
    AssembleSnapshot,
    CheckpointFound,
    CheckpointSaved,
    FindCheckpoint,
    FindSnapshots,
    Plan,
    PlanNode,
    SaveCheckpoint,
    SnapshotAssembled,
    SnapshotHolding,
    SnapshotsFound,
)
from elastic.errors import CheckpointError, TransferError, Unreachable
from elastic.logs import Log
from elastic.snapshots import Slice, SnapshotId
from recovery.plan import protection_groups

PLANS_KEPT = 64
LOOK_S, LOOK_AGAIN_S = 0.1, 2.0
"""Between two questions for the keepers of other nodes: until all are known, and after that, since one may be another."""
PEER_TIMEOUT_S = 2.0
KEEPERS_TIMEOUT_S = 20.0
ASSEMBLY_TIMEOUT_S = 600.0
RESTART_S = 1.0
SAID_AGAIN_S = 10.0


class NodeSnapshots:
    """The snapshots that this node holds.

    Args:
        job, node: Whose and where they are.
        address: At which other nodes' keepers reach this node's.
        socket_path: Where the node's workers ask for memory.
        budget_bytes: What snapshots and parity may take.
        store: Knows the agents of other nodes.
        launch: Starts a keeper.
        keys: What slices and parity are encrypted with on their way between nodes; None for not at all.
        log: Where it is said if something cannot be protected.
    """

    def __init__(
        self,
        job: str,
        node: str,
        address: str,
        socket_path: Path,
        budget_bytes: int,
        store: StoreService,
        launch: Launch,
        keys: Keys | None = None,
        log: Log | None = None,
    ) -> None:
        self.socket_path = socket_path
        self._job, self._node, self._address = job, node, address
        self._budget_bytes = budget_bytes
        self._store = store
        self._launch = launch
        self._keys = keys
        self._log = log or Log("agent", job, node)
        self._public_keys: dict[str, str] = {}  # of other nodes' keepers, as the controller says
        self._memory = MemoryService(socket_path, budget_bytes)
        self._durables: dict[tuple[str, int], Durable] = {}
        self._plans: dict[int, Plan] = {}
        self._plan = Plan()  # of the newest committed world
        self._keeper: KeeperProcess | None = None
        self._starting = asyncio.Lock()
        self._parity_bytes = 0  # what the keeper may take
        self._entered = Plan()  # the newest world that the keeper was told of
        self._peers: Mapping[str, str] = {}  # where it was told that the others listen
        self._told: set[tuple[SnapshotId, int]] = set()  # slices that it was told of
        self._covered: set[SnapshotId] = set()  # of which all parity that this node holds is complete
        self._forgotten = NO_STEP
        self._weak_at = -math.inf  # when it was said that a snapshot is not protected
        self._restored: SnapshotId | None = None  # what the job goes back to, until a newer one is stable
        self._offered_at: int | None = None  # what was stable when the controller was told what is here
        self._tasks: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None
        store.on_keeper_needed = self._keeper_needed

    @property
    def public_key(self) -> str:
        """What other nodes' keepers know this node's by; "" where nothing is encrypted."""
        return "" if self._keys is None else self._keys.public

    async def start(self) -> None:
        """Serve the workers. Raises OSError."""
        await self._memory.start()

    async def close(self) -> None:
        """Let go of everything."""
        for task in self._tasks:
            task.cancel()
        if self._keeper is not None:
            await self._keeper.stop()
        await self._memory.close()

    # -- what happens on this node ---------------------------------------------------------------------------------

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

    @property
    def used_bytes(self) -> int:
        """What snapshots take of this node's memory, without their parity."""
        return self._memory.used_bytes

    def world_prepared(self, plan: Plan) -> None:
        """A worker of this node was told to prepare for a world."""
        self._plans[plan.generation] = plan
        self._learn_keys(plan.nodes)
        for generation in sorted(self._plans)[:-PLANS_KEPT]:
            del self._plans[generation]

    def _learn_keys(self, nodes: Iterable[PlanNode]) -> None:
        self._public_keys |= {node.node: node.data_key for node in nodes}

    def world_committed(self, generation: int) -> None:
        """A worker of this node was told that a world is committed: its snapshots are protected from now on."""
        plan = self._plans.get(generation)
        if plan is None or generation <= self._plan.generation:
            return
        self._plan, self._offered_at = plan, None
        if self._following is not None:
            self._following.cancel()
            self._following = None
        if plan.parity_shards or self._keeper is not None:
            self._following = self._spawn(self._follow(plan))

    def tick(self) -> None:
        """Let go of what nobody needs any more, and tell the keeper of what has come."""
        stable = self.stable
        if self._restored is not None and self._restored.step < stable:
            self._restored = None
        # What was offered may be chosen, until a world has what it needs or the last one turns out to go on.
        if self._offered_at is None or stable > self._offered_at:
            self._memory.forget_before(
                stable, None if stable == NO_STEP else self._plan.generation, but=self._restored
            )
        if self._restored is None:
            self._memory.drop_adopted()
        if self._keeper is not None:
            self._tell_slices(self._keeper)

    def _spawn(self, work) -> asyncio.Task[None]:  # type: ignore[no-untyped-def]
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._say(f"snapshots are not protected: {error}")

    def _say(self, sentence: str) -> None:
        self._log.say(sentence)

    # -- the keeper ------------------------------------------------------------------------------------------------

    def _keeper_needed(self) -> None:
        """Another node is to read what this one holds: for a checkpoint, say, of snapshots that nothing protects."""
        is_following = self._following is not None and not self._following.done()
        if not is_following and len(self._plan.nodes) > 1:
            self._following = self._spawn(self._follow(self._plan))

    async def _running_keeper(self) -> KeeperProcess:
        """The keeper; started when it is first needed. Raises Unreachable."""
        async with self._starting:
            data, parity = self._plan.data_shards, self._plan.parity_shards
            if parity and not self._parity_bytes:
                await self._end_keeper()  # it was started to read, and there is something to protect now
            if self._keeper is None:
                self._parity_bytes = self._budget_bytes * parity // (data + parity) if parity else 0
                self._memory.limit(self._budget_bytes - self._parity_bytes)
                settings = KeeperSettings(address=self._address, parity_bytes_max=self._parity_bytes)
                if self._keys is not None:
                    settings = replace(settings, public_key=self._keys.public, secret_key=self._keys.secret)
                keeper = KeeperProcess(settings, self, self._launch)
                await keeper.start()
                self._keeper = keeper
        return self._keeper

    async def _end_keeper(self) -> None:
        """Let go of the keeper; another one, which knows nothing, is started when it is needed."""
        keeper, self._keeper = self._keeper, None
        self._entered, self._peers = Plan(), {}
        self._told.clear()
        self._covered.clear()
        self._forgotten = NO_STEP
        self._store.keeper_address = ""
        if keeper is not None:
            await keeper.stop()

    async def _follow(self, plan: Plan) -> None:
        """Tell the keeper where those of the others in a world are, and again when one has moved or it is another."""
        entered: tuple[KeeperProcess, Mapping[str, str]] | None = None
        while True:
            try:
                keeper = await self._running_keeper()
            except Unreachable as error:
                self._say(str(error))
                await asyncio.sleep(RESTART_S)
                continue
            found = await self._keepers_of(plan.nodes)
            is_complete = len(found) == len(plan.nodes) - (self._node in {node.node for node in plan.nodes})
            if is_complete and (keeper, found) != entered:
                entered = (keeper, found)
                self._enter(keeper, plan, found)
            await asyncio.sleep(LOOK_AGAIN_S if is_complete else LOOK_S)

    async def _keepers_of(self, nodes: Iterable[PlanNode]) -> dict[str, str]:
        """Where the keepers of other nodes listen, of those that say so."""
        others = [node for node in nodes if node.node != self._node]
        found = await asyncio.gather(
            *(self._store.keeper_of(node.node, node.peer_address, PEER_TIMEOUT_S) for node in others)
        )
        return {node.node: address for node, address in zip(others, found, strict=True) if address}

    def _enter(self, keeper: KeeperProcess, plan: Plan, peers: Mapping[str, str]) -> None:
        """Tell the keeper of the world that it is in, and of those before of which it has slices."""
        self._entered, self._peers = plan, peers
        for generation in sorted({snapshot.generation for snapshot, _ in self._told}):
            self._tell_world_before(keeper, generation)
        self._tell_world(keeper, plan)
        self._tell_slices(keeper)

    def _tell_world(self, keeper: KeeperProcess, plan: Plan) -> None:
        slices: dict[str, tuple[int, ...]] = {}
        for member in plan.members:
            slices[member.node] = (*slices.get(member.node, ()), member.rank)
        keys = {node: self._public_keys.get(node, "") for node in self._peers} if self._keys is not None else {}
        keeper.enter(World(plan.generation, self._node, self._peers, slices, protection_groups(plan)), keys)

    def _tell_world_before(self, keeper: KeeperProcess, generation: int) -> None:
        """A world may be over before this keeper was told of it; what was captured in it is still to be had."""
        if generation < self._entered.generation and generation in self._plans:
            self._tell_world(keeper, self._plans[generation])

    def _tell_slices(self, keeper: KeeperProcess) -> None:
        """Tell the keeper what is stable and what has come, in this order: what it lets go of for a slice depends on it."""
        held = self._memory.held()
        stable = self.stable  # read after the slices: a worker shows it before it captures the first one of a new world
        if stable > self._forgotten:
            self._forgotten = stable
            self._covered = {snapshot for snapshot in self._covered if snapshot.step >= stable}
            self._told = {(snapshot, index) for snapshot, index in self._told if snapshot.step >= stable}
            self._spawn(keeper.forget(stable))
        for one in held:
            name, snapshot = (one.slice.snapshot, one.slice.index), one.slice.snapshot
            if name not in self._told and snapshot.step >= stable and snapshot.generation in self._plans:
                self._told.add(name)
                self._tell_world_before(keeper, snapshot.generation)
                keeper.hold(one.slice, one.fd)

    # What the keeper says (`agent.keeping.Listener`).

    def keeper_bound(self, address: str) -> None:
        self._covered.clear()  # the one before had it
        self._store.keeper_address = address

    def slice_held(self, part: Slice) -> None:
        return

    def protected(self, snapshot: SnapshotId) -> None:
        self._memory.show_protected(snapshot)

    def covered(self, snapshot: SnapshotId, is_covered: bool) -> None:
        (self._covered.add if is_covered else self._covered.discard)(snapshot)

    def vulnerable(self, snapshot: SnapshotId, reason: str) -> None:
        now = asyncio.get_running_loop().time()
        if not self._plan.parity_shards:
            return  # nobody has asked for protection
        if now - self._weak_at > SAID_AGAIN_S:  # a node that stays away makes one snapshot after the other weak
            self._weak_at = now
            self._say(f"the snapshot of step {snapshot.step} is not protected: {reason}")

    def keeper_progress(self, counted: Mapping[str, int]) -> None:
        return

    def keeper_gone(self, reason: str) -> None:
        self._say(reason)
        self._spawn(self._end_keeper())  # `_follow` starts another, or whoever needs it to restore

    # -- restoring -------------------------------------------------------------------------------------------------

    async def find(self, order: FindSnapshots) -> SnapshotsFound:
        """Say which slices and which parity are here, whole and intact."""
        if len(self._plan.nodes) > 1 and self._keeper is None:
            self._spawn(self._running_keeper())  # others will ask it
        self._offered_at = self.stable
        await self._memory.check(again=True)
        held: dict[SnapshotId, list[int]] = {snapshot: [] for snapshot in self._covered}
        for one in self._memory.held():
            held.setdefault(one.slice.snapshot, []).append(one.slice.index)
        return SnapshotsFound(
            order.search,
            tuple(
                SnapshotHolding(s.step, s.generation, tuple(sorted(indices)), s in self._covered)
                for s, indices in sorted(held.items())
            ),
        )

    async def assemble(self, order: AssembleSnapshot) -> SnapshotAssembled:
        """Have every slice of a snapshot here, so that this node's workers can read it."""
        self._restored = snapshot = SnapshotId(order.step, order.generation)
        self._memory.drop_adopted(but=snapshot)
        self._memory.go_back(order.step)
        if order.step < self._forgotten:
            await self._end_keeper()  # it would take what is captured from now on for outdated
        try:
            if order.checkpoint:
                await self._read_checkpoint(order)
            else:
                if self._holds_all(snapshot, order.world) and len(order.nodes) > 1:
                    self._spawn(self._introduced(order.world, order.nodes))  # others read here what this node has
                sources = {source.slice: source.node for source in order.sources}
                for piece, fd in await self._gathered(snapshot, order.world, order.nodes, sources, order.decoded):
                    self._memory.adopt(piece, fd)
        except (CheckpointError, TransferError, Unreachable) as error:
            return SnapshotAssembled(order.search, str(error))
        return SnapshotAssembled(order.search)

    def _holds_all(self, snapshot: SnapshotId, world: Plan) -> bool:
        return self._held(snapshot).keys() >= set(range(world.world_size))

    def _held(self, snapshot: SnapshotId) -> dict[int, HeldSlice]:
        return {one.slice.index: one for one in self._memory.held() if one.slice.snapshot == snapshot}

    async def _gathered(
        self,
        snapshot: SnapshotId,
        world: Plan,
        nodes: Sequence[PlanNode],
        sources: Mapping[int, str],
        decoded: Sequence[str] = (),
    ) -> list[tuple[Slice, int]]:
        """The slices of a snapshot of `world` that are not here, read from other nodes or decoded, in memory files."""
        if self._holds_all(snapshot, world):
            return []
        keeper = await self._introduced(world, nodes)
        order = AssemblyOrder(snapshot, world.world_size, sources, tuple(decoded), protection_groups(world))
        return await keeper.assemble(order, ASSEMBLY_TIMEOUT_S)

    async def _introduced(self, world: Plan, nodes: Sequence[PlanNode]) -> KeeperProcess:
        """The keeper, which knows those of the other nodes and the world whose slices they ask each other for.

        Raises:
            Unreachable: it does not start, or those of others do not.
        """
        keeper = await self._running_keeper()
        self._plans.setdefault(world.generation, world)
        self._learn_keys(nodes)
        needed = [node for node in nodes if node.node != self._node]
        deadline = asyncio.get_running_loop().time() + KEEPERS_TIMEOUT_S
        while len(peers := await self._keepers_of(needed)) < len(needed):
            if asyncio.get_running_loop().time() > deadline:
                silent = sorted({node.node for node in needed} - peers.keys())
                raise Unreachable(f"The keepers of {', '.join(silent)} did not say where they listen; order again.")
            await asyncio.sleep(LOOK_S)
        self._enter(keeper, max(world, self._entered, key=lambda plan: plan.generation), peers)
        return keeper

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
        slices: list[tuple[Slice, int]] = []
        try:
            slices = await self._copied()
            path = await self._durable(order.target, order.keep).write(slices)
        except (CheckpointError, TransferError, Unreachable) as error:
            return CheckpointSaved(order.number, refusal=str(error))
        finally:
            for _, fd in slices:
                os.close(fd)
        if path is None:
            return CheckpointSaved(order.number, refusal="a newer one was asked for before its turn came")
        return CheckpointSaved(order.number, slices[0][0].snapshot.step, path)

    async def _copied(self) -> list[tuple[Slice, int]]:
        """Copies of all slices of one snapshot, since writing takes longer than the workers can do without the memory."""
        self._memory.pause(True)  # nobody captures while one of them may not
        try:
            await self._memory.check()
            stable = [one.slice for one in self._memory.held() if one.slice.snapshot.step == self.stable]
            here = [piece for piece in stable if piece.snapshot.generation in self._plans]
            if not here:
                raise CheckpointError("This node holds no part of a stable snapshot yet: ask again after the next one.")
            snapshot, total_bytes = here[0].snapshot, here[0].total_bytes
            if total_bytes > self._memory.free_bytes:
                raise CheckpointError(
                    f"A checkpoint needs {total_bytes >> 20} MiB beside the snapshots, and {self._memory.free_bytes >> 20} MiB "
                    "of --snapshot-memory are free: set it higher on every node."
                )
            plan = self._plans[snapshot.generation]
            sources = {member.rank: member.node for member in plan.members}
            copies = await asyncio.to_thread(_copy, list(self._held(snapshot).values()))
            try:
                copies += await self._gathered(snapshot, plan, plan.nodes, sources)
            except BaseException:
                for _, fd in copies:
                    os.close(fd)
                raise
            return sorted(copies, key=lambda copy: copy[0].index)
        finally:
            self._memory.pause(False)


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
