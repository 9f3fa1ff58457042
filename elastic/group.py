"""Process groups that can be built beside a running one, and ended from any thread.

This is the only file that knows gloo. A group belongs to one generation, owns its own device and so its own
listening port, and touches no global state of `torch.distributed`. What gloo cannot do is done here: its
`abort()` unblocks nothing, so a group is ended by shutting its sockets down, after which every pending
operation raises within milliseconds. The sockets are told apart for certain, by the addresses that the ranks
publish through the store; the user's sockets and those of other groups are never touched, and a listening
socket is never shut down (that would end the process). The file must never wait without a deadline, and must
never let an error of gloo pass untranslated.
"""

from __future__ import annotations

import contextlib
import enum
import ipaddress
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store
from torch._C._distributed_c10d import Work as ForeignWork

from elastic.errors import BuildCancelled, CollectiveAborted, GroupStuck

_GLOO: Any = ProcessGroupGloo  # torch's stubs differ from torch in most of what is used here

Endpoint = tuple[str, int]
"""An IP address in its shortest spelling, and a port."""


class Work(Protocol):
    """An operation that was started; its tensor belongs to it until `wait` has returned or raised."""

    def wait(self) -> None:
        """Return when the operation is complete; raise `CollectiveAborted` when it never will be."""


class _Backend(Protocol):
    """The part of gloo's process group that is used (the stubs of torch do not list it)."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> ForeignWork: ...
    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> ForeignWork: ...


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
    """The process group of one generation. Made by `build_group`; operations come from one thread at a time.

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
        backend: _Backend | None,
        sockets: Sequence[_Socket],
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
        self._posted: list[object] = []
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

    def abort(self, reason: str) -> None:
        """End the group from any thread: every pending operation raises soon, every later one at once.

        Idempotent; the first reason stays. The memory of pending operations is theirs until `drain`.
        """
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
        _shut_down(self._sockets)

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
        mark = self._recv(_EMPTY, src, tag, _Kind.MARK)
        return self._keep(_Received(self, mark, data, tensor, receipt))

    def _post(self, tensor: torch.Tensor, dst: int, tag: int, kind: _Kind) -> None:
        self._posted.append((tensor, self._send(tensor, dst, tag, kind)))

    def _keep(self, work: _Awaited) -> Work:
        self._works.add(work)
        return work

    def _send(self, tensor: torch.Tensor, dst: int, tag: int, kind: _Kind) -> ForeignWork:
        return self._start(lambda backend: backend.send([tensor], dst, 4 * tag + kind))

    def _recv(self, tensor: torch.Tensor, src: int, tag: int, kind: _Kind) -> ForeignWork:
        return self._start(lambda backend: backend.recv([tensor], src, 4 * tag + kind))

    def _start(self, start: Callable[[_Backend], ForeignWork]) -> ForeignWork:
        backend = self._backend
        if self._reason is not None or backend is None:
            raise self._aborted()
        try:
            return start(backend)
        except RuntimeError as error:
            self.abort(f"an operation could not start: {_brief(error)}")
            raise self._aborted() from error

    def _await(self, foreign: ForeignWork) -> None:
        try:
            foreign.wait(self._operation_timeout)
        except RuntimeError as error:
            # One lost peer means that this generation is over. Ending the whole group at once lets the other
            # operations fail in milliseconds, here and (by the closed connections) at the peers.
            self.abort(f"an operation failed: {_brief(error)}")
            raise self._aborted() from error

    def _aborted(self) -> CollectiveAborted:
        reason = self._reason or "a world of one has no peers"
        return CollectiveAborted(f"Generation {self.generation} is over for rank {self.rank}: {reason}; regroup.")


