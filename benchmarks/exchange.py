"""How fast keepers protect a snapshot and decode the shard of a lost node, over TCP on loopback.

    python -m benchmarks.exchange [--quick] [--json] [--shard-mib N]

Real keeper processes, one a node, exchange parity of one snapshot after another; then one node is taken for lost, and a
new one that holds nothing assembles its shard, and its alone, from k others. Every byte that is assembled is held
against its checksum by the keeper, as always, and goes to memory that was never touched before. Rates are bytes of
shards per second: to protect, those of all nodes together; to decode, of the one that is rebuilt, for which k times as
much is read. All keepers share this machine's cores, and on a busy one the processor time of all of them together, in
seconds per GB of shards, says more than the rate.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from agent.keeping import KeeperProcess, launcher
from agent.orders import AssemblyOrder, KeeperSettings
from agent.protection import World
from benchmarks.report import Reporter, command, main_of
from elastic import config
from elastic.snapshots import Slice, SnapshotId
from recovery.placement import ProtectionGroup

CODES = ((2, 1), (2, 2))
DEADLINE_S = 120.0
MIB = 1 << 20
SHARD_MIB = 320


class Node:
    """A keeper and the memory of one slice, which every snapshot has anew."""

    def __init__(self, index: int, count: int, size_bytes: int) -> None:
        self.name, self.index, self.count, self.size_bytes = f"node-{index}", index, count, size_bytes
        self.keeper = KeeperProcess(
            KeeperSettings(), self, launcher(config.current_environment() | {"OMP_NUM_THREADS": "1"})
        )
        self.address = ""
        self.is_protected: dict[SnapshotId, asyncio.Event] = {}
        self._fd = os.memfd_create("slice")
        os.ftruncate(self._fd, size_bytes)
        with mmap.mmap(self._fd, size_bytes) as memory:
            for offset in range(0, size_bytes, MIB):
                memory[offset : offset + MIB] = os.urandom(min(MIB, size_bytes - offset))

    def keeper_bound(self, address: str) -> None:
        self.address = address

    def slice_held(self, part: Slice) -> None:
        return

    def protected(self, snapshot: SnapshotId) -> None:
        self.is_protected.setdefault(snapshot, asyncio.Event()).set()

    def covered(self, snapshot: SnapshotId, is_covered: bool) -> None:
        return

    def vulnerable(self, snapshot: SnapshotId, reason: str) -> None:
        raise RuntimeError(reason)

    def keeper_progress(self, counted: Mapping[str, int]) -> None:
        return

    def keeper_gone(self, reason: str) -> None:
        raise RuntimeError(reason)

    def cpu_s(self) -> float:
        """The processor time that its keeper has taken so far."""
        times = psutil.Process(self.keeper.pid).cpu_times()
        return float(times.user + times.system)

    def hold(self, snapshot: SnapshotId) -> None:
        begin, total = self.index * self.size_bytes, self.count * self.size_bytes
        part = Slice(snapshot, self.index, self.count, begin, begin + self.size_bytes, total, 0)
        self.keeper.hold(part, self._fd)

    async def until_protected(self, snapshot: SnapshotId) -> None:
        await self.is_protected.setdefault(snapshot, asyncio.Event()).wait()


async def measure_code(k: int, m: int, size_bytes: int, rounds: int) -> dict[str, Any]:
    """Return the rates of one code, in GB/s."""
    group = ProtectionGroup(tuple(f"node-{index}" for index in range(k + m)), k, m)
    nodes = [Node(index, k + m, size_bytes) for index in range(k + m)]
    newcomer = Node(k + m, k + m, 1)
    everybody = [*nodes, newcomer]
    protecting_s, decoding_s = [], []
    try:
        await asyncio.gather(*(node.keeper.start() for node in everybody))
        peers = {node.name: node.address for node in everybody}
        for node in everybody:
            slices = {other.name: (other.index,) for other in nodes}
            node.keeper.enter(World(1, node.name, peers, slices, (group,)))
        before_cpu_s = sum(node.cpu_s() for node in everybody)
        for step in range(rounds + 1):
            snapshot = SnapshotId(step, 1)
            before_s = time.perf_counter()
            for node in nodes:
                node.hold(snapshot)
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.gather(*(node.until_protected(snapshot) for node in nodes))
            protecting_s.append(time.perf_counter() - before_s)
            await asyncio.gather(*(node.keeper.forget(step) for node in nodes))
        protecting_cpu_s = sum(node.cpu_s() for node in everybody) - before_cpu_s
        lost = nodes[1]
        sources = {node.index: node.name for node in nodes if node is not lost}
        order = AssemblyOrder(snapshot, k + m, sources, (lost.name,), (group,), indices=(lost.index,))
        for _ in range(rounds + 1):
            before_s = time.perf_counter()
            ((_, fd),) = await newcomer.keeper.assemble(order, DEADLINE_S)
            decoding_s.append(time.perf_counter() - before_s)
            os.close(fd)
        decoding_cpu_s = sum(node.cpu_s() for node in everybody) - before_cpu_s - protecting_cpu_s
    finally:
        await asyncio.gather(*(node.keeper.stop() for node in everybody))
    gigabytes = size_bytes / 1e9
    return {
        "k": k,
        "m": m,
        "protect_first_gbps": round((k + m) * gigabytes / protecting_s[0], 3),
        "protect_gbps": round((k + m) * gigabytes / statistics.median(protecting_s[1:]), 3),
        "protect_cpu_s_per_GB": round(protecting_cpu_s / ((k + m) * gigabytes * len(protecting_s)), 3),
        "decode_gbps": round(gigabytes / statistics.median(decoding_s[1:]), 3),
        "decode_gbps_best": round(gigabytes / min(decoding_s), 3),
        "decode_cpu_s_per_GB": round(decoding_cpu_s / (gigabytes * len(decoding_s)), 3),
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
    title = f"keepers on loopback, shards of {report['shard_bytes'] / MIB:.0f} MiB, GB/s and CPU seconds per GB"
    table = Table("code", "protect, first", "protect", "CPU", "decode", "best", "CPU", title=title)
    for code in report["codes"]:
        protect = ("protect_first_gbps", "protect_gbps", "protect_cpu_s_per_GB")
        rates = (*protect, "decode_gbps", "decode_gbps_best", "decode_cpu_s_per_GB")
        table.add_row(f"({code['k']},{code['m']})", *(f"{code[name]:.2f}" for name in rates))
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--shard-mib", type=int, default=SHARD_MIB, help=f"of each node [{SHARD_MIB}]")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
