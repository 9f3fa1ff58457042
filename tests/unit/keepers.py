"""Keepers as tests and the benchmark run them: real processes on loopback, each with a node's slices in memfds."""

from __future__ import annotations

import asyncio
import mmap
import multiprocessing
import os
import random
import socket
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from agent.keeper import run_keeper
from agent.keeping import KeeperProcess, Launch, Launched
from agent.orders import AssemblyOrder, KeeperSettings
from agent.protection import World
from elastic.snapshots import Slice, SnapshotId, aligned
from recovery.placement import ProtectionGroup

DEADLINE_S = 30.0
PLAIN = KeeperSettings()
DESCRIPTION = b'{"manifest": [], "small": {}}'


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["agent.keeper"])  # torch is imported once, not once a keeper


class _Forked:
    """A keeper forked from a process that has imported what it needs."""

    def __init__(self, fd: int) -> None:
        with socket.socket(fileno=os.dup(fd)) as end:
            self._process = _FORKS.Process(target=run_keeper, args=(end,), daemon=True)
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    async def wait(self) -> int:
        await asyncio.to_thread(self._process.join, DEADLINE_S)
        assert self._process.exitcode is not None
        return self._process.exitcode


async def fork(fd: int) -> Launched:
    return await asyncio.to_thread(_Forked, fd)


def noise(size_bytes: int, seed: int) -> bytes:
    """Bytes of which no two ranges are alike."""
    return random.Random(seed).randbytes(size_bytes)


