"""Process groups that can be built beside a running one, and ended from any thread.

Only this file, `building.py` and `sockets.py` know gloo. A group belongs to one generation, owns its own device and so its own
listening port, and touches no global state of `torch.distributed`. What gloo cannot do is done here: its
`abort()` unblocks nothing, so a group is ended by shutting its sockets down, after which every pending
operation raises within milliseconds. The file must never wait without a deadline, and must never let an error of
gloo pass untranslated.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Protocol

import torch
from torch._C._distributed_c10d import Work as ForeignWork

from elastic.errors import CollectiveAborted, GroupStuck
from elastic.sockets import Socket, shut_down


class Work(Protocol):
    """An operation that was started; its tensor belongs to it until `wait` has returned or raised."""

    def wait(self) -> None:
        """Return when the operation is complete; raise `CollectiveAborted` when it never will be."""


class Backend(Protocol):
    """The part of gloo's process group that is used (the stubs of torch do not list it)."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> ForeignWork: ...
    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> ForeignWork: ...


class Messages(Protocol):
    """Tagged messages between some ranks: those of a `Group`, or of a part of one."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def peers(self) -> list[int]: ...
    @property
    def neighbours(self) -> frozenset[int]: ...
    def post(self, tensor: torch.Tensor, dst: int, tag: int) -> None: ...
    def take(self, tensor: torch.Tensor, src: int, tag: int) -> Work: ...
    def abort(self, reason: str) -> None: ...
    def drain(self) -> None: ...


_EMPTY = torch.empty(0)

CLOSING_TIMEOUT_S = 10.0
"""How long gloo may take to notice that its connections were shut down; it takes milliseconds."""

TAG_MAX = 2**29 - 1
"""The largest tag; gloo has 31 bits, and a message needs up to three tags of its own."""


class _Kind(enum.IntEnum):
    """What a message of gloo is; every tag of ours becomes four of gloo's."""

    DATA = 0
    MARK = 1
    """Empty; it follows the data."""
    RECEIPT = 2
    """Empty; the data was received and waited for."""
    SETTLED = 3
    """Empty; everything that was posted has been received."""


class _Awaited:
    """An operation whose end is known from an empty message.

    gloo forgets to wake whoever waits for a message of which a part was on its way when the connection broke:
    that wait lasts until its timeout. A message that has not begun is remembered, and an empty one is never
    half on its way. So no wait is ever for data, but for an empty message that follows it.
    """

    def __init__(self, group: Group, awaited: ForeignWork, kept: object) -> None:
        self._group = group
        self._awaited: ForeignWork | None = awaited
        self._kept = kept  # gloo keeps addresses, not references: what it works on must outlive the work
        self._failed = False
        self._lock = threading.Lock()  # of two that wait gloo would wake only one

    def wait(self) -> None:
        with self._lock:
            if self._failed:
                raise self._group._aborted()
            awaited, self._awaited = self._awaited, None
            if awaited is None:
                return
            self._failed = True
            self._group._await(awaited)
            self._end()
            self._failed = False
        self._kept = None
        self._group._works.discard(self)

    def _end(self) -> None:
        pass


class _Sent(_Awaited):
    """A message that ends when the receiver says so."""


class _Received(_Awaited):
    """A message that has arrived when the mark behind it has."""

    def __init__(
        self,
        group: Group,
        awaited: ForeignWork,
        data: ForeignWork,
        kept: object,
        receipt: Callable[[], None] | None,
    ) -> None:
        super().__init__(group, awaited, kept)
        self._data = data
        self._receipt = receipt

    def _end(self) -> None:
        self._group._await(self._data)  # complete, since the mark came after it
        if self._receipt is not None:
            self._receipt()


