"""How a group is built: on a thread of its own, so that whoever waits for it can always be let go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from elastic.errors import BuildCancelled, CollectiveAborted
from elastic.group import Backend, Group, brief
from elastic.sockets import Endpoint, find_sockets, parse_address, shut_down

_GLOO: Any = ProcessGroupGloo  # torch's stubs differ from torch in most of what is used here


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
        shut_down(find_sockets(*self._store.endpoints()))

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
            self._give_up(self._failed(brief(error), error))
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
        backend: Backend = _GLOO(prefixed, self._rank, self._size, options)
        sockets = find_sockets(*self._store.endpoints())
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


def _as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
