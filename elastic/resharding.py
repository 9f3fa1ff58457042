"""Moving what is cut over the workers: from one cut of it to another, and the updated parameters to everybody.

A worker's old and new part overlap with those of few others, or of many; what moves between two workers follows from the
manifest and the two cuts, so that both know it and nobody asks. It goes in pieces, each with its step, its number and a
CRC-32; at any time a worker waits for one piece of each other one, which have all begun to be sent: nobody waits in a circle.
This file must never decide who holds what, and never waits without the group's deadline.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.checksum import crc32
from elastic.encoding import flat_bytes, raw_view
from elastic.errors import CollectiveAborted, TransferError
from elastic.group import Group
from elastic.payload import Layout, Packer, Segment, Unpacker, cut_up
from elastic.sharding import Cut, OptimizerShards
from elastic.state import Entry

PIECES_SIZE_BYTES = 16 * 2**20
"""Of all pieces that a worker is sent at a time."""
TAG_MOVE = 0x05354100
TAG_GATHER = (1 << 28) + (1 << 20)
"""Apart from the tags of anything else on the same group."""

_TRAILER = struct.Struct("<3Q")


@dataclass(frozen=True, slots=True)
class Move:
    """From which cut to which.

    Attributes:
        before: for each part of the old cut, the rank of the worker that holds it.
        after: for each part of the new cut, the rank of the worker that is to hold it.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def is_idle(self) -> bool:
        """Whether everything is where it should be."""
        return self.before == self.after


def move_shards(
    group: Group,
    step: int,
    entries: Sequence[Entry],
    move: Move,
    sources: Sequence[Tensor] | None,
    targets: Sequence[Tensor] | None,
) -> None:
    """Give every worker its new part; all who hold an old part or are to hold a new one must call it.

    Args:
        group: connects them. step: the last one whose effects the state contains, equal everywhere.
        entries: the manifest. sources: for each entry the old part that is here, if `move` says that one is; read only.
            targets: the new part, to be written, in memory of its own. What is not cut is looked at in neither.

    Raises:
        CollectiveAborted: a peer is gone; targets are then partly written.
        TransferError: what came is not what was sent.
    """
    old = Cut(move.before.index(group.rank), len(move.before)) if group.rank in move.before else None
    new = Cut(move.after.index(group.rank), len(move.after)) if group.rank in move.after else None
    outgoing = {
        rank: Layout(_overlap(entries, old, Cut(index, len(move.after))))
        for index, rank in enumerate(move.after)
        if old is not None
    }
    incoming = {
        rank: Layout(_overlap(entries, Cut(index, len(move.before)), new))
        for index, rank in enumerate(move.before)
        if new is not None
    }
    from_here = [entry.extent(old) for entry in entries] if old is not None else []
    to_here = [entry.extent(new) for entry in entries] if new is not None else []
    packers = {rank: Packer(layout, sources or (), from_here) for rank, layout in outgoing.items()}
    unpackers = {rank: Unpacker(layout, targets or (), to_here) for rank, layout in incoming.items()}
    _copy_own(packers.pop(group.rank, None), unpackers.pop(group.rank, None))
    _Exchange(group, step, packers, unpackers).run()


def _copy_own(packer: Packer | None, unpacker: Unpacker | None) -> None:
    """What stays with a worker only changes its place."""
    if packer is not None and unpacker is not None and packer.layout.size_bytes:
        staging = torch.empty(min(packer.layout.size_bytes, PIECES_SIZE_BYTES), dtype=torch.uint8)
        for piece in cut_up(range(packer.layout.size_bytes), PIECES_SIZE_BYTES):
            packer.pack(piece, staging)
            unpacker.unpack(piece, staging)


def _overlap(entries: Sequence[Entry], one: Cut | None, other: Cut | None) -> Iterator[Segment]:
    """What lies in both parts, of everything that is cut."""
    if one is None or other is None:
        return
    for number, entry in enumerate(entries):
        if entry.sharding is not None:
            mine, theirs = entry.extent(one), entry.extent(other)
            yield Segment(number, max(mine.start, theirs.start), min(mine.stop, theirs.stop))


