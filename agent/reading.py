"""Reading members of a stripe: chunks of other nodes' shards and parity, as tensors for the codec, many at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from agent.holdings import padded
from agent.shards import Answer, Kind, Peers, Request, Status
from agent.tables import Table, table_from_json
from elastic.errors import ElasticError, ProtocolError, TransferError
from elastic.snapshots import SnapshotId

UNITS = 6
"""How many chunks of stripes are worked on at a time: what bounds the memory for what has arrived."""


class GoneError(TransferError):
    """The node does not have this snapshot, and never will."""


class NotYetError(TransferError):
    """The node does not have the snapshot now; its agent may be about to hand it over."""


@dataclass(frozen=True, slots=True)
class Testimony:
    """What a node says it has of a snapshot.

    Attributes:
        table: its own slices.
        written: the stripes whose parity it holds.
        others: the tables of the other nodes of its group.
    """

    table: Table
    written: tuple[int, ...]
    others: dict[str, Table]


class Reader:
    """Reads one snapshot."""

    def __init__(self, peers: Peers, snapshot: SnapshotId, sender: str) -> None:
        self.snapshot = snapshot
        self._peers = peers
        self._sender = sender

    async def testimony(self, node: str, kind: Kind = Kind.TABLE) -> Testimony:
        """Ask what a node has.

        Raises:
            GoneError, NotYetError, TransferError: it does not have the snapshot.
            Unreachable: it does not answer.
            ProtocolError: what it says makes no sense.
        """
        answer = self._accepted(node, await self._peers.ask(node, Request(kind, self.snapshot, sender=self._sender)))
        try:
            fields = json.loads(bytes(answer.data))
            written = tuple(int(number) for number in fields["written"])
            others = {str(name): table_from_json(value, self.snapshot) for name, value in fields["others"].items()}
            return Testimony(table_from_json(fields["slices"], self.snapshot), written, others)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(
                f"The table of {node} cannot be read ({error}): its keeper must be replaced."
            ) from error

    async def shard(self, node: str, offset: int, length: int, shard_bytes: int) -> Tensor:
        """Read a chunk of a node's shard, with zeros behind its end; raises as `testimony`."""
        present = max(min(length, shard_bytes - offset), 0)
        if not present:
            return padded(b"", length)
        return await self._read(node, Request(Kind.SHARD, self.snapshot, 0, offset, present), length)

    async def parity(self, node: str, stripe: int, offset: int, length: int) -> Tensor:
        """Read a chunk of the parity of a stripe; raises as `testimony`."""
        return await self._read(node, Request(Kind.PARITY, self.snapshot, stripe, offset, length), length)

    async def _read(self, node: str, request: Request, length: int) -> Tensor:
        answer = self._accepted(node, await self._peers.ask(node, request))
        if len(answer.data) != request.length:
            raise ProtocolError(
                f"{node} sent {len(answer.data)} bytes instead of {request.length}: it must be replaced."
            )
        return padded(answer.data, length)

    def _accepted(self, node: str, answer: Answer) -> Answer:
        if answer.status is Status.OK:
            return answer
        reason = bytes(answer.data[:200]).decode("utf-8", "replace")
        raise _ERRORS.get(answer.status, TransferError)(f"{node} does not give its part of step {self.snapshot.step} ({reason}).")


_ERRORS = {Status.GONE: GoneError, Status.NOT_YET: NotYetError}


async def work_through(units: Iterable[Any], work: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Work on some units at a time, in order; the first error ends all."""
    left = iter(units)

    async def take_and_work() -> None:
        for unit in left:
            await work(unit)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(UNITS):
                group.create_task(take_and_work())
    except ExceptionGroup as several:
        first = several.exceptions[0]
        if isinstance(first, ElasticError):
            raise first from several
        raise