@dataclass
class Node:
    """One node: its keeper, the memory of its slices, and what the keeper has said."""

    name: str
    settings: KeeperSettings = field(default_factory=KeeperSettings)
    launch: Launch = fork

    def __post_init__(self) -> None:
        self.keeper = KeeperProcess(self.settings, self, self.launch)
        self.address = ""
        self.memory: dict[tuple[SnapshotId, int], mmap.mmap] = {}
        self.is_covering: set[SnapshotId] = set()
        self.is_protected: set[SnapshotId] = set()
        self.reasons: list[str] = []
        self.counted: Counter[str] = Counter()
        self.gone = ""
        self.bound = 0
        self.changed = asyncio.Event()

    # what the keeper says

    def keeper_bound(self, address: str) -> None:
        self.address, self.bound = address, self.bound + 1
        self.changed.set()

    def slice_held(self, part: Slice) -> None:
        self.changed.set()

    def protected(self, snapshot: SnapshotId) -> None:
        self.is_protected.add(snapshot)
        self.changed.set()

    def covered(self, snapshot: SnapshotId, is_covered: bool) -> None:
        (self.is_covering.add if is_covered else self.is_covering.discard)(snapshot)
        self.changed.set()

    def vulnerable(self, snapshot: SnapshotId, reason: str) -> None:
        self.is_protected.discard(snapshot)
        self.reasons.append(reason)
        self.changed.set()

    def keeper_progress(self, counted: Mapping[str, int]) -> None:
        self.counted = Counter(counted)
        self.changed.set()

    def keeper_gone(self, reason: str) -> None:
        self.gone = reason
        self.changed.set()

    # what a test does

    async def until(self, condition: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
        """Wait until something that the keeper says makes the condition true."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def hold(self, part: Slice, content: bytes) -> None:
        """Put a slice into memory and hand it to the keeper."""
        fd = os.memfd_create("slice")
        os.ftruncate(fd, part.stored_bytes)
        memory = self.memory[part.snapshot, part.index] = mmap.mmap(fd, part.stored_bytes)
        memory[:] = content
        self.keeper.hold(part, fd)
        os.close(fd)

    def flip(self, snapshot: SnapshotId, index: int, at: int) -> None:
        """Flip one bit of a slice in memory."""
        self.memory[snapshot, index][at] ^= 0x10


def make_slices(snapshot: SnapshotId, sizes_bytes: Sequence[int], known: bool = True) -> list[tuple[Slice, bytes]]:
    """A snapshot of slices of these sizes, each with its stored bytes."""
    made, begin, total = [], 0, sum(sizes_bytes)
    for index, size_bytes in enumerate(sizes_bytes):
        payload = noise(size_bytes, 1 + index + 31 * snapshot.step)
        made.append(
            (
                Slice(
                    snapshot,
                    index,
                    len(sizes_bytes),
                    begin,
                    begin + size_bytes,
                    total,
                    len(DESCRIPTION),
                    zlib.crc32(payload) if known else 0,
                    zlib.crc32(DESCRIPTION) if known else 0,
                ),
                payload + bytes(aligned(size_bytes) - size_bytes) + DESCRIPTION,
            )
        )
        begin += size_bytes
    return made


class Site:
    """Several nodes in one protection group, and one snapshot after another on them."""

    def __init__(
        self, k: int, m: int, per_node: int = 1, settings: KeeperSettings | Sequence[KeeperSettings] = PLAIN
    ) -> None:
        self.group = ProtectionGroup(tuple(f"node-{i}" for i in range(k + m)), k, m)
        each = [settings] * (k + m) if isinstance(settings, KeeperSettings) else settings
        self.nodes = {name: Node(name, own) for name, own in zip(self.group.nodes, each, strict=True)}
        self.slices = {name: tuple(range(i * per_node, (i + 1) * per_node)) for i, name in enumerate(self.group.nodes)}
        self.owner = {index: name for name, indices in self.slices.items() for index in indices}
        self.contents: dict[SnapshotId, dict[int, tuple[Slice, bytes]]] = {}

    async def __aenter__(self) -> Site:
        await asyncio.gather(*(node.keeper.start() for node in self.nodes.values()))
        self.enter(1)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(node.keeper.stop() for node in self.nodes.values()))

    def enter(self, generation: int) -> None:
        """Tell every node of a world with all those that are there."""
        peers = {name: node.address for name, node in self.nodes.items()}
        keys = {name: node.settings.public_key for name, node in self.nodes.items()}
        for name, node in self.nodes.items():
            node.keeper.enter(World(generation, name, peers, self.slices, (self.group,)), keys)

    def capture(self, snapshot: SnapshotId, sizes_bytes: Sequence[int], known: bool = True, wrong: int = -1) -> None:
        """Every worker has captured its slice; that of index `wrong` is other than its checksum says."""
        made = make_slices(snapshot, sizes_bytes, known)
        self.contents[snapshot] = {part.index: (part, content) for part, content in made}
        for part, content in made:
            if part.index == wrong:
                content = b"?" + content[1:]
            self.nodes[self.owner[part.index]].hold(part, content)

    async def until_protected(self, snapshot: SnapshotId) -> None:
        await asyncio.gather(
            *(
                node.until(lambda node=node: snapshot in node.is_protected & node.is_covering)  # type: ignore[misc]
                for node in self.nodes.values()
            )
        )

    async def lose(self, *names: str) -> None:
        """Kill keepers for good."""
        for name in names:
            await self.nodes.pop(name).keeper.stop()

    async def join(self, name: str, launch: Launch = fork) -> Node:
        """Start a keeper on a new node."""
        node = self.nodes[name] = Node(name, launch=launch)
        await node.keeper.start()
        return node

    def order(self, snapshot: SnapshotId, lost: Sequence[str]) -> AssemblyOrder:
        """All slices, those of lost nodes decoded."""
        sources = {index: name for index, name in self.owner.items() if name not in lost}
        return AssemblyOrder(snapshot, len(self.owner), sources, tuple(lost), (self.group,))

    async def assemble(self, name: str, snapshot: SnapshotId, lost: Sequence[str]) -> set[int]:
        """Assemble at a node and check every byte; returns which slices came."""
        came = await self.nodes[name].keeper.assemble(self.order(snapshot, lost), DEADLINE_S)
        for part, fd in came:
            size_bytes = os.fstat(fd).st_size
            expected = self.contents[snapshot][part.index][1]
            assert size_bytes == len(expected)
            assert os.pread(fd, size_bytes, 0) == expected
            os.close(fd)
        return {part.index for part, _ in came}
