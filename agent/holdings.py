"""The memory of one keeper: slices that the agent handed over, parity, and images of slices that are being assembled.

Slices are mapped to read only; their memory is the agent's. Parity and images are the keeper's own. What is read out for
a peer comes with the checksum that it had when it was first read or written, so that a bit which flips in memory is
found by whoever receives it, and nothing is computed twice. This file must never decide what is kept.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from agent.shards import CHUNK_BYTES, Answer, Buffer, Status
from agent.tables import Table, make_table, placed, shard_bytes
from elastic.checksum import crc32
from elastic.encoding import raw_view
from elastic.errors import ConfigError, TransferError
from elastic.snapshots import Slice


class Stored:
    """One slice in memory.

    Attributes:
        slice: what it is.
        view: its bytes as they are stored.
    """

    def __init__(self, part: Slice, memory: mmap.mmap) -> None:
        self.slice = part
        self.view = memoryview(memory)[: part.stored_bytes]

    def checked(self) -> Slice:
        """Return the slice with its checksums, which may not have been known.

        Raises:
            TransferError: they were known, and the bytes are others.
        """
        part = self.slice
        payload = crc32(self.view[: part.end - part.begin])
        description = crc32(self.view[part.description_at :])
        if part.payload_crc not in (0, payload) or part.description_crc not in (0, description):
            raise TransferError(
                f"Slice {part.index} of step {part.snapshot.step} is not what it was when its checksum was made; "
                "take it from elsewhere."
            )
        return replace(part, payload_crc=payload, description_crc=description)


def map_slice(part: Slice, fd: int) -> Stored:
    """Map a slice that the agent holds.

    Raises:
        ConfigError: the memory is smaller than the slice.
    """
    size_bytes = os.fstat(fd).st_size
    if size_bytes < max(part.stored_bytes, 1):
        raise ConfigError(
            f"The memory of slice {part.index} of step {part.snapshot.step} has {size_bytes} bytes, not the "
            f"{part.stored_bytes} of the slice: hand over the right one."
        )
    return Stored(part, mmap.mmap(fd, max(part.stored_bytes, 1), mmap.MAP_SHARED, mmap.PROT_READ))


class Image(Stored):
    """Memory of the keeper's own into which a slice is assembled.

    Attributes:
        fd: the memfd; it lives as long as this object, so that a thread which still writes never meets another file.
    """

    def __init__(self, part: Slice) -> None:
        self.fd = os.memfd_create(f"elastic-slice-{part.snapshot.step}-{part.index}", os.MFD_CLOEXEC)
        size_bytes = max(part.stored_bytes, 1)
        os.ftruncate(self.fd, size_bytes)
        super().__init__(part, mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ))

    def write(self, offset: int, data: Tensor) -> None:
        """Write bytes; through the file, which costs half of what touching new pages of a mapping does."""
        view = raw_view(data)
        while view:
            written = os.pwrite(self.fd, view, offset)
            view, offset = view[written:], offset + written

    def __del__(self) -> None:
        if (fd := getattr(self, "fd", -1)) >= 0:
            os.close(fd)


class Shard:
    """All slices of one node as one string of bytes, to read."""

    def __init__(self, slices: Mapping[int, Stored]) -> None:
        self._stored = [slices[index] for index in sorted(slices)]
        self.table: Table = make_table(stored.slice for stored in self._stored)
        self.size_bytes = shard_bytes(self.table)
        self._checksums: dict[tuple[int, int], int] = {}
        self._checksums_max = 4 * (self.size_bytes // CHUNK_BYTES + 64)

    def answer(self, offset: int, length: int) -> Answer:
        """Read a range, with the checksum that it had when it was first read."""
        if offset + length > self.size_bytes:
            return Answer.of(Status.REFUSED, f"the shard has {self.size_bytes} bytes".encode())
        data = self._read(offset, length)
        crc = self._checksums.get((offset, length))
        if crc is None:
            crc = crc32(data)
            if len(self._checksums) < self._checksums_max:  # whoever asks for odd ranges must not fill this memory
                self._checksums[offset, length] = crc
        return Answer(Status.OK, data, crc)

    def _read(self, offset: int, length: int) -> Buffer:
        pieces = list(cut(self.table, offset, length))
        if len(pieces) == 1 and len(pieces[0][2]) == length:
            number, start, _ = pieces[0]
            return self._stored[number].view[start : start + length]
        joined = bytearray(length)  # zeros between the slices
        for number, start, span in pieces:
            joined[span.start : span.stop] = self._stored[number].view[start : start + len(span)]
        return bytes(joined)


def cut(table: Table, offset: int, length: int) -> Iterator[tuple[int, int, range]]:
    """The slices in a range of a shard: which, from where in it, and which bytes of the range they are."""
    for number, (begin, part) in enumerate(placed(table)):
        start, stop = max(begin, offset), min(begin + part.stored_bytes, offset + length)
        if start < stop:
            yield number, start - begin, range(start - offset, stop - offset)


class Parity:
    """The parity blocks that this node holds of one snapshot."""

    def __init__(self, block_bytes: int, memory: mmap.mmap) -> None:
        self.block_bytes = block_bytes
        self.memory = memory
        self._view = memoryview(memory)
        self._places: dict[int, int] = {}  # stripe -> where its block begins
        self._checksums: dict[tuple[int, int], int] = {}

    def place(self, stripe: int) -> None:
        """Give a stripe its block."""
        self._places.setdefault(stripe, len(self._places) * self.block_bytes)

    def chunk(self, stripe: int, offset: int) -> Tensor:
        """The memory of a chunk, to write."""
        return as_tensor(self._chunk(stripe, offset))

    def seal(self, stripe: int, offset: int) -> None:
        """A chunk is written."""
        self._checksums[stripe, offset] = crc32(self._chunk(stripe, offset))

    def is_sealed(self, stripe: int, offset: int) -> bool:
        """Whether a chunk was written."""
        return (stripe, offset) in self._checksums

    def answer(self, stripe: int, offset: int, length: int) -> Answer:
        """Read a chunk, with the checksum that it had when it was written."""
        crc = self._checksums.get((stripe, offset))
        if crc is None or length != min(CHUNK_BYTES, self.block_bytes - offset):
            return Answer.of(Status.REFUSED, f"no such chunk of the parity of stripe {stripe} is held".encode())
        return Answer(Status.OK, self._chunk(stripe, offset), crc)

    def _chunk(self, stripe: int, offset: int) -> memoryview:
        begin = self._places[stripe]
        return self._view[begin + offset : begin + min(offset + CHUNK_BYTES, self.block_bytes)]


class ParityMemory:
    """Memory for sets of parity. One set that is free is kept: pages that were touched before are many times faster."""

    def __init__(self) -> None:
        self._spare: mmap.mmap | None = None

    def take(self, size_bytes: int) -> mmap.mmap:
        """Return memory of at least this size; its content is arbitrary."""
        spare, self._spare = self._spare, None
        if spare is not None and size_bytes <= len(spare) <= 2 * size_bytes:
            return spare
        return mmap.mmap(-1, max(size_bytes, 1))

    def give_back(self, memory: mmap.mmap) -> None:
        """Take memory back that nobody writes to any more."""
        self._spare = memory


def chunks(size_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of each chunk of a block or shard."""
    for offset in range(0, size_bytes, CHUNK_BYTES):
        yield offset, min(CHUNK_BYTES, size_bytes - offset)


def as_tensor(view: Buffer) -> Tensor:
    """Memory as uint8, without a copy; it is not to be written to where it is read-only."""
    if not len(view):
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be written to, as is meant
        return torch.frombuffer(view, dtype=torch.uint8)


def padded(data: Buffer, length: int) -> Tensor:
    """The bytes of a chunk of a block, with zeros behind the end of its shard."""
    if len(data) == length:
        return as_tensor(data)
    whole = torch.zeros(length, dtype=torch.uint8)
    whole[: len(data)] = as_tensor(data)
    return whole
