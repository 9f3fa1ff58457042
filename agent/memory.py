"""The node's snapshots in memory: the files that workers write their slices to, and which of them can be read back.

The agent owns every file, a set for each incarnation of a worker, so that slices outlive whoever wrote them and no
zombie writes into a set that others use. A slice is believed by its checksums alone. This file must never import
torch, write to a buffer, or decide which snapshot is restored.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import mmap
import os
import socket
import struct
from pathlib import Path

from elastic.checksum import crc32
from elastic.domain import NO_STEP
from elastic.errors import ConfigError, ElasticError, ProtocolError, TransferError
from elastic.memory import (
    BUFFERS_MAX,
    MESSAGE_SIZE_BYTES_MAX,
    PAGE_SIZE_BYTES,
    AskRoom,
    AskSlice,
    Filled,
    Found,
    Granted,
    Message,
    Refused,
    SnapshotPage,
    pack,
    populate,
    unpack,
)
from elastic.snapshots import Slice, SnapshotId, is_spent, numbers_of

CONNECTIONS_MAX = 256
BACKLOG = 64
ALLOCATED_AT_ONCE_BYTES = 64 * 2**20
_PEER = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


@dataclasses.dataclass(frozen=True, slots=True)
class HeldSlice:
    """A slice in the memory of this node.

    Attributes:
        slice: its payload_crc is 0 until the agent has read the payload.
        fd: the file that holds it, from its beginning. The service's own: duplicate it to keep it past an await.
    """

    worker: str
    buffer: int
    slice: Slice
    fd: int


class MemoryService:
    """Serves the workers of one node, and tells their agent what is there. For one asyncio loop.

    Args:
        socket_path: of the unix socket to listen on.
        budget_bytes: the most that all buffers of workers together may take.
        allocation_wait_s: how long a worker that asks for room may be held up, so that it has a small buffer at once.
    """

    def __init__(self, socket_path: Path, budget_bytes: int, *, allocation_wait_s: float = 0.05) -> None:
        self._path = socket_path
        self._allocation_wait_s = allocation_wait_s
        self._budget_bytes = budget_bytes
        self._pids: dict[str, int] = {}
        self._sets: dict[str, _Set] = {}
        self._adopted = _Set("")
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the path is taken, or cannot be that of a socket.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.setblocking(False)
            listener.bind(str(self._path))
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._start(self._accept_forever(listener))

    async def close(self) -> None:
        """End everything, and free all memory that nobody else has mapped."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)
        for one in self._sets.values():
            one.keep([])
        self._sets.clear()
        self.drop_adopted()

    # -- what the agent says and asks ------------------------------------------------------------------------------

    def expect(self, worker: str, pid: int) -> None:
        """Serve this process as that worker, a new incarnation with a name of its own. No other process is served."""
        self._pids[worker] = pid

    def worker_gone(self, worker: str) -> None:
        """The worker's process has ended: what it was writing is dropped, what it had filled is kept."""
        self._pids.pop(worker, None)
        one = self._sets.get(worker)
        if one is not None:
            one.keep(one.filled())
            self._drop_empty()

    def held(self) -> list[HeldSlice]:
        """The slices of all workers, living and dead, and what was adopted, without those that were found to be damaged."""
        return [
            HeldSlice(one.worker, filled.buffer, one.known(filled), one.images[filled.buffer].fd)
            for one in (*self._sets.values(), self._adopted)
            for filled in one.filled()
        ]

    async def check(self, *, again: bool = False) -> None:
        """Read every new slice, one after the other, so that the CRC of its payload is known.

        Args:
            again: those that are known, too, to find what has been damaged since.
        """
        for one in list(self._sets.values()):
            for filled in one.filled():
                if filled in one.filled() and (again or not one.is_checked(filled)):
                    await one.examine(filled)

    def forget_before(
        self, stable: int, generation: int | None = None, *, but: SnapshotId | None = None
    ) -> None:
        """Free the slices of dead workers that are older than the stable step.

        Args:
            generation: of the world that trains now. If given, slices of other generations go too unless they are of the
                stable step: nobody will protect them any more.
            but: a snapshot that stays, since the job goes back to it although it was not stable yet.
        """
        for one in self._sets.values():
            if one.page is None:
                one.keep(
                    [
                        f
                        for f in one.filled()
                        if f.slice.snapshot == but or not _is_forgettable(f.slice.snapshot, stable, generation)
                    ]
                )
        self._drop_empty()

    def adopt(self, piece: Slice, fd: int) -> None:
        """Hand out a slice that was assembled elsewhere, as if a worker had left it here; it counts in no budget.

        Args:
            piece: with the CRCs that its bytes must have.
            fd: a file that holds it from its beginning; the service's from now on, even if it is refused.

        Raises:
            TransferError: the file is too short.
        """
        size_bytes = os.fstat(fd).st_size
        if size_bytes < piece.stored_bytes:
            os.close(fd)
            raise TransferError(f"A file of {size_bytes} bytes cannot hold {piece}: assemble it again.")
        filled = Filled(max(self._adopted.images, default=0) + 1, 0, piece)
        image = self._adopted.images[filled.buffer] = _Image(fd, size_bytes)
        image.checked = filled, piece.payload_crc
        self._adopted.keep([*self._adopted.filled(), filled])

    def drop_adopted(self, but: SnapshotId | None = None) -> None:
        """Free everything that was adopted, but the slices of one snapshot."""
        self._adopted.keep([filled for filled in self._adopted.filled() if filled.slice.snapshot == but])

    def go_back(self, step: int) -> None:
        """The job goes on from a step that may be older than what living workers know to be stable: nothing newer is."""
        for one in self._sets.values():
            if one.page is not None:
                one.page.stable = min(one.page.stable, step)

    def show_protected(self, snapshot: SnapshotId) -> None:
        """Show the living workers the newest snapshot of which their slices are protected."""
        for one in self._sets.values():
            if one.page is not None:
                one.page.protected = snapshot

    def limit(self, budget_bytes: int) -> None:
        """Allow so much from now on; what has been granted stays."""
        self._budget_bytes = budget_bytes

    def pause(self, paused: bool) -> None:
        """Let workers capture nothing for now, so that what they have captured stays as it is; or let them again."""
        for one in self._sets.values():
            if one.page is not None:
                one.page.paused = paused

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        return self._budget_bytes - self.used_bytes

    @property
    def stable(self) -> int:
        """The newest step that any living worker knows to be protected everywhere; -1 for none."""
        return max((one.page.stable for one in self._sets.values() if one.page is not None), default=NO_STEP)

    @property
    def used_bytes(self) -> int:
        """What the buffers of living workers, and the slices of dead ones, take of the budget."""
        return sum(one.size_bytes for one in self._sets.values())

    def _drop_empty(self) -> None:
        self._sets = {worker: one for worker, one in self._sets.items() if one.page is not None or one.images}

    # -- what workers ask ------------------------------------------------------------------------------------------

    def _start(self, work) -> None:  # type: ignore[no-untyped-def]
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept_forever(self, listener: socket.socket) -> None:
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            if len(self._tasks) > CONNECTIONS_MAX:
                connection.close()
            else:
                self._start(self._converse(connection))

    async def _converse(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            pid, _, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            while data := await loop.sock_recv(connection, MESSAGE_SIZE_BYTES_MAX):
                try:
                    answer, files = await self._answer(pid, data)
                except ElasticError as error:
                    answer, files = Refused(type(error).__name__, str(error)), []
                # At once, since the files may be closed during an await. One that lets its answers pile up until
                # they do not fit is cut off.
                socket.send_fds(connection, [pack(answer)], files)
        except OSError:
            return  # its process ended, which the agent knows by other means
        finally:
            connection.close()

    async def _answer(self, pid: int, data: bytes) -> tuple[Message, list[int]]:
        if pid not in self._pids.values():
            raise ProtocolError(f"Process {pid} is no worker of this agent: ask the agent that started it.")
        match unpack(data):
            case AskRoom() as request:
                return await self._grant(pid, request)
            case AskSlice(step, generation, index):
                return await self._find(SnapshotId(step, generation), index)
            case other:
                raise ProtocolError(f"Process {pid} asked {other}, which is an answer: use one version everywhere.")

    async def _grant(self, pid: int, request: AskRoom) -> tuple[Message, list[int]]:
        worker, number = request.worker, request.buffer
        one = self._sets.get(worker)
        if self._pids.get(worker) != pid or (one is not None and one.page is None):
            raise ProtocolError(f"Process {pid} asks for room as worker {worker}, which it is not.")
        if request.size_bytes < 1 or not 0 <= number < request.buffers <= BUFFERS_MAX:
            raise ProtocolError(f"Worker {worker} asks for room that cannot be: {request}.")
        size_bytes = -(-request.size_bytes // PAGE_SIZE_BYTES) * PAGE_SIZE_BYTES
        if one is None or number not in one.images or one.images[number].size_bytes < size_bytes:
            self._check_budget(worker, request.buffers * size_bytes)
            present_bytes = 0 if one is None or number not in one.images else one.images[number].size_bytes
            if self.used_bytes + size_bytes - present_bytes > self._budget_bytes:
                return Granted(0), []  # what dead workers left is in the way, until a newer snapshot is stable
            one = self._sets.setdefault(worker, one or _Set(worker, SnapshotPage.create(worker)))
            one.promised_bytes = request.buffers * size_bytes
            # The pages are made here, a gigabyte in seconds, so that no worker stands still for them.
            await asyncio.wait({one.grow(number, size_bytes)}, timeout=self._allocation_wait_s)
        image = one.images.get(number)
        if image is None or one.page is None or image.allocation is None or not image.allocation.done():
            return Granted(0), []
        image.allocation.result()
        return Granted(image.size_bytes), [one.page_fd, image.fd]

    def _check_budget(self, worker: str, promised_bytes: int) -> None:
        """Raise ConfigError unless all buffers of the living can ever fit, with so much for this worker."""
        living = [one for one in self._sets.values() if one.page is not None and one.worker != worker]
        others_bytes = sum(max(one.promised_bytes, one.size_bytes) for one in living)
        if others_bytes + promised_bytes > self._budget_bytes:
            raise ConfigError(
                f"The snapshots of worker {worker} need {_mib(promised_bytes)} of memory, and other workers have "
                f"{_mib(others_bytes)} of the {_mib(self._budget_bytes)} that --snapshot-memory allows on this node: set it "
                f"to {_mib(others_bytes + promised_bytes)} or more, or train without snapshots (--snapshot-every 0)."
            )

    async def _find(self, snapshot: SnapshotId, index: int) -> tuple[Message, list[int]]:
        for one in (self._adopted, *self._sets.values()):
            for filled in one.filled():
                if (filled.slice.snapshot, filled.slice.index) == (snapshot, index):
                    if not one.is_checked(filled):
                        await one.examine(filled)
                    if filled in one.filled():
                        return Found(list(numbers_of(one.known(filled)))), [one.images[filled.buffer].fd]
        raise TransferError(
            f"This node does not hold slice {index} of the snapshot of step {snapshot.step} (generation "
            f"{snapshot.generation}), or no longer undamaged: have it rebuilt from its group, or take an older snapshot."
        )


class _Image:
    """A memory file as the agent reads it, and what it knows of the bytes in it.

    Attributes:
        checked: what was found to be sound, and the CRC-32 of its payload.
        lost: what was found to be damaged.
        allocation: done when all of a file that was made here has pages.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self.checked: tuple[Filled, int] | None = None
        self.lost: Filled | None = None
        self.memory = memoryview(b"")
        self.allocation: asyncio.Task[None] | None = None
        self._is_open = True
        self._map()

    def grow(self, size_bytes: int) -> asyncio.Task[None]:
        """Make the file longer; what is in it stays."""
        os.ftruncate(self.fd, size_bytes)
        self.size_bytes = size_bytes
        self._map()
        work = asyncio.to_thread(self._allocate, os.dup(self.fd), size_bytes)
        self.allocation = asyncio.get_running_loop().create_task(work)
        return self.allocation

    def close(self) -> None:
        self._is_open = False
        os.close(self.fd)

    def _map(self) -> None:
        # The old mapping ends with the last check, on another thread, that still reads it.
        if self.size_bytes:
            self.memory = memoryview(mmap.mmap(self.fd, self.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ))

    def _allocate(self, fd: int, size_bytes: int) -> None:
        try:
            memory = mmap.mmap(fd, size_bytes)
        finally:
            os.close(fd)
        for start in range(0, size_bytes, ALLOCATED_AT_ONCE_BYTES):
            if self._is_open:
                populate(memory, start, min(start + ALLOCATED_AT_ONCE_BYTES, size_bytes))
        memory.close()


class _Set:
    """Images that belong together: those of one incarnation of a worker, or what was adopted.

    Attributes:
        page: on which a living worker says what its buffers hold; None if there is no such worker.
        images: by number of the buffer.
        promised_bytes: what the worker may ask for in all.
    """

    def __init__(self, worker: str, page_fd: int | None = None) -> None:
        self.worker = worker
        self.page_fd = -1 if page_fd is None else page_fd
        self.page = None if page_fd is None else SnapshotPage(page_fd)
        self.images: dict[int, _Image] = {}
        self.promised_bytes = 0
        self._kept: list[Filled] = []

    @property
    def size_bytes(self) -> int:
        return sum(image.size_bytes for image in self.images.values())

    def grow(self, buffer: int, size_bytes: int) -> asyncio.Task[None]:
        """Have a buffer of this size; returns what is done when it has all its pages."""
        if buffer not in self.images:
            self.images[buffer] = _new_image(self.worker, buffer)
        return self.images[buffer].grow(size_bytes)

    def filled(self) -> list[Filled]:
        """What its buffers hold, without what is lost or cannot be."""
        return [
            filled
            for filled in (self._kept if self.page is None else self.page.slices())
            if (image := self.images.get(filled.buffer)) is not None
            if image.lost != filled and filled.slice.stored_bytes <= image.size_bytes
        ]

    def is_checked(self, filled: Filled) -> bool:
        checked = self.images[filled.buffer].checked
        return checked is not None and checked[0] == filled

    def known(self, filled: Filled) -> Slice:
        """The slice, with the CRC of its payload if that has been read."""
        checked = self.images[filled.buffer].checked
        if checked is None or checked[0] != filled:
            return filled.slice
        return dataclasses.replace(filled.slice, payload_crc=checked[1])

    async def examine(self, filled: Filled) -> None:
        """Read a slice on another thread: learn its payload's CRC, or that it is lost."""
        image = self.images[filled.buffer]
        payload_crc, description_crc = await asyncio.to_thread(_checksums, image.memory, filled.slice)
        if filled not in self.filled():
            return  # it is being written anew, or was dropped
        is_sound = description_crc == filled.slice.description_crc
        if self.is_checked(filled):
            is_sound = is_sound and payload_crc == self.known(filled).payload_crc
        if is_sound:
            image.checked = filled, payload_crc
        else:
            image.lost = filled

    def keep(self, filled: list[Filled]) -> None:
        """Let go of everything but these; nothing will be written any more."""
        if self.page is not None:
            self.page.close()
            os.close(self.page_fd)
            self.page = None
        self._kept = filled
        for buffer in self.images.keys() - {one.buffer for one in filled}:
            self.images.pop(buffer).close()


def _new_image(worker: str, buffer: int) -> _Image:
    """An empty file, which nobody can make shorter: that would end whoever reads it by SIGBUS."""
    fd = os.memfd_create(f"elastic-snapshot-{worker}-{buffer}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return _Image(fd, 0)


def _checksums(memory: memoryview, piece: Slice) -> tuple[int, int]:
    """The CRC-32 of a stored slice's payload and of its description."""
    description = memory[piece.description_at : piece.stored_bytes]
    return crc32(memory[: piece.end - piece.begin]), crc32(description)


def _is_forgettable(snapshot: SnapshotId, stable: int, generation: int | None) -> bool:
    return is_spent(snapshot, snapshot.generation if generation is None else generation, stable)


def _mib(size_bytes: int) -> str:
    """In whole mebibytes, never less than it is."""
    return f"{-(-size_bytes // 2**20)} MiB"
