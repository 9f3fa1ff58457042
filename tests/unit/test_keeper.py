"""Real keepers on loopback: what is protected survives any m of them, and damage is found."""

from __future__ import annotations

import asyncio
import os
import signal
from itertools import combinations

import pytest
import zmq

from agent.keeping import AssemblyError, launcher
from agent.orders import KeeperSettings
from agent.protection import World
from elastic.errors import Unreachable
from elastic.snapshots import SnapshotId
from tests.unit.keepers import Node, Site

MIB = 1 << 20
FIRST, SECOND, THIRD = SnapshotId(7, 1), SnapshotId(8, 1), SnapshotId(9, 1)


def uneven(count: int) -> list[int]:
    """Slices of odd sizes, the last one empty."""
    return [MIB + 97 * index * (index + 3) for index in range(count - 1)] + [0]


async def until_bytes_came(node: Node) -> None:
    """Wait until a keeper has received a MiB more."""
    before = node.counted["received_bytes"]
    await node.until(lambda: node.counted["received_bytes"] > before + MIB)


@pytest.mark.parametrize(("k", "m"), [(2, 1), (2, 2)])
def test_any_m_nodes_may_be_lost_and_a_new_one_gets_every_byte(k: int, m: int) -> None:
    async def scenario() -> None:
        async with Site(k, m, per_node=2) as site:
            count = 2 * (k + m)
            site.capture(FIRST, uneven(count), known=False)
            await site.until_protected(FIRST)
            lost = site.group.nodes[1 : 1 + m]
            await site.lose(*lost)
            await site.join("new")
            site.enter(2)
            missing = {index for index, name in site.owner.items() if name != "node-0"}
            assert await site.assemble("node-0", FIRST, lost) == missing
            assert await site.assemble("new", FIRST, lost) == set(range(count))

    asyncio.run(scenario())


def test_every_pair_of_nodes_of_two_and_two_can_be_decoded() -> None:
    async def scenario() -> None:
        async with Site(2, 2) as site:
            site.capture(FIRST, uneven(4))
            await site.until_protected(FIRST)
            for lost in combinations(site.group.nodes, 2):
                survivor = next(name for name in site.group.nodes if name not in lost)
                assert await site.assemble(survivor, FIRST, lost)

    asyncio.run(scenario())


def test_one_loss_too_many_is_refused_with_the_names_of_what_is_lost() -> None:
    async def scenario() -> None:
        async with Site(2, 1) as site:
            site.capture(FIRST, uneven(3))
            await site.until_protected(FIRST)
            with pytest.raises(AssemblyError, match="of node-1, node-2, 1 blocks of a stripe are left") as caught:
                await site.assemble("node-0", FIRST, ["node-1", "node-2"])
            assert caught.value.lost == ("node-1", "node-2")

    asyncio.run(scenario())


def test_a_bit_that_flipped_is_found_and_its_node_done_without() -> None:
    async def scenario() -> None:
        async with Site(2, 2) as site:
            site.capture(FIRST, uneven(4))
            await site.until_protected(FIRST)
            site.nodes["node-1"].flip(FIRST, 1, 4711)
            # Read from its owner it is damaged, so it is decoded; then it is one of the survivors as well.
            assert await site.assemble("node-0", FIRST, []) == {1, 2, 3}
            assert await site.assemble("node-0", FIRST, ["node-2"]) == {1, 2, 3}
            with pytest.raises(AssemblyError, match="blocks of a stripe are left"):
                await site.assemble("node-0", FIRST, ["node-2", "node-3"])

    asyncio.run(scenario())


def test_a_bit_that_flipped_in_parity_is_found_and_another_row_taken() -> None:
    async def scenario() -> None:
        async with Site(2, 2) as site:
            site.capture(FIRST, [2 * MIB] * 4)
            await site.until_protected(FIRST)
            assembler = site.nodes["node-0"]
            assert flip_anonymous_memory(site.nodes["node-2"].keeper.pid) > 0
            assert await site.assemble("node-0", FIRST, ["node-1"]) == {1, 2, 3}
            await assembler.until(lambda: assembler.counted["damaged"] > 0)

    asyncio.run(scenario())


def flip_anonymous_memory(pid: int) -> int:
    """Flip a bit in every 64 KiB of the shared anonymous memory of a process, which is parity; returns how many."""
    flipped = 0
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for line in maps:
            if "/dev/zero (deleted)" in line:
                begin, end = (int(bound, 16) for bound in line.split()[0].split("-"))
                for place in range(begin, end, 1 << 16):
                    memory.seek(place)
                    (byte,) = memory.read(1)
                    memory.seek(place)
                    memory.write(bytes([byte ^ 1]))
                    flipped += 1
    return flipped


def test_a_slice_that_was_damaged_before_it_was_handed_over_is_not_protected() -> None:
    async def scenario() -> None:
        async with Site(2, 1) as site:
            site.capture(FIRST, uneven(3), wrong=1)
            node = site.nodes["node-1"]
            await node.until(lambda: any("is not what it was" in reason for reason in node.reasons))
            site.capture(SECOND, uneven(3))
            await site.until_protected(SECOND)
            assert not any(FIRST in node.is_protected for node in site.nodes.values())

    asyncio.run(scenario())


def test_a_node_that_dies_while_it_is_read_from_is_decoded_instead() -> None:
    async def scenario() -> None:
        async with Site(2, 1) as site:
            site.capture(FIRST, [64 * MIB] * 3)
            await site.until_protected(FIRST)
            assembling = asyncio.create_task(site.assemble("node-0", FIRST, []))
            await until_bytes_came(site.nodes["node-0"])
            assert not assembling.done(), "it was too fast to be interrupted"
            await site.lose("node-2")
            assert await assembling == {1, 2}

    asyncio.run(scenario())