class GroupBuild:
    """A group being built on a thread of its own, so that whoever waits for it can always be let go."""

    def __init__(
        self,
        store: Store | None,
        rank: int,
        size: int,
        *,
        generation: int,
        address: str,
        connect_timeout_s: float,
        operation_timeout_s: float,
        neighbours: Iterable[int] = (),
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is not in a world of {size}")
        self._rank = rank
        self._size = size
        self._generation = generation
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._operation_timeout_s = operation_timeout_s
        self._neighbours = frozenset(neighbours)
        self._deadline_s = time.monotonic() + connect_timeout_s
        self._store = _ObservedStore(store, self)
        self._condition = threading.Condition()
        self._group: Group | None = None
        self._error: CollectiveAborted | None = None
        threading.Thread(target=self._run, name=f"build-g{generation}", daemon=True).start()

    def cancel(self, reason: str) -> None:
        """Give the build up, from any thread; `result` raises `BuildCancelled`. A late call does nothing."""
        self._give_up(BuildCancelled(f"Generation {self._generation} was not built: {reason}."))

    def result(self) -> Group:
        """Wait for the group.

        Raises:
            BuildCancelled: `cancel` was called first.
            CollectiveAborted: the ranks could not all connect within `connect_timeout_s`; the message names
                those that never published an address.
        """
        with self._condition:
            settled = self._condition.wait_for(self._is_settled, self._deadline_s - time.monotonic())
        if not settled:
            self._give_up(self._failed(f"not every rank connected within {self._connect_timeout_s:g} s"))
        with self._condition:
            if self._group is not None:
                return self._group
            assert self._error is not None
            raise self._error

    def _is_settled(self) -> bool:
        return self._group is not None or self._error is not None

    def _give_up(self, error: CollectiveAborted) -> None:
        with self._condition:
            if self._is_settled():
                return
            self._error = error
            self._condition.notify_all()
        # The builder's thread may be inside gloo: without its sockets it comes out soon, and what it may have
        # finished by then it drops itself. Where no socket exists yet it leaves at its own, equal, deadline.
        _shut_down(_find_sockets(*self._store.endpoints()))

    def check_cancelled(self) -> None:
        """Raise if nobody waits for this build any more (called within every use of the store)."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            group = self._build()
        except CollectiveAborted as error:
            self._give_up(error)
        except Exception as error:  # gloo's RuntimeErrors, and whatever the store that was passed may raise
            self._give_up(self._failed(_brief(error), error))
        else:
            with self._condition:
                if self._error is None:
                    self._group = group
                    self._condition.notify_all()
                    return
            group.close()

    def _build(self) -> Group:
        if self._size == 1:
            return Group(self._generation, 0, 1, None, (), self._operation_timeout_s)
        device = _GLOO.create_device(hostname=self._address)
        options = _GLOO._Options()
        options._timeout = timedelta(seconds=max(self._deadline_s - time.monotonic(), 0.001))
        options._devices = [device]
        options._threads = 1  # they are for collectives
        prefixed = PrefixStore(f"g{self._generation}", self._store)
        backend: _Backend = _GLOO(prefixed, self._rank, self._size, options)
        sockets = _find_sockets(*self._store.endpoints())
        if len(sockets) != self._size - 1:
            # A socket that was missed would leave operations that nobody can end.
            raise self._failed(f"found {len(sockets)} connections of the group where {self._size - 1} belong")
        group = Group(
            self._generation, self._rank, self._size, backend, sockets, self._operation_timeout_s, self._neighbours
        )
        self._greet(group)
        return group

    def _greet(self, group: Group) -> None:
        """A first message from everybody to everybody: when it is over every rank has come this far."""
        within = timedelta(seconds=max(self._deadline_s - time.monotonic(), 0.001))
        usual, group._operation_timeout = group._operation_timeout, within
        try:
            group.settle()
        except CollectiveAborted as error:
            group.close()
            raise self._failed(group.aborted or "it was given up", error) from error
        group._operation_timeout = usual

    def _failed(self, reason: str, cause: BaseException | None = None) -> CollectiveAborted:
        silent = sorted(set(range(self._size)) - self._store.published())
        absent = f" (ranks {silent} published no address)" if silent and self._size > 1 else ""
        error = CollectiveAborted(
            f"Generation {self._generation} was not built by rank {self._rank} of {self._size}: "
            f"{reason}{absent}; regroup without the ranks that are gone."
        )
        error.__cause__ = cause
        return error


def build_group(
    store: Store | None,
    rank: int,
    size: int,
    *,
    generation: int,
    address: str,
    connect_timeout_s: float,
    operation_timeout_s: float,
    neighbours: Iterable[int] = (),
) -> Group:
    """Connect `size` ranks into the group of `generation`, and wait for it.

    Args:
        store: where the ranks meet (None for a world of one); keys are put under the prefix
            `g<generation>/`. It may raise to cancel.
        rank, size: this worker's number, and how many there are. One alone needs neither store nor network.
        generation: never used twice with the same store.
        address: host name or IP address to listen on, as the other ranks can reach it.
        connect_timeout_s: the longest that this call takes.
        operation_timeout_s: the longest that any later operation takes.
        neighbours: the ranks that can read this worker's memory, and it theirs.

    Raises:
        CollectiveAborted: the ranks could not all connect in time, or one died meanwhile.
        BuildCancelled: the store raised it.

    To cancel from another thread, make a `GroupBuild` with the same arguments and call its `cancel`.
    """
    return GroupBuild(
        store,
        rank,
        size,
        generation=generation,
        address=address,
        connect_timeout_s=connect_timeout_s,
        operation_timeout_s=operation_timeout_s,
        neighbours=neighbours,
    ).result()


class _ObservedStore(Store):
    """Passes calls on to the store that was given, and notes the addresses that the ranks publish."""

    def __init__(self, inner: Store | None, build: GroupBuild) -> None:
        super().__init__()
        self._inner: Any = inner  # None in a world of one, which never asks
        self._build = build
        self._own: Endpoint | None = None
        self._peers: dict[str, Endpoint] = {}
        self._seen: set[int] = set()

    def endpoints(self) -> tuple[Endpoint | None, tuple[Endpoint, ...]]:
        """This rank's listening address, and those of the peers, as far as they are known."""
        return self._own, tuple(self._peers.values())

    def published(self) -> set[int]:
        """The ranks whose addresses have been seen."""
        return set(self._seen)

    def _note(self, key: str, value: bytes) -> Endpoint | None:
        tail = key.rpartition("/")[2]
        endpoint = parse_address(value)
        if endpoint is not None and tail.isdigit():
            self._seen.add(int(tail))
        return endpoint

    def set(self, key: str, value: str | bytes) -> None:
        self._build.check_cancelled()
        endpoint = self._note(key, _as_bytes(value))
        if endpoint is not None:
            self._own = endpoint
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        self._build.check_cancelled()
        value: bytes = self._inner.get(key)
        endpoint = self._note(key, value)
        if endpoint is not None and endpoint != self._own:
            self._peers[key] = endpoint
        return value

    def add(self, key: str, amount: int) -> int:
        self._build.check_cancelled()
        return int(self._inner.add(key, amount))

    def check(self, keys: list[str]) -> bool:
        self._build.check_cancelled()
        return bool(self._inner.check(keys))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._build.check_cancelled()
        if timeout is None:
            self._inner.wait(keys)
        else:
            self._inner.wait(keys, timeout)
        self._build.check_cancelled()


def parse_address(value: bytes) -> Endpoint | None:
    """Read the listening address off what gloo publishes for a rank; None if the value is something else.

    Two length-prefixed fields come first: the host's name, and a block that begins with a `sockaddr_storage`.
    """
    if len(value) < 8:
        return None
    (name_size,) = struct.unpack_from("=Q", value)
    start = 8 + name_size + 8
    if len(value) < start + 28:
        return None
    (family,) = struct.unpack_from("=H", value, start)
    (port,) = struct.unpack_from("!H", value, start + 2)
    if family == socket.AF_INET:
        return str(ipaddress.IPv4Address(value[start + 4 : start + 8])), port
    if family == socket.AF_INET6:
        return _plain(str(ipaddress.IPv6Address(value[start + 8 : start + 24]))), port
    return None


_LOOKING = threading.Lock()
"""Whoever looks makes short-lived duplicates, which must not be found by somebody else."""


@dataclass(frozen=True)
class _Socket:
    """A socket of this process, known again by its inode even if the number was given to another file."""

    fd: int
    inode: int


def _find_sockets(own: Endpoint | None, peers: Sequence[Endpoint]) -> list[_Socket]:
    """The connections whose near end is our listening address or whose far end is that of a peer."""
    with _LOOKING:
        return _look_for_sockets(own, peers)


def _look_for_sockets(own: Endpoint | None, peers: Sequence[Endpoint]) -> list[_Socket]:
    found: list[_Socket] = []
    for name in os.listdir("/proc/self/fd"):
        with _borrow(int(name)) as borrowed:
            if borrowed is None or borrowed.type != socket.SOCK_STREAM:
                continue
            if borrowed.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
            if _endpoint(borrowed.getsockname) == own or _endpoint(borrowed.getpeername) in peers:
                found.append(_Socket(int(name), os.fstat(borrowed.fileno()).st_ino))
    return found


def _shut_down(sockets: Sequence[_Socket]) -> None:
    for known in sockets:
        with _borrow(known.fd) as borrowed:
            # The duplicate is examined, not the number, which can change hands between look and deed.
            if borrowed is None or os.fstat(borrowed.fileno()).st_ino != known.inode:
                continue
            try:
                borrowed.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the other side was faster


class _borrow:
    """A duplicate of a descriptor as a socket for the length of a `with`, or None if it is no socket."""

    def __init__(self, fd: int) -> None:
        self._socket: socket.socket | None = None
        try:
            duplicate = os.dup(fd)
        except OSError:
            return  # closed meanwhile
        try:
            self._socket = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)

    def __enter__(self) -> socket.socket | None:
        return self._socket

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()


def _endpoint(name: Callable[[], object]) -> Endpoint | None:
    try:
        address = name()
    except OSError:
        return None  # not connected
    assert isinstance(address, tuple)
    return _plain(str(address[0])), int(address[1])


def _plain(address: str) -> str:
    """An IPv4 address that travels inside IPv6 is the same address."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return str(mapped or parsed)


def _as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")


def _brief(error: BaseException) -> str:
    """What happened, without gloo's file names and its guesses at who is to blame (they are often wrong)."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line.rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0] or line
