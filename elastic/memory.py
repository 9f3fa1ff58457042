"""A worker's side of the snapshots in memory: room that its agent owns and it fills, and slices that its agent holds.

The agent makes the memory files, so that they outlive the worker; the worker maps them and copies its slices in. What
lies in them is told on a page of shared memory, without a message. Asking for room or for a slice is a message over a
unix socket, with the files beside the answer. Both ends of page and messages are here; the agent's service is
`agent/memory.py`. This file must never import torch, and every call in it has a deadline.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, fields
from io import FileIO
from pathlib import Path

from elastic.checksum import crc32
from elastic.domain import NO_STEP
from elastic.errors import ConfigError, ElasticError, ProtocolError, TransferError, Unreachable
from elastic.snapshots import Slice, SnapshotId, numbers_of, slice_of

BUFFERS_MAX = 3
"""A snapshot of every step needs three: the stable one, the one that is being protected, and the next."""
PAGE_SIZE_BYTES = 4096
MESSAGE_SIZE_BYTES_MAX = 16 * 2**10

_FREE, _WRITING, _FILLED = range(3)
_STABLE_AT, _PROTECTED_AT, _PAUSED_AT, _BUFFERS_AT = 0, 1, 3, 8  # words of eight bytes; a snapshot has two
_RECORD = struct.Struct("=12q")  # turn, the ten numbers of a slice, CRC-32 of all these
_BUFFER_WORDS = 16  # the state, and behind it the record
_READS_MAX = 4
_MADV_POPULATE_WRITE = 23  # mmap(2); Python has no name for it
_madvise = ctypes.CDLL(None, use_errno=True).madvise  # mmap.madvise would hold the interpreter's lock
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


# ----------------------------------------------------------------------------------------------------
# The page


@dataclass(frozen=True, slots=True)
class Filled:
    """What one buffer of a worker holds.

    Attributes:
        turn: how often the worker has filled this buffer; another turn means other bytes.
    """

    buffer: int
    turn: int
    slice: Slice


class SnapshotPage:
    """One page of memory in which a worker says what its buffers hold.

    The worker writes everything but the protected step, which is the agent's. A word of eight bytes is read old or new;
    a record of several is believed only if it reads the same twice and its checksum is right. So a reader never sees
    half of two records, and one that was damaged counts as nothing.

    Raises:
        OSError, ValueError: the file descriptor is no memory file of a page.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_SIZE_BYTES)
        self._words = memoryview(self._map).cast("q")

    @staticmethod
    def create(name: str) -> int:
        """Return the descriptor of a new page (a memfd: it vanishes with its last user)."""
        fd = os.memfd_create(f"elastic-snapshots-{name}")
        os.ftruncate(fd, PAGE_SIZE_BYTES)
        page = SnapshotPage(fd)
        page.stable = page._words[_PROTECTED_AT] = NO_STEP
        page.close()
        return fd

    @property
    def stable(self) -> int:
        """The newest step that is protected everywhere, as far as the worker knows; -1 for none.

        The worker's to set; the agent lowers it when the job goes back to an older step, which the worker then learns too.
        """
        return self._words[_STABLE_AT]

    @stable.setter
    def stable(self, step: int) -> None:
        self._words[_STABLE_AT] = step

    @property
    def protected(self) -> SnapshotId | None:
        """The newest snapshot of which this worker's slice is protected; None for none. The agent's to set."""
        step = self._words[_PROTECTED_AT]
        generation = self._words[_PROTECTED_AT + 1]
        # Between two reads that agree nothing was written: it is set to none before it is changed.
        return SnapshotId(step, generation) if step != NO_STEP and step == self._words[_PROTECTED_AT] else None

    @protected.setter
    def protected(self, snapshot: SnapshotId) -> None:
        self._words[_PROTECTED_AT] = NO_STEP
        self._words[_PROTECTED_AT + 1] = snapshot.generation
        self._words[_PROTECTED_AT] = snapshot.step

    @property
    def paused(self) -> bool:
        """Whether nothing is to be captured for now, so that what there is stays. The agent's to set."""
        return bool(self._words[_PAUSED_AT])

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._words[_PAUSED_AT] = paused

    def begin(self, buffer: int) -> None:
        """Say that the buffer is being written: what it held is no more."""
        self._words[_at(buffer)] = _WRITING

    def filled(self, buffer: int, piece: Slice) -> None:
        """Say that the buffer now holds this slice, all of it."""
        at = _at(buffer)
        (turn,) = struct.unpack_from("=q", self._map, 8 * (at + 1))
        numbers = (turn + 1, *numbers_of(piece))
        _RECORD.pack_into(self._map, 8 * (at + 1), *numbers, _checksum(numbers))
        self._words[at] = _FILLED  # last: until now nobody looked at the record

    def slices(self) -> list[Filled]:
        """Return what the filled buffers hold."""
        found = (self._read(buffer) for buffer in range(BUFFERS_MAX))
        return [filled for filled in found if filled is not None]

    def _read(self, buffer: int) -> Filled | None:
        at = _at(buffer)
        before = b""
        for _ in range(_READS_MAX):
            record = bytes(self._words[at : at + 1 + _RECORD.size // 8])
            if record == before:
                break
            before = record
        else:
            return None  # it is being written all the time, so it is not filled
        state, turn, *numbers, crc = struct.unpack(f"=q{_RECORD.format[1:]}", record)
        if state != _FILLED or crc != _checksum((turn, *numbers)):
            return None
        try:
            return Filled(buffer, turn, slice_of(numbers))
        except ValueError:
            return None  # damaged, like one whose checksum is wrong

    def close(self) -> None:
        """Unmap the page."""
        self._words.release()
        self._map.close()


def _at(buffer: int) -> int:
    if not 0 <= buffer < BUFFERS_MAX:
        raise ValueError(f"buffers are numbered from 0 to {BUFFERS_MAX - 1}, there is no {buffer}")
    return _BUFFERS_AT + _BUFFER_WORDS * buffer


def _checksum(numbers: tuple[int, ...]) -> int:
    return crc32(struct.pack(f"={len(numbers)}q", *numbers))


# ----------------------------------------------------------------------------------------------------
# Messages


@dataclass(frozen=True, slots=True)
class AskRoom:
    """A worker wants to write to a buffer of at least this size, one of so many that it will use."""

    worker: str
    buffer: int
    size_bytes: int
    buffers: int


@dataclass(frozen=True, slots=True)
class AskSlice:
    """A worker wants to read a slice."""

    step: int
    generation: int
    index: int


@dataclass(frozen=True, slots=True)
class Granted:
    """The answer to `AskRoom`: the buffer's size, with the files of page and buffer beside it. 0 and none: not now."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to `AskSlice`, with its file beside it."""

    slice: list[int]


@dataclass(frozen=True, slots=True)
class Refused:
    """The other answer: the name of an error, and its sentence."""

    error: str
    reason: str


Message = AskRoom | AskSlice | Granted | Found | Refused
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in (AskRoom, AskSlice, Granted, Found, Refused)}
_REFUSALS: dict[str, type[ElasticError]] = {
    error.__name__: error for error in (ConfigError, TransferError, ProtocolError)
}


def pack(message: Message) -> bytes:
    """A message as JSON."""
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    return json.dumps({type(message).__name__: values}, separators=(",", ":")).encode()


def unpack(data: bytes) -> Message:
    """The inverse of `pack`.

    Raises:
        ProtocolError: no version of the other side sends this.
    """
    try:
        ((name, values),) = json.loads(data).items()
        message = _KINDS[name](**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ProtocolError(
            f"A message about snapshot memory is malformed ({error!r}): use one version on all nodes."
        ) from error
    for field in fields(message):
        if type(getattr(message, field.name)).__name__ != str(field.type).split("[")[0]:
            raise ProtocolError(f"A message about snapshot memory has no sound {field.name}: {message}.")
    return message


# ----------------------------------------------------------------------------------------------------
# The client


class StoredSlice:
    """A slice in the agent's memory, to be read.

    Read by the kernel straight to where it goes: mapping as much memory takes as long as copying it.

    Attributes:
        slice: with both checksums.
    """

    def __init__(self, piece: Slice, fd: int) -> None:
        self.slice = piece
        self._file = FileIO(fd)

    def read(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the stored bytes from `offset` on. (Others share the file's position, so it is not used.)

        Raises:
            TransferError: there are not as many.
        """
        while len(target):
            size_bytes = os.preadv(self._file.fileno(), [target], offset)
            if not size_bytes:
                raise TransferError(
                    f"The memory of a slice ends at byte {offset}: take an older snapshot. ({self.slice})"
                )
            offset, target = offset + size_bytes, target[size_bytes:]

    def description(self) -> memoryview:
        """Return the description.

        Raises:
            TransferError: it is damaged.
        """
        description = memoryview(bytearray(self.slice.description_bytes))
        self.read(self.slice.description_at, description)
        if crc32(description) != self.slice.description_crc:
            raise TransferError(f"The description of a slice is damaged: take an older snapshot. ({self.slice})")
        return description

    def close(self) -> None:
        """Let go of it."""
        self._file.close()


class SnapshotMemory:
    """One worker's link to the memory service of its agent. Connects when it is first used.

    Args:
        socket_path: of the agent's service. worker: its name, by which the agent knows it.
        timeout_s: the longest that one call may take; a slice that is new is read once by the agent.

    Attributes:
        page: the worker's page; None until there was room.
    """

    def __init__(self, socket_path: str | Path, worker: str, timeout_s: float = 30.0) -> None:
        self._path = str(socket_path)
        self._worker = worker
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self.page: SnapshotPage | None = None

    def room(self, buffer: int, size_bytes: int, buffers: int) -> mmap.mmap | None:
        """Return a buffer to write to, or None for now: its pages are being made, or dead workers' slices are in the way.

        A larger size may be asked for later; then the former mapping of this buffer is to be dropped.

        Args:
            buffer: its number, from 0. size_bytes: the least that it must hold. buffers: how many of this size this
                worker will ask for, up to `BUFFERS_MAX`.

        Raises:
            ConfigError: the node's budget is too small for all of them; says what is needed.
            Unreachable: the agent did not answer.
            ProtocolError: the agent does not know this process as that worker.
        """
        answer, files = self._ask(AskRoom(self._worker, buffer, size_bytes, buffers), 2)
        try:
            if answer == Granted(0):
                return None
            if not isinstance(answer, Granted) or answer.size_bytes < size_bytes or len(files) != 2:
                raise ProtocolError(f"The agent answered {answer} with {len(files)} files when asked for room.")
            if self.page is None:
                self.page = SnapshotPage(files[0])
            return mmap.mmap(files[1], answer.size_bytes)
        finally:
            _close(files)

    def slice(self, snapshot: SnapshotId, index: int) -> StoredSlice:
        """Return a slice that this node holds, of whichever worker, living or dead.

        Raises:
            TransferError: the agent does not hold it, or no longer undamaged.
            Unreachable, ProtocolError: as above.
        """
        answer, files = self._ask(AskSlice(snapshot.step, snapshot.generation, index), 1)
        try:
            if not isinstance(answer, Found) or len(files) != 1:
                raise ProtocolError(f"The agent answered {answer} with {len(files)} files when asked for a slice.")
            return StoredSlice(slice_of(answer.slice), files.pop())
        except ValueError as error:
            raise ProtocolError(f"The agent answered with what is no slice ({error}): use one version.") from error
        finally:
            _close(files)

    def close(self) -> None:
        """Hang up. The next call connects again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, request: Message, files_max: int) -> tuple[Message, list[int]]:
        files: list[int] = []
        try:
            channel = self._connected()
            channel.send(pack(request))
            data, files, flags, _ = socket.recv_fds(channel, MESSAGE_SIZE_BYTES_MAX, files_max, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            self.close()  # a late answer must not be taken for that to the next request
            raise Unreachable(
                f"The agent of worker {self._worker} did not answer about snapshot memory within "
                f"{self._timeout_s:g} s ({error or type(error).__name__}): try again, and look whether it lives."
            ) from error
        try:
            if not data or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                self.close()
                raise Unreachable(
                    f"The agent of worker {self._worker} hung up when asked about snapshot memory: try again."
                )
            answer = unpack(data)
            if isinstance(answer, Refused):
                raise _REFUSALS.get(answer.error, ProtocolError)(answer.reason)
        except ElasticError:
            _close(files)
            raise
        return answer, list(files)

    def _connected(self) -> socket.socket:
        if self._socket is None:
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            channel.settimeout(self._timeout_s)
            try:
                channel.connect(self._path)
            except OSError:
                channel.close()
                raise
            self._socket = channel
        return self._socket


def populate(memory: mmap.mmap, begin: int, end: int) -> None:
    """Have the pages of these bytes, without changing them: a page that is first touched in a copy costs ten times more.

    Other Python threads run meanwhile.

    Args:
        memory: mapped to be written. begin, end: in it, in bytes.

    Raises:
        ConfigError: the machine has no memory left.
    """
    begin -= begin % PAGE_SIZE_BYTES
    if end <= begin:
        return
    start = ctypes.c_char.from_buffer(memory, begin)
    if _madvise(ctypes.addressof(start), end - begin, _MADV_POPULATE_WRITE) == 0:
        return
    number = ctypes.get_errno()
    if number != errno.EINVAL:
        raise ConfigError(
            f"The machine has no memory for {end - begin} more bytes of snapshots ({os.strerror(number)}): lower "
            "--snapshot-memory, or give this node more memory."
        )
    for place in range(begin, end, PAGE_SIZE_BYTES):  # a kernel before 5.14
        memory[place] = memory[place]


def _close(files: Iterable[int]) -> None:
    for fd in files:
        os.close(fd)