def test_a_node_that_stands_still_while_it_is_decoded_from_is_done_without() -> None:
    async def scenario() -> None:
        async with Site(2, 2) as site:
            site.capture(FIRST, [48 * MIB] * 4)
            await site.until_protected(FIRST)
            assembling = asyncio.create_task(site.assemble("node-0", FIRST, ["node-1"]))
            victim = site.nodes["node-3"].keeper.pid
            await until_bytes_came(site.nodes["node-0"])
            assert not assembling.done(), "it was too fast to be interrupted"
            os.kill(victim, signal.SIGSTOP)
            try:
                assert await assembling == {1, 2, 3}
            finally:
                os.kill(victim, signal.SIGCONT)

    asyncio.run(scenario())


def test_a_keeper_killed_during_the_exchange_is_started_again_and_all_is_protected() -> None:
    async def scenario() -> None:
        async with Site(2, 1) as site:
            site.capture(FIRST, [32 * MIB] * 3)
            victim = site.nodes["node-1"]
            before = victim.keeper.pid
            await until_bytes_came(site.nodes["node-0"])
            os.kill(before, signal.SIGKILL)
            await victim.until(lambda: victim.bound == 2)
            site.enter(1)  # the same world, but another address
            await site.until_protected(FIRST)
            assert victim.keeper.pid != before
            assert await site.assemble("node-0", FIRST, ["node-2"]) == {1, 2}

    asyncio.run(scenario())


def test_parity_that_died_with_a_keeper_is_missed_and_written_again() -> None:
    async def scenario() -> None:
        async with Site(2, 1) as site:
            site.capture(FIRST, uneven(3))
            await site.until_protected(FIRST)
            victim, other = site.nodes["node-1"], site.nodes["node-0"]
            os.kill(victim.keeper.pid, signal.SIGKILL)
            await victim.until(lambda: victim.bound == 2)
            victim.is_protected.clear()
            site.enter(1)
            await other.until(lambda: any("started again" in reason for reason in other.reasons))
            await site.until_protected(FIRST)
            for lost in site.group.nodes:
                survivor = next(name for name in site.group.nodes if name != lost)
                await site.assemble(survivor, FIRST, [lost])

    asyncio.run(scenario())


def test_snapshots_follow_each_other_while_the_stable_one_is_kept() -> None:
    async def scenario() -> None:
        async with Site(2, 1) as site:
            for snapshot in (FIRST, SECOND, THIRD):
                site.capture(snapshot, uneven(3))
            await site.until_protected(SECOND)
            # There is parity for two; the third waits until the first is let go of.
            await asyncio.gather(*(node.keeper.forget(SECOND.step) for node in site.nodes.values()))
            await site.until_protected(THIRD)
            for snapshot in (SECOND, THIRD):
                assert await site.assemble("node-0", snapshot, ["node-1"]) == {1, 2}
            with pytest.raises(AssemblyError, match="cannot be assembled"):
                await site.assemble("node-0", FIRST, ["node-1"])

    asyncio.run(scenario())


def test_parity_beyond_the_budget_is_refused_in_words() -> None:
    async def scenario() -> None:
        async with Site(2, 1, settings=KeeperSettings(parity_bytes_max=MIB // 2)) as site:
            site.capture(FIRST, [2 * MIB] * 3)
            node = site.nodes["node-0"]
            await node.until(lambda: any("more than the 524288 allowed" in reason for reason in node.reasons))

    asyncio.run(scenario())


def test_an_assembly_has_its_deadline() -> None:
    async def scenario() -> None:
        async with Site(2, 1) as site:
            site.capture(FIRST, uneven(3))
            await site.until_protected(FIRST)
            with pytest.raises(Unreachable, match="was not assembled within"):
                await site.nodes["node-0"].keeper.assemble(site.order(FIRST, ["node-1"]), 0.0)
            assert await site.assemble("node-0", FIRST, ["node-1"]) == {1, 2}

    asyncio.run(scenario())


def test_with_keys_only_those_that_the_world_names_may_ask() -> None:
    async def scenario() -> None:
        pairs = [tuple(half.decode() for half in zmq.curve_keypair()) for _ in range(3)]
        settings = [KeeperSettings(public_key=public, secret_key=secret) for public, secret in pairs]
        async with Site(2, 1, settings=settings) as site:
            site.capture(FIRST, uneven(3))
            await site.until_protected(FIRST)
            assert await site.assemble("node-0", FIRST, ["node-1"]) == {1, 2}
            peers = {name: node.address for name, node in site.nodes.items()}
            keys = {name: node.settings.public_key for name, node in site.nodes.items() if name != "node-0"}
            for node in (site.nodes["node-1"], site.nodes["node-2"]):
                node.keeper.enter(World(1, node.name, peers, site.slices, (site.group,)), keys)
            await asyncio.gather(*(node.keeper.forget(0) for node in site.nodes.values()))  # it has been taken in
            os.kill(site.nodes["node-0"].keeper.pid, signal.SIGKILL)
            await site.nodes["node-0"].until(lambda: site.nodes["node-0"].bound == 2)
            with pytest.raises(AssemblyError, match="does not answer"):
                await site.assemble("node-0", FIRST, [])

    asyncio.run(scenario())


def test_a_keeper_runs_by_itself_through_the_launcher_and_ends_with_its_line() -> None:
    async def scenario() -> None:
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "HOME")}
        async with Site(2, 1) as site:
            node = await site.join("new", launcher(environment))
            assert node.address.startswith("tcp://127.0.0.1:")
            await node.keeper.stop()
            assert node.keeper.pid == 0

    asyncio.run(scenario())
