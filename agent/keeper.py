"""The keeper: the process beside an agent that protects the node's snapshots and assembles what a restore needs.

It serves this node's slices and parity to other keepers, writes the parity that `protection.py` decides on, and carries
out orders to assemble. The agent hands it memory and tells it the world; it answers in JSON, see `keeping.py` for both
sides of that talk. It must never touch a worker, speak to the controller, or unpickle what comes from the network.

`python -m elastic.launch keeper FD` runs it on the inherited socket FD.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import socket
import sys
import time
from collections.abc import Coroutine
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
import zmq

from agent.assembly import Assembly, AssemblyFailed
from agent.channel import Channel
from agent.holdings import Parity, ParityMemory, Shard, Stored, chunks, map_slice
from agent.keys import Keys
from agent.orders import AssemblyOrder, KeeperSettings, world_from_json
from agent.protection import (
    POLL_S,
    AskTable,
    Covered,
    DropParity,
    DropSlices,
    Event,
    Forgotten,
    Notify,
    ParityFailed,
    ParityHeld,
    ParityWritten,
    PeerAsked,
    Protected,
    ProtectionMachine,
    SliceHeld,
    Standing,
    StopWriting,
    TableCame,
    TableWithheld,
    Tick,
    Vulnerable,
    WorldCame,
    WriteParity,
)
from agent.reading import GoneError, Reader, work_through
from agent.shards import CHUNK_BYTES, Answer, Kind, Peer, Peers, Request, ShardServer, Status, Traffic
from agent.tables import slice_from_json, slice_to_json, table_to_json
from elastic.errors import ConfigError, ElasticError, ProtocolError, TransferError, Unreachable
from elastic.lifeline import die_with_parent
from elastic.snapshots import SnapshotId
from recovery.codec import Codec

PROGRESS_S = 0.1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_STATUS = {Standing.NOT_YET: Status.NOT_YET, Standing.GONE: Status.GONE}


@cache
def codec(k: int, m: int) -> Codec:
    """The codec of a code; made once."""
    return Codec(k, m)


class Keeper:
    """One keeper inside a running loop."""

    def __init__(self, end: socket.socket) -> None:
        """Listen to the agent at `end`."""
        loop = asyncio.get_running_loop()
        self._over: asyncio.Future[int] = loop.create_future()
        loop.set_exception_handler(self._fault)
        self._inbox: asyncio.Queue[tuple[dict[str, Any], list[int]]] = asyncio.Queue()
        self._channel = Channel(end, lambda message, fds: self._inbox.put_nowait((message, fds)), self._agent_ended)
        self._context = zmq.Context()
        self._traffic = Traffic()
        self._node = ""
        self._slices: dict[SnapshotId, dict[int, Stored]] = {}
        self._shards: dict[SnapshotId, Shard] = {}
        self._parities: dict[SnapshotId, Parity] = {}
        self._parity_memory = ParityMemory()
        self._writing: dict[SnapshotId, set[asyncio.Task[None]]] = {}
        self._assembling: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Serve until the agent hangs up; returns the exit code."""
        try:
            first, _ = await self._inbox.get()
            self._settings = KeeperSettings(**first["settings"])
            self._keys = (
                Keys(self._settings.public_key, self._settings.secret_key) if self._settings.secret_key else None
            )
            self._machine = ProtectionMachine(self._settings.parity_bytes_max)
            self._server = ShardServer(self._context, self._settings.address, self._answer, self._traffic, self._keys)
            self._peers = Peers(self._answer, self._connect)
            self._say("bound", address=self._server.address)
            for work in (self._obey(), self._tick(), self._report()):
                self._spawn(work)
            return await self._over
        finally:
            for task in self._tasks:
                task.cancel()
            self._channel.close()
            self._context.destroy(0)

    def _connect(self, node: str, address: str, public_key: str) -> Peer:
        return Peer(
            self._context,
            node,
            address,
            self._traffic,
            silence_s=self._settings.silence_s,
            keys=self._keys,
            public_key=public_key,
        )

    def _agent_ended(self) -> None:
        if not self._over.done():
            self._over.set_result(0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(error)

    def _fault(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._end(context.get("exception") or RuntimeError(context["message"]))

    def _end(self, error: BaseException) -> None:
        """A fault of this program: the agent starts another keeper."""
        if not self._over.done():
            self._over.set_exception(error)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(POLL_S / 2)
            self._handle(Tick())

    # -- the agent -------------------------------------------------------------------------------------------------

    def _say(self, what: str, fds: tuple[int, ...] = (), **fields: Any) -> None:
        self._channel.send({"say": what, **fields}, fds)

    async def _obey(self) -> None:
        """Do what the agent says, in its order."""
        while True:
            message, fds = await self._inbox.get()
            match message["say"]:
                case "hold":
                    await self._hold(message, fds[0])
                case "world":
                    world = world_from_json(message["world"])
                    self._node = world.node
                    self._server.allowed = frozenset(message["public_keys"].values())
                    self._peers.update(world.node, world.peers, message["public_keys"])
                    self._handle(WorldCame(world))
                case "forget":
                    self._handle(Forgotten(message["before_step"]))
                    self._say("forgotten", before_step=message["before_step"])
                case "assemble":
                    if self._assembling is not None:
                        self._assembling.cancel()
                    order = AssemblyOrder.from_json(message["order"])
                    self._assembling = self._spawn(self._assemble(message["number"], order))
                case unknown:
                    raise ProtocolError(f"The agent says {unknown!r} to its keeper: they are of different versions.")

    async def _hold(self, message: dict[str, Any], fd: int) -> None:
        part = slice_from_json(message["slice"])
        try:
            stored = map_slice(part, fd)
            stored.slice = await asyncio.to_thread(stored.checked)
        except (ConfigError, TransferError) as error:
            self._say("vulnerable", snapshot=asdict(part.snapshot), reason=str(error))
            return
        finally:
            os.close(fd)
        self._slices.setdefault(part.snapshot, {})[part.index] = stored
        self._say("held", slice=slice_to_json(stored.slice))
        self._handle(SliceHeld(stored.slice))

    async def _assemble(self, number: int, order: AssemblyOrder) -> None:
        if not order.groups and (world := self._machine.worlds.get(order.snapshot.generation)) is not None:
            order = replace(order, groups=world.groups)
        reader = Reader(self._peers, order.snapshot, self._node)
        held = frozenset(self._slices.get(order.snapshot, ()))
        assembly = Assembly(order, self._node, reader, held, codec, self._settings.image_bytes_max)
        try:
            images = await assembly.run()
        except AssemblyFailed as error:
            self._say("failed", number=number, reason=str(error), lost=list(error.lost))
            return
        except asyncio.CancelledError:
            self._say("failed", number=number, reason="another assembly was ordered instead", lost=[])
            raise
        for image in images:
            self._say("assembled", (image.fd,), number=number, slice=slice_to_json(image.slice))
        self._say("complete", number=number)

    async def _report(self) -> None:
        """Tell the agent the counters when they have changed."""
        told: dict[str, int] = {}
        while True:
            await asyncio.sleep(PROGRESS_S)
            counted = asdict(self._traffic)
            if counted != told:
                told = counted
                self._say("progress", **counted)

    # -- protection ------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        """Give the machine one event and perform its commands in order."""
        for command in self._machine.step(event, time.monotonic()):
            match command:
                case AskTable(node, snapshot):
                    self._spawn(self._ask_table(node, snapshot))
                case WriteParity():
                    self._begin_writing(command)
                case Notify(node, snapshot, stripe):
                    self._spawn(self._notify(node, snapshot, stripe))
                case StopWriting(snapshot):
                    for task in self._writing.pop(snapshot, ()):
                        task.cancel()
                case DropParity(snapshot):
                    self._say("covered", snapshot=asdict(snapshot), is_covered=False)
                    self._parity_memory.give_back(self._parities.pop(snapshot).memory)
                case DropSlices(snapshot):
                    self._slices.pop(snapshot, None)
                    self._shards.pop(snapshot, None)
                case Protected(snapshot):
                    self._say("protected", snapshot=asdict(snapshot))
                case Covered(snapshot):
                    self._say("covered", snapshot=asdict(snapshot), is_covered=True)
                case Vulnerable(snapshot, reason):
                    self._say("vulnerable", snapshot=asdict(snapshot), reason=reason)

    async def _ask_table(self, node: str, snapshot: SnapshotId) -> None:
        try:
            said = await Reader(self._peers, snapshot, self._node).testimony(node)
        except (Unreachable, TransferError, ProtocolError) as error:
            self._handle(TableWithheld(node, snapshot, isinstance(error, GoneError), str(error)))
        else:
            self._handle(TableCame(node, snapshot, said.table, said.written))

    async def _notify(self, node: str, snapshot: SnapshotId, stripe: int) -> None:
        try:
            await self._peers.ask(node, Request(Kind.HELD, snapshot, stripe, sender=self._node))
        except (Unreachable, TransferError):
            return  # it asks by itself

    def _begin_writing(self, order: WriteParity) -> None:
        parity = self._parities.get(order.snapshot)
        if parity is None:
            memory = self._parity_memory.take(order.group.m * order.block_bytes)
            parity = self._parities[order.snapshot] = Parity(order.block_bytes, memory)
        parity.place(order.stripe.number)
        tasks = self._writing.setdefault(order.snapshot, set())
        task = self._spawn(self._write(order, parity))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _write(self, order: WriteParity, parity: Parity) -> None:
        reader = Reader(self._peers, order.snapshot, self._node)
        stripe, k = order.stripe, order.group.k

        async def write_chunk(chunk: tuple[int, int]) -> None:
            offset, length = chunk
            data = await asyncio.gather(
                *(
                    reader.shard(node, block * order.block_bytes + offset, length, order.shards_bytes[node])
                    for node, block in stripe.data
                )
            )
            target = parity.chunk(stripe.number, offset)
            codec(k, order.group.m).decode(dict(enumerate(data)), {k + order.row: target})
            parity.seal(stripe.number, offset)

        try:
            left = [chunk for chunk in chunks(order.block_bytes) if not parity.is_sealed(stripe.number, chunk[0])]
            await work_through(left, write_chunk)
        except ElasticError as error:
            is_gone = isinstance(error, GoneError)
            self._handle(ParityFailed(order.snapshot, stripe.number, is_gone, str(error)))
        else:
            self._handle(ParityWritten(order.snapshot, stripe.number))

    # -- other keepers ---------------------------------------------------------------------------------------------

    def _answer(self, request: Request) -> Answer:
        """Answer a request of another keeper, or of this one."""
        snapshot = request.snapshot
        if request.kind is Kind.HELD:
            self._handle(ParityHeld(request.sender, snapshot, request.stripe))
            return Answer.of(Status.OK, b"")
        if request.kind is Kind.PARITY:
            parity = self._parities.get(snapshot)
            if parity is None:
                return Answer.of(Status.REFUSED, b"no parity of this snapshot is held")
            return parity.answer(request.stripe, request.offset, request.length)
        if request.kind in (Kind.TABLE, Kind.TABLES) and request.sender != self._node:
            self._handle(PeerAsked(request.sender, snapshot))
        standing = self._machine.standing(snapshot, to_restore=request.kind is Kind.TABLES)
        if standing is not Standing.READY:
            return Answer.of(_STATUS[standing], standing.value.encode())
        if request.kind is Kind.SHARD:
            return self._shard(snapshot).answer(request.offset, request.length)
        others = self._machine.tables(snapshot) if request.kind is Kind.TABLES else {}
        content = {
            "slices": table_to_json(self._machine.table(snapshot)),
            "written": self._machine.written(snapshot),
            "others": {node: table_to_json(table) for node, table in others.items()},
        }
        return Answer.of(Status.OK, json.dumps(content, separators=(",", ":")).encode())

    def _shard(self, snapshot: SnapshotId) -> Shard:
        shard = self._shards.get(snapshot)
        if shard is None:
            own = {part.index for part in self._machine.table(snapshot)}
            stored = self._slices[snapshot]
            shard = self._shards[snapshot] = Shard({index: stored[index] for index in own})
        return shard


def _keep_freed_memory() -> None:
    """Have the allocator keep what is freed: by default each chunk that arrives costs fresh pages from the kernel."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 32 * CHUNK_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, 256 * CHUNK_BYTES)


def run_keeper(end: socket.socket) -> int:
    """Be the keeper at this end of a line to an agent until the agent hangs up; returns the exit code."""
    torch.set_num_threads(1)  # training has the cores
    _keep_freed_memory()

    async def keep() -> int:
        return await Keeper(end).run()

    try:
        return asyncio.run(keep())
    except ElasticError as error:
        print(f"elastic keeper: {error}", file=sys.stderr)
        return 2


def main() -> int:
    """Entry point: the one argument is the inherited socket's descriptor."""
    die_with_parent(os.getppid())
    return run_keeper(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
