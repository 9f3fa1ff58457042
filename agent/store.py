"""The rendezvous store: where the workers of one generation publish their addresses.

Served by the agent of the first member's node; other agents forward to it. Every wait has the caller's deadline, keys
of a generation vanish when a newer one opens here, and everything is bounded. It is no general key-value store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
import grpc.aio

from elastic.v1 import runtime_pb2, runtime_pb2_grpc
from elastic.wire import channels

GENERATIONS_KEPT = 4
KEYS_MAX = 4096
VALUE_SIZE_BYTES_MAX = 64 * 1024
FORWARD_TIMEOUT_S = 30.0
R = TypeVar("R")


def ignore() -> None:
    """Take no notice."""


class _Generation:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = asyncio.Event()
        self.fenced = False

    def announce(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class StoreService(runtime_pb2_grpc.StoreServicer):
    """Serves this node's generations and forwards requests for other nodes'."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.keeper_address = ""  # where this node's keeper listens, told to other agents
        self.on_keeper_needed: Callable[[], None] = ignore  # another agent has asked for it
        self._oldest = 0
        self._generations: dict[int, _Generation] = {}
        self._peers: dict[str, grpc.aio.Channel] = {}

    def open_generation(self, generation: int) -> None:
        """Forget all generations before this one; whoever waits in them is told so."""
        self._oldest = max(self._oldest, generation)
        for number in [n for n in self._generations if n < self._oldest]:
            old = self._generations.pop(number)
            old.fenced = True
            old.announce()

    async def _generation(self, number: int, context: channels.Context) -> _Generation:
        if number < self._oldest:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"generation {number} is over, generation {self._oldest} has been opened",
            )
        if number not in self._generations:
            if len(self._generations) >= GENERATIONS_KEPT:
                self.open_generation(min(self._generations) + 1)
            self._generations[number] = _Generation()
        return self._generations[number]

    def _peer(self, address: str) -> runtime_pb2_grpc.StoreAsyncStub:
        if address not in self._peers:
            self._peers[address] = channels.client(address)
        return runtime_pb2_grpc.StoreStub(self._peers[address])

    async def Probe(
        self, request: runtime_pb2.ProbeRequest, context: channels.Context
    ) -> runtime_pb2.ProbeReply:
        """Say that this node is here."""
        if request.node != self.node:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"this is node {self.node}")
        if request.needs_keeper:
            self.on_keeper_needed()
        return runtime_pb2.ProbeReply(shard_address=self.keeper_address)

    async def reaches(self, node: str, address: str, timeout_s: float) -> bool:
        """Whether another node's agent answers in time."""
        return await self._probe(node, address, timeout_s) is not None

    async def keeper_of(self, node: str, address: str, timeout_s: float) -> str:
        """Where another node's keeper listens, which is started if need be; "" if its agent does not say so in time."""
        reply = await self._probe(node, address, timeout_s, needs_keeper=True)
        return reply.shard_address if reply is not None else ""

    async def _probe(
        self, node: str, address: str, timeout_s: float, *, needs_keeper: bool = False
    ) -> runtime_pb2.ProbeReply | None:
        try:
            # Not over a channel that may have been waiting to connect again.
            async with channels.client(address) as channel:
                request = runtime_pb2.ProbeRequest(node=node, needs_keeper=needs_keeper)
                stub = runtime_pb2_grpc.StoreStub(channel)
                return await stub.Probe(request, timeout=timeout_s, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            return None

    async def Set(
        self, request: runtime_pb2.StoreSetRequest, context: channels.Context
    ) -> runtime_pb2.StoreSetReply:
        """Publish one value."""
        if request.node != self.node:
            return await self._forward(self._peer(request.address).Set, request, context)
        if len(request.value) > VALUE_SIZE_BYTES_MAX:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a value of the rendezvous store exceeds 64 KiB")
        generation = await self._generation(request.key.generation, context)
        if len(generation.values) >= KEYS_MAX:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the rendezvous store is full")
        generation.values[request.key.key] = request.value
        generation.announce()
        return runtime_pb2.StoreSetReply()

    async def Get(
        self, request: runtime_pb2.StoreGetRequest, context: channels.Context
    ) -> runtime_pb2.StoreGetReply:
        """Return values once all of them are there."""
        if request.node != self.node:
            return await self._forward(self._peer(request.address).Get, request, context)
        generation = await self._generation(request.generation, context)
        while not all(key in generation.values for key in request.keys):
            if generation.fenced:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a newer generation has been opened")
            await generation.changed.wait()  # ends with the call's deadline at the latest
        return runtime_pb2.StoreGetReply(values=[generation.values[key] for key in request.keys])

    async def _forward(self, method: Callable[..., Awaitable[R]], request: object, context: channels.Context) -> R:
        remaining = context.time_remaining()
        try:
            return await method(request, timeout=FORWARD_TIMEOUT_S if remaining is None else remaining)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "the store's node did not answer")
            raise AssertionError("abort() does not return") from error

    async def close(self) -> None:
        """Close the channels to other agents."""
        for channel in self._peers.values():
            await channel.close()
