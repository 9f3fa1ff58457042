"""How fast keepers protect a snapshot and decode the shard of a lost node, over TCP on loopback.

    python -m benchmarks.exchange [--quick] [--json] [--shard-mib N]

Real keeper processes, one a node, exchange parity of one snapshot after another; then one node is taken for lost and a
new one, which has none of its group's blocks, assembles its shard, and its alone, from the others. Every byte that is
assembled is held against its checksum by the keeper, as always. Rates are bytes of shards per second: to protect, those
of all nodes together; to decode, of the one that is rebuilt, for which k times as much is read. All keepers share this
machine's cores, so that on a real cluster each would have more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from agent.keeping import KeeperProcess, launcher
from agent.orders import AssemblyOrder, KeeperSettings
from agent.protection import World
from benchmarks.report import Reporter, command, main_of
from elastic.config import current_environment
from elastic.snapshots import Slice, SnapshotId
from recovery.placement import ProtectionGroup

CODES = ((2, 1), (2, 2))
DEADLINE_S = 120.0
MIB = 1 << 20
SHARD_MIB = 320


class Node:
    """A keeper and the memory of one slice, which every snapshot has anew."""

    def __init__(self, name: str, index: int, count: int, size_bytes: int) -> None:
        self.name, self.index, self.count, self.size_bytes = name, index, count, size_bytes
        self.keeper = KeeperProcess(KeeperSettings(), self, launcher(current_environment()))
        self.address = ""
        self.is_protected: dict[SnapshotId, asyncio.Event] = {}
        self._fd = os.memfd_create("slice")
        for offset in range(0, size_bytes, MIB):
            os.write(self._fd, os.urandom(min(MIB, size_bytes - offset)))

    def keeper_bound(self, address: str) -> None:
        self.address = address

    def slice_held(self, part: Slice) -> None:
        return

    def protected(self, snapshot: SnapshotId) -> None:
        self.is_protected.setdefault(snapshot, asyncio.Event()).set()

    def covered(self, snapshot: SnapshotId) -> None:
        return

    def vulnerable(self, snapshot: SnapshotId, reason: str) -> None:
        raise RuntimeError(reason)

    def keeper_progress(self, counted: Mapping[str, int]) -> None:
        return

    def keeper_gone(self, reason: str) -> None:
        raise RuntimeError(reason)

    def hold(self, snapshot: SnapshotId, keeper: KeeperProcess | None = None) -> None:
        """Give the slice to this node's keeper, or to another."""
        begin, total = self.index * self.size_bytes, self.count * self.size_bytes
        part = Slice(snapshot, self.index, self.count, begin, begin + self.size_bytes, total, 0)
        (keeper or self.keeper).hold(part, self._fd)

    async def until_protected(self, snapshot: SnapshotId) -> None:
        await self.is_protected.setdefault(snapshot, asyncio.Event()).wait()

    async def stop(self) -> None:
        await self.keeper.stop()
        os.close(self._fd)


async def measure_code(k: int, m: int, size_bytes: int, rounds: int) -> dict[str, Any]:
    """Return the rates of one code, in GB/s."""
    group = ProtectionGroup(tuple(f"node-{index}" for index in range(k + m)), k, m)
    nodes = [Node(name, index, k + m, size_bytes) for index, name in enumerate(group.nodes)]
    started = [*nodes]
    protecting_s, decoding_s = [], []
    try:
        await asyncio.gather(*(node.keeper.start() for node in nodes))
        peers = {node.name: node.address for node in nodes}
        slices = {node.name: (node.index,) for node in nodes}
        for node in nodes:
            node.keeper.enter(World(1, node.name, peers, slices, (group,)))
        for step in range(rounds + 1):
            snapshot = SnapshotId(step, 1)
            before_s = time.perf_counter()
            for node in nodes:
                node.hold(snapshot)
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.gather(*(node.until_protected(snapshot) for node in nodes))
            protecting_s.append(time.perf_counter() - before_s)
            await asyncio.gather(*(node.keeper.forget(step) for node in nodes))
        lost, *left = nodes
        replacement = Node("replacement", k + m, k + m, 0)
        started.append(replacement)
        await replacement.keeper.start()
        replacement.keeper.enter(World(1, replacement.name, peers, slices, (group,)))
        for node in left:  # decoding is measured alone, so it has the slices that are not lost
            node.hold(snapshot, replacement.keeper)
        order = AssemblyOrder(snapshot, k + m, {node.index: node.name for node in left}, (lost.name,), (group,))
        for _ in range(rounds + 1):
            before_s = time.perf_counter()
            ((_, fd),) = await replacement.keeper.assemble(order, DEADLINE_S)
            decoding_s.append(time.perf_counter() - before_s)
            os.close(fd)
    finally:
        await asyncio.gather(*(node.stop() for node in started))
    gigabytes = size_bytes / 1e9
    return {
        "k": k,
        "m": m,
        "protect_first_gbps": round((k + m) * gigabytes / protecting_s[0], 3),
        "protect_gbps": round((k + m) * gigabytes / statistics.median(protecting_s[1:]), 3),
        "decode_gbps": round(gigabytes / statistics.median(decoding_s[1:]), 3),
        "decode_gbps_best": round(gigabytes / min(decoding_s), 3),
    }


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Measure each code; returns the report."""
    rounds = 3 if arguments.quick else 10
    size_bytes = arguments.shard_mib * MIB
    codes = []
    for k, m in CODES:
        reporter.say(f"({k},{m}): {k + m} keepers, shards of {arguments.shard_mib} MiB")
        codes.append(asyncio.run(measure_code(k, m, size_bytes, rounds)))
    return {"shard_bytes": size_bytes, "rounds": rounds, "codes": codes}, True


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    title = f"keepers on loopback, shards of {report['shard_bytes'] / MIB:.0f} MiB, GB/s"
    table = Table("code", "protect, first", "protect", "decode", "best", title=title)
    for code in report["codes"]:
        rates = ("protect_first_gbps", "protect_gbps", "decode_gbps", "decode_gbps_best")
        table.add_row(f"({code['k']},{code['m']})", *(f"{code[name]:.2f}" for name in rates))
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--shard-mib", type=int, default=SHARD_MIB, help=f"of each node [{SHARD_MIB}]")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
