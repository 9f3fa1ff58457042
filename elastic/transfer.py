"""Moving a replica's training state from its peers to a worker that joins.

    joiner                donor 0                  donor 1, 2, ...
      | <-- preamble, header --|                          |
      | <-- preamble -------------------------------------|
      |--- go (or: refused, because ...) --> each donor   |
      | <-- its share in pieces -|   <-- its share -------|

The state is one string of bytes: the manifest's tensors in its order, each in row-major order. Every donor
holds all of it and sends an equal share, so that several links work at once. Tensors that are cut over the workers are
described, and moved afterwards (`resharding.py`). A piece carries its step, its
number and a CRC-32; nothing is written into the joiner's tensors before these are right. Sizes are agreed
before the first piece, since gloo ends the process when a message has another size than its receiver expects.

This module must never decide who sends to whom, wait without the group's deadline, or write to a donor's
state. It reads that state while it runs: the caller sees to it that no optimizer step happens meanwhile.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from elastic.checksum import crc32
from elastic.encoding import raw_view
from elastic.errors import TransferError
from elastic.payload import (
    DESCRIPTION_SIZE_BYTES_MAX,
    Layout,
    Packer,
    Segment,
    Unpacker,
    cut_up,
    describe,
    manifest_text,
    read_description,
)
from elastic.snapshots import share_of
from elastic.state import Entry, TrainingState

PIECE_SIZE_BYTES_MAX = 16 * 2**20
PIECE_SIZE_BYTES = 4 * 2**20
# Apart from the tags of anything else on the same group, which count from 0.
TAG_PREAMBLE, TAG_HEADER, TAG_ANSWER, TAG_PIECE = range(0x05354000, 0x05354004)

_STAGING_BUFFERS = 2
_MAGIC = 0x656C617374696331  # "elastic1": the format of what follows.
_PREAMBLE = struct.Struct("<10Q")
_ANSWER = struct.Struct("<Q1016s")
_TRAILER = struct.Struct("<4Q")
_GO = 1


class Work(Protocol):
    """An operation under way."""

    def wait(self) -> object:
        """Return when it is done; raise `CollectiveAborted` when it never will be."""
        ...


class Group(Protocol):
    """Tagged messages between ranks; tensors are on the CPU and contiguous. `rank` is this process's own."""

    @property
    def rank(self) -> int: ...

    def send(self, tensor: Tensor, dst: int, tag: int) -> Work:
        """Begin to send; `tensor` must stay as it is until the work is done."""
        ...

    def recv(self, tensor: Tensor, src: int, tag: int) -> Work:
        """Begin to receive a message of exactly the size of `tensor`."""
        ...


def send_state(
    group: Group,
    state: TrainingState,
    donors: Sequence[int],
    joiners: Sequence[int],
    step: int,
    *,
    piece_size_bytes: int = PIECE_SIZE_BYTES,
) -> None:
    """Send this donor's share of the state to every joiner.

    Args:
        group: connects donors and joiners. state: equal on all donors; read, never written, and only until
            this returns. donors: ranks that send, the same on every side; the first one sends the header too.
            joiners: ranks that receive. step: the last step that the state contains. piece_size_bytes:
            payload of one message, at most `PIECE_SIZE_BYTES_MAX`. The extra memory is two of these.

    Raises:
        CollectiveAborted: a peer is gone.
        TransferError: a joiner refused, with its reason; the other joiners have been served.
        ConfigError: the state holds something that cannot be sent.
    """
    if not 0 < piece_size_bytes <= PIECE_SIZE_BYTES_MAX:
        raise ValueError(f"a piece has 1 to {PIECE_SIZE_BYTES_MAX} bytes, not {piece_size_bytes}")
    entries, tensors = state.described_tensors()
    manifest = manifest_text(entries)
    header = describe(manifest, state.small()) if group.rank == donors[0] else b""
    layout = _layout_of_replicated(entries)
    share = share_of(layout.size_bytes, donors.index(group.rank), len(donors))
    preamble = _Preamble(
        step=step,
        payload_size_bytes=layout.size_bytes,
        begin=share.start,
        end=share.stop,
        piece_size_bytes=piece_size_bytes,
        header_size_bytes=len(header),
        header_crc=crc32(header),
        manifest_crc=crc32(manifest),
        entries=len(entries),
    )
    messages = [(_tensor_of(preamble.to_bytes()), TAG_PREAMBLE)]
    if header:
        messages.append((_tensor_of(header), TAG_HEADER))
    announcements = [group.send(message, joiner, tag) for joiner in joiners for message, tag in messages]
    refusals = _refusals(group, joiners)
    _wait_for(announcements)
    served = [joiner for joiner in joiners if joiner not in refusals]
    if served:
        _send_pieces(group, Packer(layout, tensors), preamble, served)
    if refusals:
        reasons = "; ".join(f"rank {joiner}: {reason}" for joiner, reason in refusals.items())
        raise TransferError(
            f"The state of step {step} was refused ({reasons}): the joiner has to start anew."
        )