class Group:
    """The process group of one generation. Made by `build_group`; a work is waited for by one thread at a time.

    A process holds one rank of a world: with a third one its own connections could not be told from theirs.

    There are no collectives, because gloo's own cannot be ended: shutting the sockets down wakes whoever
    waits for a message that has not begun, but not always one that waits for the rest of a message.

    Attributes:
        generation: the world that the group belongs to.
        rank, size: this worker's number, and the number of workers, in that world.
        neighbours: the ranks that can read this worker's memory, and it theirs.
        connections: the number of sockets that `abort` can shut down (`size - 1`).
    """

    def __init__(
        self,
        generation: int,
        rank: int,
        size: int,
        backend: Backend | None,
        sockets: Sequence[Socket],
        operation_timeout_s: float,
        neighbours: Iterable[int] = (),
    ) -> None:
        self.generation = generation
        self.rank = rank
        self.size = size
        self.neighbours = frozenset(neighbours)
        self.connections = len(sockets)
        self._backend = backend
        self._has_backend = backend is not None
        self._sockets = tuple(sockets)
        self._operation_timeout = timedelta(seconds=operation_timeout_s)
        self._works: set[_Awaited] = set()
        self._halves: list[tuple[ForeignWork, torch.Tensor]] = []  # operations whose other half could not be started any more
        self._posted: list[tuple[int, torch.Tensor, ForeignWork]] = []  # to whom, and what
        self._lock = threading.Lock()
        self._reason: str | None = None

    @property
    def aborted(self) -> str | None:
        """Why the group was ended, or None while it works."""
        return self._reason

    @property
    def peers(self) -> list[int]:
        """The other ranks, beginning behind this one, so that not all of them write to the same one first."""
        return [(self.rank + distance) % self.size for distance in range(1, self.size)]

    def send(self, tensor: torch.Tensor, dst: int, tag: int) -> Work:
        """Start to send a contiguous `tensor` to rank `dst`, which receives it under the same tag.

        The work is complete when the receiver has waited for it. Both sides must agree on the size in bytes by
        construction: gloo ends the process on a mismatch.
        """
        receipt = self._recv(_EMPTY, dst, tag, _Kind.RECEIPT)
        with self._held(receipt, _EMPTY):
            sent = self._send(tensor, dst, tag, _Kind.DATA), self._send(_EMPTY, dst, tag, _Kind.MARK)
        return self._keep(_Sent(self, receipt, (tensor, sent)))

    def recv(self, tensor: torch.Tensor, src: int, tag: int) -> Work:
        """Start to receive into a contiguous `tensor` what rank `src` sends."""
        return self._receive(tensor, src, tag, lambda: self._post(_EMPTY, src, tag, _Kind.RECEIPT))

    def post(self, tensor: torch.Tensor, dst: int, tag: int) -> None:
        """Send without a receipt, which saves a message; `tensor` belongs to the group until it is forgotten."""
        self._post(tensor, dst, tag, _Kind.DATA)
        self._post(_EMPTY, dst, tag, _Kind.MARK)

    def take(self, tensor: torch.Tensor, src: int, tag: int) -> Work:
        """Start to receive what rank `src` posts."""
        return self._receive(tensor, src, tag, None)

    def settle(self) -> None:
        """Wait until every rank has received all that was posted to it; every rank must call it.

        A rank calls it when what was posted to it has been waited for.
        """
        posted = self.posted
        # Kept like all works: a message that finds its receiver deleted stops gloo from reading its connection,
        # which then never learns that it was closed.
        arriving = [
            self._keep(_Awaited(self, self._recv(_EMPTY, peer, 0, _Kind.SETTLED), None)) for peer in self.peers
        ]
        for peer in self.peers:
            self._post(_EMPTY, peer, 0, _Kind.SETTLED)
        for work in arriving:
            work.wait()
        self.forget_posted(posted)

    @property
    def posted(self) -> int:
        """How many posted messages this group still keeps the memory of."""
        return len(self._posted)

    def forget_posted(self, count: int) -> None:
        """Give the memory of the oldest posted messages back: all peers have shown that they received them."""
        del self._posted[:count]

    def forget_posted_to(self, peers: Iterable[int], count: int) -> None:
        """The same for those of the oldest posted messages that went to these peers, who alone have shown it."""
        received = frozenset(peers)
        self._posted[:count] = [message for message in self._posted[:count] if message[0] not in received]

    def abort(self, reason: str) -> None:
        """End the group from any thread: every pending operation raises soon, every later one at once.

        Idempotent; the first reason stays. The memory of pending operations is theirs until `drain`.
        """
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
        shut_down(self._sockets)

    def drain(self) -> None:
        """Wait for the end of every operation that was started, errors ignored.

        Only then may the memory of an operation that failed be used again: an operation that was merely left
        alone would still write into it. Takes milliseconds after `abort`, else at most the operation timeout.

        Raises:
            GroupStuck: gloo does not let go of a connection that was shut down.
        """
        for work in tuple(self._works):
            with contextlib.suppress(CollectiveAborted):
                work.wait()
        if self._reason is not None:
            self._await_closing()
            self._halves.clear()  # nobody waits for them: gloo would not wake whoever does
        self._works.clear()

    def _await_closing(self) -> None:
        """Wait until gloo has noticed, on every connection, that it is over."""
        backend = self._backend
        deadline_s = time.monotonic() + CLOSING_TIMEOUT_S
        for peer in self.peers if backend is not None else ():
            # Nothing is ever sent under this tag: the operation fails, now or when the connection is closed.
            with contextlib.suppress(RuntimeError):
                assert backend is not None
                left = timedelta(seconds=max(deadline_s - time.monotonic(), 0.001))
                backend.recv([_EMPTY], peer, 4 * TAG_MAX).wait(left)
        if time.monotonic() > deadline_s:
            raise GroupStuck(
                f"Rank {self.rank} of generation {self.generation} shut its connections down, and gloo has not noticed "
                f"within {CLOSING_TIMEOUT_S:.0f} s: its memory cannot be used again, so this worker has to be replaced."
            )

    def close(self) -> None:
        """End the group and free its sockets and threads on a thread: gloo's destructor takes 20 ms."""
        self.abort("the group was closed")
        with self._lock:
            has_backend, self._has_backend = self._has_backend, False
        if has_backend:
            threading.Thread(target=self._drop, name=f"drop-g{self.generation}", daemon=True).start()

    def _drop(self) -> None:
        try:
            self.drain()
        except GroupStuck:
            return  # gloo may still write to its memory, which therefore stays
        self._posted.clear()
        self._backend = None  # the last reference: the destructor runs here, without the interpreter's lock

    def _receive(self, tensor: torch.Tensor, src: int, tag: int, receipt: Callable[[], None] | None) -> Work:
        data = self._recv(tensor, src, tag, _Kind.DATA)
        with self._held(data, tensor):
            mark = self._recv(_EMPTY, src, tag, _Kind.MARK)
        return self._keep(_Received(self, mark, data, tensor, receipt))

    @contextlib.contextmanager
    def _held(self, started: ForeignWork, tensor: torch.Tensor) -> Iterator[None]:
        """Keep what was started if what belongs to it cannot be, since another thread ends the group in between.

        Its message may be on its way: one that finds its receiver deleted stops gloo from reading the connection, which then
        never learns that it was closed.
        """
        try:
            yield
        except CollectiveAborted:
            self._halves.append((started, tensor))
            raise

    def _post(self, tensor: torch.Tensor, dst: int, tag: int, kind: _Kind) -> None:
        self._posted.append((dst, tensor, self._send(tensor, dst, tag, kind)))

    def _keep(self, work: _Awaited) -> Work:
        self._works.add(work)
        return work

    def _send(self, tensor: torch.Tensor, dst: int, tag: int, kind: _Kind) -> ForeignWork:
        return self._start(lambda backend: backend.send([tensor], dst, 4 * tag + kind))

    def _recv(self, tensor: torch.Tensor, src: int, tag: int, kind: _Kind) -> ForeignWork:
        return self._start(lambda backend: backend.recv([tensor], src, 4 * tag + kind))

    def _start(self, start: Callable[[Backend], ForeignWork]) -> ForeignWork:
        backend = self._backend
        if self._reason is not None or backend is None:
            raise self._aborted()
        try:
            return start(backend)
        except RuntimeError as error:
            self.abort(f"an operation could not start: {brief(error)}")
            raise self._aborted() from error

    def _await(self, foreign: ForeignWork) -> None:
        try:
            foreign.wait(self._operation_timeout)
        except RuntimeError as error:
            # One lost peer means that this generation is over. Ending the whole group at once lets the other
            # operations fail in milliseconds, here and (by the closed connections) at the peers.
            self.abort(f"an operation failed: {brief(error)}")
            raise self._aborted() from error

    def _aborted(self) -> CollectiveAborted:
        reason = self._reason or "a world of one has no peers"
        return CollectiveAborted(f"Generation {self.generation} is over for rank {self.rank}: {reason}; regroup.")


