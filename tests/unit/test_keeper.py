"""Real keepers on loopback: what is protected survives any m of them, and damage is found."""

from __future__ import annotations

import asyncio

import pytest

from elastic.snapshots import SnapshotId
from tests.unit.keepers import Site

MIB = 1 << 20
FIRST, SECOND = SnapshotId(7, 1), SnapshotId(8, 1)


@pytest.mark.parametrize(("k", "m"), [(2, 1), (2, 2)])
def test_any_m_nodes_may_be_lost_and_a_new_one_gets_every_byte(k: int, m: int) -> None:
    async def scenario() -> None:
        async with Site(k, m, per_node=2) as site:
            count = 2 * (k + m)
            sizes = [MIB + 97 * index * (index + 3) for index in range(count - 1)] + [0]
            site.capture(FIRST, sizes)
            await site.until_protected(FIRST)
            lost = site.group.nodes[1 : 1 + m]
            await site.lose(*lost)
            await site.join("new")
            site.enter(2)
            missing = {index for index, name in site.owner.items() if name != "node-0"}
            assert await site.assemble("node-0", FIRST, lost) == missing
            assert await site.assemble("new", FIRST, lost) == set(range(count))

    asyncio.run(scenario())