def serve_state(
    group: Group, state: TrainingState, donors: Sequence[int], joiners: Sequence[int], step: int
) -> None:
    """Send as `send_state` does; a refusal is said, but costs this donor nothing.

    The joiner that refuses ends, and the fence that follows costs the others one regroup.
    """
    try:
        send_state(group, state, donors, joiners, step)
    except TransferError as error:
        print(f"elastic: {error}", file=sys.stderr, flush=True)


def receive_state(
    group: Group, state: TrainingState, donors: Sequence[int], step: int | None = None
) -> int:
    """Receive the whole state from the donors, write it into `state`, and return the last step it contains.

    On an error nothing of `state` can be relied on: it is either untouched or partly written. What was
    announced is still received in full after a damaged piece, so that no donor waits and the group stays
    usable for another try.

    Args:
        group: connects donors and joiners.
        state: of the same structure as the donors'; optimizer state is made as needed.
        donors: ranks that send, the same on every side, in the same order.
        step: the last step that the state must contain; None for whichever the first donor offers.

    Raises:
        CollectiveAborted: a donor is gone.
        TransferError: what came is not what the donors hold, or not of this step.
        ConfigError: the donors train something else than this worker.
    """
    preambles = [_receive_preamble(group, donor) for donor in donors]
    step = preambles[0].step if step is None else step
    header = torch.empty(preambles[0].header_size_bytes, dtype=torch.uint8)
    group.recv(header, donors[0], TAG_HEADER).wait()
    try:
        entries, small = _opened(raw_view(header), preambles[0])
        layout = _layout_of_replicated(entries)
        _check_preambles(preambles, donors, layout, step)
        destinations = state.adopt(entries, small)
    except Exception as error:  # Whatever it is, the donors wait for an answer.
        _answer(group, donors, str(error) or type(error).__name__)
        raise
    _answer(group, donors, "")
    unpacker = Unpacker(layout, destinations)
    faults = _receive_pieces(group, unpacker, preambles, donors)
    if faults:
        raise TransferError(f"The state of step {step} arrived damaged ({faults[0]}): ask for it again.")
    return step


def _layout_of_replicated(entries: Sequence[Entry]) -> Layout:
    """Where in the payload each tensor lies that every donor has all of."""
    return Layout(
        Segment(number, 0, entry.size_bytes) for number, entry in enumerate(entries) if entry.sharding is None
    )


@dataclass(frozen=True, slots=True)
class _Preamble:
    """What a donor announces before it sends: everything that decides the size of a later message."""

    step: int
    payload_size_bytes: int
    begin: int
    end: int
    piece_size_bytes: int
    header_size_bytes: int
    header_crc: int
    manifest_crc: int
    entries: int

    def to_bytes(self) -> bytes:
        return _PREAMBLE.pack(
            _MAGIC,
            self.step,
            self.payload_size_bytes,
            self.begin,
            self.end,
            self.piece_size_bytes,
            self.header_size_bytes,
            self.header_crc,
            self.manifest_crc,
            self.entries,
        )

    def pieces(self) -> list[range]:
        """The byte range of each piece of this share."""
        return cut_up(range(self.begin, self.end), self.piece_size_bytes)


def _send_pieces(group: Group, packer: Packer, preamble: _Preamble, joiners: Sequence[int]) -> None:
    """Pack one piece while the one before is on its way."""
    pieces = preamble.pieces()
    stagings = _staging(pieces)
    under_way: list[list[Work]] = [[] for _ in stagings]
    for number, piece in enumerate(pieces):
        turn = number % _STAGING_BUFFERS
        _wait_for(under_way[turn])
        message = stagings[turn][: len(piece) + _TRAILER.size]
        packer.pack(piece, message)
        memory = raw_view(message)
        crc = crc32(memory[: len(piece)])
        _TRAILER.pack_into(memory, len(piece), _MAGIC, preamble.step, number, crc)
        under_way[turn] = [group.send(message, joiner, TAG_PIECE) for joiner in joiners]
    for works in under_way:
        _wait_for(works)