def brief(error: BaseException) -> str:
    """What happened, without gloo's file names and its guesses at who is to blame (they are often wrong)."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line.rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0] or line


class GroupPart:
    """Some ranks of a group, numbered from 0 in the order given. Ending it ends the group."""

    def __init__(self, group: Group, ranks: Sequence[int]) -> None:
        self._group, self._ranks = group, tuple(ranks)
        self._numbers = {rank: number for number, rank in enumerate(self._ranks)}

    @property
    def rank(self) -> int:
        return self._numbers[self._group.rank]

    @property
    def size(self) -> int:
        return len(self._ranks)

    @property
    def peers(self) -> list[int]:
        return [(self.rank + distance) % self.size for distance in range(1, self.size)]

    @property
    def neighbours(self) -> frozenset[int]:
        return frozenset(self._numbers[rank] for rank in self._group.neighbours if rank in self._numbers)

    def post(self, tensor: torch.Tensor, dst: int, tag: int) -> None:
        self._group.post(tensor, self._ranks[dst], tag)

    def take(self, tensor: torch.Tensor, src: int, tag: int) -> Work:
        return self._group.take(tensor, self._ranks[src], tag)

    def abort(self, reason: str) -> None:
        self._group.abort(reason)

    def drain(self) -> None:
        self._group.drain()
