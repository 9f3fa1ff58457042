"""A node's snapshots: its keeper is there for as long as it is needed, and what was said to be held can be had."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.keeping import RESTARTS_MAX, Launched
from agent.snapshots import NodeSnapshots
from agent.store import StoreService
from elastic.domain import (
    AssembleSnapshot,
    FindSnapshots,
    Member,
    Plan,
    PlanNode,
    SliceSource,
    SnapshotAssembled,
    SnapshotHolding,
)
from elastic.memory import SnapshotMemory
from elastic.snapshots import SnapshotId
from elastic.v1 import runtime_pb2_grpc
from elastic.wire import channels
from tests.unit.keepers import DEADLINE_S, fork, make_slices

ALONE = Plan(
    generation=1, members=(Member("a.1", node="a"),), nodes=(PlanNode("a", "", ""),), data_shards=1, parity_shards=1
)


class Launches:
    """Starts keepers, or fails to."""

    def __init__(self) -> None:
        self.all: list[Launched] = []
        self.failures = 0

    async def __call__(self, fd: int) -> Launched:
        if self.failures:
            self.failures -= 1
            raise OSError("the standby is away")
        self.all.append(await fork(fd))
        return self.all[-1]


async def until_bound(store: StoreService, before: str = "") -> str:
    async with asyncio.timeout(DEADLINE_S):
        while store.keeper_address in ("", before):
            await asyncio.sleep(0.01)
    return store.keeper_address


def test_a_keeper_that_cannot_be_started_or_dies_again_and_again_is_followed_by_another(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        store, launches = StoreService("a"), Launches()
        launches.failures = 1
        snapshots = NodeSnapshots("job", "a", "127.0.0.1", tmp_path / "memory", 2**20, store, launches)
        await snapshots.start()
        snapshots.world_prepared(ALONE)
        snapshots.world_committed(1)
        address = await until_bound(store)
        for _ in range(RESTARTS_MAX + 2):
            os.kill(launches.all[-1].pid, 9)
            address = await until_bound(store, address)
        await snapshots.close()

    asyncio.run(scenario())
    said = capfd.readouterr().err
    assert "the standby is away" in said and f"died {RESTARTS_MAX + 1} times within" in said


class Node:
    """What an agent has of snapshots, with one worker, which this process is."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.store = StoreService(name)
        path = folder / f"{name}.memory"
        self.snapshots = NodeSnapshots("job", name, "127.0.0.1", path, 2**24, self.store, fork)
        self.link = SnapshotMemory(path, self.worker, DEADLINE_S)
        self.captured = 0

    @property
    def worker(self) -> str:
        return f"{self.name}/0.1"

    async def start(self) -> PlanNode:
        self.server = channels.server()
        runtime_pb2_grpc.add_StoreServicer_to_server(self.store, self.server)
        port = channels.listen(self.server, "127.0.0.1", 0, what="the agent")
        await self.server.start()
        await self.snapshots.start()
        self.snapshots.worker_started(self.worker, os.getpid())
        return PlanNode(self.name, "", f"127.0.0.1:{port}")

    async def close(self) -> None:
        self.link.close()
        await self.snapshots.close()
        await self.store.close()
        await self.server.stop(None)

    async def capture(self, snapshot: SnapshotId, index: int, count: int) -> None:
        """Its worker captures its slice."""
        part, content = make_slices(snapshot, [1000 + index] * count)[index]
        async with asyncio.timeout(DEADLINE_S):
            while (memory := await asyncio.to_thread(self.link.room, self.captured, part.stored_bytes, 3)) is None:
                await asyncio.sleep(0.01)
        memory[: len(content)] = content
        assert self.link.page is not None
        self.link.page.filled(self.captured, part)
        self.captured += 1