def _receive_pieces(
    group: Group, unpacker: Unpacker, preambles: Sequence[_Preamble], donors: Sequence[int]
) -> list[str]:
    """Receive all shares at once; returns what was wrong, in words."""
    faults: list[str] = []
    shares = [preamble.pieces() for preamble in preambles]
    stagings = [_staging(pieces) for pieces in shares]
    under_way: dict[tuple[int, int], tuple[Tensor, Work]] = {}

    def begin(share: int, number: int) -> None:
        if number < len(shares[share]):
            size_bytes = len(shares[share][number]) + _TRAILER.size
            message = stagings[share][number % _STAGING_BUFFERS][:size_bytes]
            under_way[share, number] = (message, group.recv(message, donors[share], TAG_PIECE))

    for number in range(_STAGING_BUFFERS):
        for share in range(len(shares)):
            begin(share, number)
    for number in range(max(map(len, shares))):
        for share, pieces in enumerate(shares):
            if number >= len(pieces):
                continue
            message, work = under_way.pop((share, number))
            work.wait()
            piece, memory = pieces[number], raw_view(message)
            sent = _TRAILER.unpack_from(memory, len(piece))
            expected = (_MAGIC, preambles[share].step, number, crc32(memory[: len(piece)]))
            if sent == expected:
                unpacker.unpack(piece, message)
            else:
                faults.append(
                    f"piece {number} of rank {donors[share]} is stamped step {sent[1]}, number {sent[2]}, "
                    f"CRC {sent[3]:08x} instead of step {expected[1]}, number {number}, CRC {expected[3]:08x}"
                )
            begin(share, number + _STAGING_BUFFERS)
    return faults


def _staging(pieces: Sequence[range]) -> list[Tensor]:
    """Buffers for the pieces of one share; the first piece is the largest."""
    size_bytes = len(pieces[0]) + _TRAILER.size if pieces else 0
    return [torch.empty(size_bytes, dtype=torch.uint8) for _ in pieces[:_STAGING_BUFFERS]]


def _receive_preamble(group: Group, donor: int) -> _Preamble:
    message = torch.empty(_PREAMBLE.size, dtype=torch.uint8)
    group.recv(message, donor, TAG_PREAMBLE).wait()
    magic, *fields = _PREAMBLE.unpack(raw_view(message))
    preamble = _Preamble(*fields)
    if magic != _MAGIC or preamble.header_size_bytes > DESCRIPTION_SIZE_BYTES_MAX:
        # Not answered: whatever the other side is, it does not speak this protocol.
        raise TransferError(
            f"Rank {donor} sent no valid announcement of its state: use the same version everywhere."
        )
    return preamble


def _check_preambles(
    preambles: Sequence[_Preamble], donors: Sequence[int], layout: Layout, step: int
) -> None:
    """All donors announce the same state, and shares that add up."""
    first = preambles[0]
    for index, (donor, preamble) in enumerate(zip(donors, preambles, strict=True)):
        if preamble.step != step:
            raise TransferError(
                f"Rank {donor} offers the state of step {preamble.step}, not of step {step}: ask again."
            )
        same = (preamble.entries, preamble.manifest_crc, preamble.payload_size_bytes) == (
            first.entries,
            first.manifest_crc,
            layout.size_bytes,
        )
        if not same:
            raise TransferError(
                f"Ranks {donors[0]} and {donor} describe different states of step {step}: one of them is "
                "wrong, so take neither."
            )
        is_sound = 0 < preamble.piece_size_bytes <= PIECE_SIZE_BYTES_MAX
        if not is_sound or range(preamble.begin, preamble.end) != share_of(layout.size_bytes, index, len(donors)):
            raise TransferError(
                f"Rank {donor} offers another share than its own: name the donors alike everywhere."
            )


def _opened(header: memoryview, preamble: _Preamble) -> tuple[list[Entry], str]:
    """Manifest and small state, as announced."""
    if crc32(header) != preamble.header_crc:
        raise TransferError(
            "The description of the state arrived damaged (its CRC differs): ask for it again."
        )
    described = read_description(header)
    entries, small = described.entries, described.small
    if len(entries) != preamble.entries:
        raise TransferError(
            f"The description of the state does not hold {preamble.entries} tensors: ask for it again."
        )
    return entries, small


def _answer(group: Group, donors: Sequence[int], refusal: str) -> None:
    """Tell every donor to go on, or why not."""
    reason = refusal.encode("utf-8")[: _ANSWER.size - 8]
    message = _tensor_of(_ANSWER.pack(0 if refusal else _GO, reason))
    _wait_for([group.send(message, donor, TAG_ANSWER) for donor in donors])


def _refusals(group: Group, joiners: Sequence[int]) -> dict[int, str]:
    """Each joiner's answer; the reasons of those that refuse."""
    answers = [torch.empty(_ANSWER.size, dtype=torch.uint8) for _ in joiners]
    _wait_for(
        [group.recv(answer, joiner, TAG_ANSWER) for answer, joiner in zip(answers, joiners, strict=True)]
    )
    refusals: dict[int, str] = {}
    for joiner, answer in zip(joiners, answers, strict=True):
        verdict, reason = _ANSWER.unpack(raw_view(answer))
        if verdict != _GO:
            refusals[joiner] = reason.rstrip(b"\0").decode("utf-8", errors="replace")
    return refusals


def _tensor_of(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _wait_for(works: Sequence[Work]) -> None:
    for work in works:
        work.wait()
