"""A node's snapshots: its keeper is there for as long as it is needed, however often it dies."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from agent.keeping import RESTARTS_MAX, Launched
from agent.snapshots import NodeSnapshots
from agent.store import StoreService
from elastic.domain import Member, Plan, PlanNode
from tests.unit.keepers import DEADLINE_S, fork

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