class Nodes:
    """Two nodes that hear what a controller would say."""

    def __init__(self, nodes: Sequence[Node], sites: Sequence[PlanNode]) -> None:
        self.nodes, self.sites = tuple(nodes), tuple(sites)

    def plan(self, generation: int) -> Plan:
        members = tuple(Member(node.worker, rank=rank, node=node.name) for rank, node in enumerate(self.nodes))
        return Plan(generation=generation, members=members, nodes=self.sites)

    def commit(self, generation: int) -> None:
        for node in self.nodes:
            node.snapshots.world_prepared(self.plan(generation))
            node.snapshots.world_committed(generation)

    async def find(self) -> list[tuple[SnapshotHolding, ...]]:
        """What each holds; their keepers are started for it, if they were not."""
        answers = await asyncio.gather(*(node.snapshots.find(FindSnapshots(1)) for node in self.nodes))
        for node in self.nodes:
            await until_bound(node.store)
        return [answer.holdings for answer in answers]

    async def assemble(self, step: int, generation: int) -> list[SnapshotAssembled]:
        order = AssembleSnapshot(
            search=1,
            step=step,
            generation=generation,
            slices=len(self.nodes),
            sources=tuple(SliceSource(rank, node.name) for rank, node in enumerate(self.nodes)),
            world=self.plan(generation),
            nodes=self.sites,
        )
        return list(await asyncio.gather(*(node.snapshots.assemble(order) for node in self.nodes)))


@asynccontextmanager
async def two_nodes(folder: Path) -> AsyncIterator[Nodes]:
    nodes = [Node("a", folder), Node("b", folder)]
    try:
        yield Nodes(nodes, [await node.start() for node in nodes])
    finally:
        for node in nodes:
            await node.close()


async def until_entered(nodes: Nodes, generation: int) -> None:
    """Each node's keeper has been told of the world."""
    async with asyncio.timeout(DEADLINE_S):
        while any(node.snapshots._entered.generation != generation for node in nodes.nodes):
            await asyncio.sleep(0.01)


def test_what_was_captured_in_a_world_that_was_over_before_the_keepers_knew_it_can_be_had(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_nodes(tmp_path) as nodes:
            nodes.commit(1)
            await nodes.find()
            nodes.commit(2)
            for index, node in enumerate(nodes.nodes):
                await node.capture(SnapshotId(7, 2), index, len(nodes.nodes))
            nodes.commit(3)
            await until_entered(nodes, 3)
            assert await nodes.find() == [(SnapshotHolding(7, 2, (index,)),) for index in range(2)]
            assert await nodes.assemble(7, 2) == [SnapshotAssembled(1)] * 2

    asyncio.run(scenario())


def test_a_keeper_that_is_another_since_can_be_told_of_a_world_that_is_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_nodes(tmp_path) as nodes:
            nodes.commit(1)
            await nodes.find()
            for index, node in enumerate(nodes.nodes):
                await node.capture(SnapshotId(7, 1), index, len(nodes.nodes))
            nodes.commit(2)
            await until_entered(nodes, 2)
            for node in nodes.nodes:
                node.snapshots.keeper_gone("it died too often")
            await nodes.find()
            assert await nodes.assemble(7, 1) == [SnapshotAssembled(1)] * 2

    asyncio.run(scenario())


def test_what_was_offered_is_not_let_go_of_before_a_world_has_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_nodes(tmp_path) as nodes:
            nodes.commit(1)
            for index, node in enumerate(nodes.nodes):
                await node.capture(SnapshotId(7, 1), index, len(nodes.nodes))
            nodes.commit(2)
            a = nodes.nodes[0]
            a.snapshots.worker_ended(a.worker)
            survivor = SnapshotMemory(a.snapshots.socket_path, "a/1.1", DEADLINE_S)
            a.snapshots.worker_started("a/1.1", os.getpid())
            assert await asyncio.to_thread(survivor.room, 0, 100, 1) is not None
            assert survivor.page is not None
            survivor.page.stable = 6
            assert await nodes.find() == [(SnapshotHolding(7, 1, (index,)),) for index in range(2)]
            a.snapshots.tick()
            survivor.close()
            assert await nodes.assemble(7, 1) == [SnapshotAssembled(1)] * 2

    asyncio.run(scenario())