class _Exchange:
    """Pieces to and from everybody, in rounds of one piece each."""

    def __init__(
        self, group: Group, step: int, packers: dict[int, Packer], unpackers: dict[int, Unpacker]
    ) -> None:
        self._group, self._step, self._packers, self._unpackers = group, step, packers, unpackers
        piece_bytes = max(2**16, PIECES_SIZE_BYTES // max(group.size - 1, 1))
        self._sent, self._received = (
            {
                rank: cut_up(range(each.layout.size_bytes), piece_bytes)
                for rank, each in many.items()
                if each.layout.size_bytes
            }
            for many in (packers, unpackers)
        )

    def run(self) -> None:
        """Move everything. What was announced is received in full even if it is damaged, so that nobody waits for it."""
        faults: list[str] = []
        rounds = max((len(pieces) for pieces in (*self._sent.values(), *self._received.values())), default=0)
        messages = {rank: _message(pieces[0]) for rank, pieces in self._sent.items()}
        arrivals = {rank: _message(pieces[0]) for rank, pieces in self._received.items()}
        try:
            for number in range(rounds):
                faults += self._round(number, messages, arrivals)
        except CollectiveAborted:
            self._group.drain()  # afterwards nothing is written into our memory any more
            raise
        if faults:
            raise TransferError(f"The state of step {self._step} arrived damaged ({faults[0]}): restore it.")

    def _round(self, number: int, messages: dict[int, Tensor], arrivals: dict[int, Tensor]) -> list[str]:
        faults, works = [], []
        arriving = {}
        for rank, pieces in self._received.items():
            if number < len(pieces):
                message = arrivals[rank][: len(pieces[number]) + _TRAILER.size]
                arriving[rank] = message, self._group.recv(message, rank, TAG_MOVE)
        for rank, pieces in self._sent.items():
            if number < len(pieces):
                piece = pieces[number]
                message = messages[rank][: len(piece) + _TRAILER.size]
                self._packers[rank].pack(piece, message)
                memory = raw_view(message)
                _TRAILER.pack_into(memory, len(piece), self._step, number, crc32(memory[: len(piece)]))
                works.append(self._group.send(message, rank, TAG_MOVE))
        for rank, (message, work) in arriving.items():
            work.wait()
            piece, memory = self._received[rank][number], raw_view(message)
            expected = (self._step, number, crc32(memory[: len(piece)]))
            if (sent := _TRAILER.unpack_from(memory, len(piece))) == expected:
                self._unpackers[rank].unpack(piece, message)
            else:
                faults.append(f"piece {number} of rank {rank} is stamped {sent} instead of {expected}")
        for sending in works:
            sending.wait()
        return faults


def _message(first: range) -> Tensor:
    """Memory for one piece and its trailer; the first piece is the largest."""
    return torch.empty(len(first) + _TRAILER.size, dtype=torch.uint8)


class ParameterGather:
    """After an update each worker sends the elements that it has updated to all others.

    What is sent lies in memory that is kept from step to step; the next vote shows that all have received it.
    """

    def __init__(self, shards: OptimizerShards) -> None:
        self._shards = shards
        self._laid_out: tuple[object, ...] = ()
        self._parts: list[_Part] = []

    def run(self, group: Group) -> None:
        """Make the parameters the same everywhere again.

        Raises:
            CollectiveAborted: a peer is gone; the parameters are then neither those before the update nor those after it.
        """
        if group.size == 1:
            return
        laid_out = group.generation, *(parameter.data_ptr() for parameter in self._shards.parameters())
        if self._laid_out != laid_out:
            self._parts = [_Part(self._shards, Cut(rank, group.size)) for rank in range(group.size)]
            self._laid_out = laid_out
        try:
            works = [(rank, group.take(self._parts[rank].memory, rank, TAG_GATHER)) for rank in group.peers]
            mine = self._parts[group.rank]
            mine.collect()
            for rank in group.peers:
                group.post(mine.memory, rank, TAG_GATHER)
            for rank, work in works:
                work.wait()
                self._parts[rank].spread()
        except CollectiveAborted:
            group.drain()
            raise


class _Part:
    """What one worker updates of all parameters, one behind the other.

    Attributes:
        memory: uint8, on the CPU.
    """

    def __init__(self, shards: OptimizerShards, cut: Cut) -> None:
        extents = [(parameter, shards.updated(parameter, cut)) for parameter in shards.parameters()]
        own = [(parameter, extent) for parameter, extent in extents if len(extent)]
        self.memory = torch.empty(sum(len(extent) for _, extent in own), dtype=torch.uint8)
        self._inside: list[Tensor] = []  # views of parameters that are row-major in memory
        self._beside: list[Tensor] = []  # where in the memory they go
        self._gathered: list[tuple[Tensor, Tensor]] = []
        begin = 0
        for parameter, extent in own:
            place = self.memory[begin : begin + len(extent)]
            begin += len(extent)
            if parameter.is_contiguous():
                self._inside.append(flat_bytes(parameter)[extent.start : extent.stop])
                self._beside.append(place)
            else:
                self._gathered.append((parameter.detach(), place))

    def collect(self) -> None:
        """Copy from the parameters."""
        torch._foreach_copy_(self._beside, self._inside)
        for parameter, place in self._gathered:
            place.copy_(flat_bytes(parameter))

    def spread(self) -> None:
        """Copy to the parameters."""
        torch._foreach_copy_(self._inside, self._beside)
        for parameter, place in self._gathered:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            flat_bytes(whole).copy_(place)
            parameter.copy_(whole)
