"""Groups that are built, ended and built again: in one process, and with peers that really die."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore, Store

from elastic.building import GroupBuild
from elastic.errors import BuildCancelled, CollectiveAborted
from elastic.group import Group, Work, _Kind
from elastic.sockets import parse_address
from tests.unit.worlds import (
    ADDRESS,
    after,
    connect,
    eventually,
    in_processes,
    in_threads,
    open_files,
    system_threads,
    two_groups,
)

Report = Callable[[Any], None]


def building(store: Store, rank: int, size: int, generation: int = 1, wait_s: float = 20.0) -> GroupBuild:
    return GroupBuild(
        store,
        rank,
        size,
        generation=generation,
        address=ADDRESS,
        connect_timeout_s=wait_s,
        operation_timeout_s=20.0,
    )


def swap(group: Group, value: float, tag: int = 0) -> float:
    """Exchange a number with the other rank of a world of two."""
    inbox = torch.empty(1)
    works = [group.recv(inbox, 1 - group.rank, tag), group.send(torch.tensor([value]), 1 - group.rank, tag)]
    for work in works:
        work.wait()
    return inbox.item()


def test_a_world_of_one_needs_neither_store_nor_network() -> None:
    before = open_files()
    group = connect(None, 0, 1)
    group.settle()
    assert (group.connections, group.peers, open_files()) == (0, [], before)
    with pytest.raises(CollectiveAborted, match="no peers"):
        group.send(torch.ones(1), 0, 0)
    group.abort("the end")
    with pytest.raises(CollectiveAborted, match="the end"):
        group.recv(torch.ones(1), 0, 0)


def exchange_in_a_ring(rank: int, size: int, store: Store, report: Report) -> None:
    group = connect(store, rank, size)
    source, target = (rank - 1) % size, (rank + 1) % size
    inbox, posted = torch.empty(2), torch.empty(1000)
    # Tags, not the order of issue, say what belongs together.
    works = [group.recv(inbox[1:], source, 8), group.recv(inbox[:1], source, 7)]
    works += [group.send(torch.tensor([rank + tag / 10]), target, tag) for tag in (7, 8)]
    works.append(group.take(posted, source, 7000))
    group.post(torch.full((1000,), float(rank)), target, 7000)
    for work in works:
        work.wait()
        work.wait()
    group.settle()
    report((group.connections, group.peers, inbox.tolist(), sorted(set(posted.tolist()))))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_knows_its_connections_and_operations_work(size: int, tmp_path: Path) -> None:
    with in_processes(size, exchange_in_a_ring, tmp_path) as peers:
        for peer in peers:
            connections, others, inbox, posted = peer.report()
            source = (peer.rank - 1) % size
            assert connections == size - 1
            assert sorted([*others, peer.rank]) == list(range(size))
            assert inbox == pytest.approx([source + 0.7, source + 0.8])
            assert posted == [source]


def test_settle_returns_when_the_peer_has_received_what_was_posted() -> None:
    with two_groups() as made:
        memory, inbox = torch.ones(1 << 22), torch.empty(1 << 22)

        def post() -> None:
            made[0].post(memory, 1, 0)
            made[0].settle()
            memory.zero_()

        def take() -> None:
            made[1].take(inbox, 0, 0).wait()
            made[1].settle()

        in_threads(2, lambda rank: (post, take)[rank]())
        assert bool((inbox == 1).all())


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.002, 0.004, 0.008])
@pytest.mark.parametrize("who", [0, 1])
def test_an_abort_ends_a_message_that_is_half_on_its_way(who: int, delay_s: float) -> None:
    # gloo does not wake those who wait for such a message: they would wait for the operation timeout.
    for _ in range(5):
        with two_groups() as made:
            memory, inbox = torch.ones(1 << 22), torch.zeros(1 << 22)
            works = [made[0].send(memory, 1, 0), made[1].recv(inbox, 0, 0)]
            time.sleep(delay_s)
            began = time.monotonic()
            made[who].abort("in the middle")

            def end(rank: int, works: list[Work] = works) -> None:
                with contextlib.suppress(CollectiveAborted):
                    works[rank].wait()

            in_threads(2, end)
            made[1].drain()
            assert time.monotonic() - began < 2.0
            received = inbox.clone()
            assert torch.equal(inbox, received)


def test_abort_ends_pending_operations_within_milliseconds_and_later_ones_at_once() -> None:
    with two_groups() as made:
        group = made[0]
        work = group.recv(torch.empty(4), 1, 5)
        raised: list[float] = []

        def wait() -> None:
            with pytest.raises(CollectiveAborted, match="told to"):
                work.wait()
            raised.append(time.monotonic())

        waiter = threading.Thread(target=wait)
        waiter.start()
        began = time.monotonic()
        group.abort("told to")
        group.abort("again")
        waiter.join()
        assert raised[0] - began < 1.0  # about 10 ms on a quiet machine
        assert group.aborted == "told to"
        with pytest.raises(CollectiveAborted, match="told to"):
            group.send(torch.empty(4), 1, 5)
        with pytest.raises(CollectiveAborted, match="told to"):
            work.wait()
        group.drain()


def test_an_abort_ends_the_operations_of_the_peer_too() -> None:
    with two_groups() as made:
        work = made[0].recv(torch.empty(4), 1, 5)
        made[1].abort("this rank was fenced")
        with pytest.raises(CollectiveAborted):
            work.wait()


def test_a_failed_operation_ends_the_group() -> None:
    with two_groups() as made:
        store = HashStore()
        short = in_threads(2, lambda rank: connect(store, rank, 2, 1, operation_timeout_s=0.05))
        work = short[0].recv(torch.empty(1), 1, 1)
        other = short[0].recv(torch.empty(1), 1, 2)
        with pytest.raises(CollectiveAborted):
            work.wait()
        assert short[0].aborted
        short[0].drain()
        with pytest.raises(CollectiveAborted):
            short[0].recv(torch.empty(1), 1, 3)
        with pytest.raises(CollectiveAborted):
            other.wait()  # its end has been seen, and the memory is free
        for group in short:
            group.close()
        assert made[0].aborted is None


def test_drain_waits_until_nothing_writes_any_more() -> None:
    with two_groups() as made:
        inbox = torch.zeros(1 << 20)
        made[0].recv(inbox, 1, 1)
        outbox = torch.ones(1 << 20)
        made[1].send(outbox, 0, 1)
        made[0].drain()
        assert bool((inbox == 1).all())


def test_the_sockets_of_the_user_and_of_other_groups_are_left_alone() -> None:
    listener = socket.create_server((ADDRESS, 0))
    mine = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    with two_groups() as kept, two_groups() as ended:
        late = socket.create_connection(listener.getsockname())
        late_end, _ = listener.accept()
        for group in ended:
            group.abort("old")
        for near, far in ((mine, theirs), (late, late_end)):
            near.sendall(b"alive")
            assert far.recv(5) == b"alive"
        assert in_threads(2, lambda rank: swap(kept[rank], rank + 1.0)) == [2.0, 1.0]
    for open_socket in (mine, theirs, late, late_end, listener):
        open_socket.close()


def test_two_builds_may_overlap() -> None:
    stores = [HashStore(), HashStore()]
    made = in_threads(4, lambda i: connect(stores[i % 2], i // 2, 2, generation=i % 2 + 1))
    assert [group.connections for group in made] == [1] * 4
    made[0].abort("only this one")
    assert in_threads(2, lambda rank: swap(made[2 * rank + 1], rank + 1.0)) == [2.0, 1.0]
    for group in made:
        group.close()


def test_a_build_can_be_cancelled_while_peers_are_awaited() -> None:
    build = building(HashStore(), 0, 2)
    after(0.05, lambda: build.cancel("generation 2 replaces it"))
    began = time.monotonic()
    with pytest.raises(BuildCancelled, match="generation 2 replaces it"):
        build.result()
    assert time.monotonic() - began < 5.0


def test_a_store_that_raises_cancels_the_build() -> None:
    class Fenced(Store):
        def set(self, key: str, value: str) -> None:
            raise BuildCancelled("a newer generation is there")

    with pytest.raises(BuildCancelled, match="a newer generation"):
        connect(Fenced(), 0, 2)


def test_a_store_that_fails_is_reported_as_a_group_that_cannot_be() -> None:
    class Broken(Store):
        def set(self, key: str, value: str) -> None:
            raise OSError("no route to the store")

    with pytest.raises(CollectiveAborted, match="no route to the store"):
        connect(Broken(), 0, 2)


def test_a_peer_that_never_comes_is_named_within_the_timeout() -> None:
    began = time.monotonic()
    with pytest.raises(CollectiveAborted, match=r"ranks \[1\] published no address"):
        connect(HashStore(), 0, 2, connect_timeout_s=0.3)
    assert time.monotonic() - began < 5.0


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        connect(HashStore(), 2, 2)


def test_addresses_are_read_from_what_gloo_publishes() -> None:
    seen: dict[str, bytes] = {}

    class Spy(Store):
        def __init__(self, inner: Store) -> None:
            super().__init__()
            self._inner = inner

        def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
            seen[key] = value
            self._inner.set(key, value)  # type: ignore[arg-type]  # bytes, whatever the stubs say

        def get(self, key: str) -> bytes:
            return self._inner.get(key)

        def wait(self, keys: list[str], timeout: timedelta) -> None:  # type: ignore[override]
            self._inner.wait(keys, timeout)

    store = HashStore()
    made = in_threads(2, lambda rank: connect(Spy(store), rank, 2, generation=7))
    endpoints = [parse_address(value) for value in seen.values()]
    assert len(endpoints) == 2 and {endpoint and endpoint[0] for endpoint in endpoints} == {ADDRESS}
    assert all(key.startswith("g7/") for key in seen)
    assert parse_address(b"") is None and parse_address(b"\x00" * 200) is None
    for group in made:
        group.close()


def test_close_leaves_the_interpreter_to_others() -> None:
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        with two_groups() as made:
            began = time.monotonic()
            for group in made:
                group.close()
                group.close()
            assert time.monotonic() - began < 1.0
            assert all(group.aborted for group in made)
    finally:
        sys.setswitchinterval(switch_s)


def test_thirty_generations_leave_no_thread_and_no_descriptor_behind() -> None:
    def one_life() -> None:
        with two_groups() as made:
            made[0].recv(torch.empty(1), 1, 1)
            made[0].abort("next")
            made[0].drain()

    one_life()
    eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("drop-")], "groups dropped")
    files, threads = open_files(), system_threads()
    for _ in range(30):
        one_life()
    eventually(lambda: open_files() <= files, f"{files} descriptors again")
    eventually(lambda: system_threads() <= threads, f"{threads} threads again")


# Peers that die ---------------------------------------------------------------------------------------------


class DiesAfterPublishing(Store):
    """The store of a rank that sends itself a signal when its address is out but nobody is connected."""

    def __init__(self, inner: Store, number: signal.Signals) -> None:
        super().__init__()
        self._inner = inner
        self._number = number

    def set(self, key: str, value: str) -> None:
        self._inner.set(key, value)
        os.kill(os.getpid(), self._number)


def build_with_a_victim(rank: int, size: int, store: Store, report: Report, number: int) -> None:
    if rank == size - 1:
        connect(DiesAfterPublishing(store, signal.Signals(number)), rank, size)
        return
    began = time.monotonic()
    try:
        connect(store, rank, size, connect_timeout_s=1.0)
    except CollectiveAborted as error:
        report((str(error), time.monotonic() - began))
    else:
        report(("built", 0.0))


def build_with_a_killed_peer(rank: int, size: int, store: Store, report: Report) -> None:
    build_with_a_victim(rank, size, store, report, signal.SIGKILL)


def build_with_a_stopped_peer(rank: int, size: int, store: Store, report: Report) -> None:
    build_with_a_victim(rank, size, store, report, signal.SIGSTOP)


@pytest.mark.parametrize("body", [build_with_a_killed_peer, build_with_a_stopped_peer])
def test_a_peer_that_dies_or_stops_during_the_build_does_not_hang_the_others(
    body: Callable[[int, int, Store, Report], None], tmp_path: Path
) -> None:
    with in_processes(3, body, tmp_path) as peers:
        for peer in peers[:2]:
            message, seconds = peer.report()
            assert "was not built" in message
            assert seconds < 3.0


def cancelled_beside_a_stopped_peer(rank: int, size: int, store: Store, report: Report) -> None:
    if rank == size - 1:
        connect(DiesAfterPublishing(store, signal.SIGSTOP), rank, size)
        return
    build = building(store, rank, size)
    after(0.3, lambda: build.cancel("fenced"))
    began = time.monotonic()
    try:
        build.result()
    except BuildCancelled:
        report(time.monotonic() - began)


def test_a_build_can_be_cancelled_while_a_peer_is_stopped(tmp_path: Path) -> None:
    with in_processes(2, cancelled_beside_a_stopped_peer, tmp_path) as peers:
        assert peers[0].report() < 3.0


def exchange_until_it_fails(rank: int, size: int, store: Store, report: Report) -> None:
    group = connect(store, rank, size)
    outbox, inbox = torch.ones(2_000_000), torch.empty(size, 2_000_000)
    report("ready")
    with contextlib.suppress(CollectiveAborted):
        while True:
            works = [group.take(inbox[peer], peer, 0) for peer in group.peers]
            for peer in group.peers:
                group.post(outbox, peer, 0)
            for work in works:
                work.wait()
            group.settle()
    began = time.monotonic()
    group.drain()
    again = connect(store, rank, size - 1, generation=2)
    again.settle()
    report(time.monotonic() - began)


def test_survivors_of_a_kill_go_on_in_a_new_generation(tmp_path: Path) -> None:
    with in_processes(4, exchange_until_it_fails, tmp_path) as peers:
        assert [peer.report() for peer in peers] == ["ready"] * 4
        os.kill(peers[3].pid, signal.SIGKILL)
        for peer in peers[:3]:
            assert peer.report() < 5.0


def test_a_group_that_ends_while_an_operation_is_started_lets_go_of_its_memory() -> None:
    """Its receiver must outlive the message that is on its way, or gloo never learns that the connection is over."""
    for trial in range(20):
        with two_groups() as (one, other):
            start = one._recv

            def racing(tensor: torch.Tensor, src: int, tag: int, kind: _Kind, world: Any = (one, start, trial)) -> Any:
                group, inner, number = world
                if kind is _Kind.MARK:
                    time.sleep(0.0002 * number)
                    group.abort("from another thread, just now")
                return inner(tensor, src, tag, kind)

            one._recv = racing  # type: ignore[method-assign]
            if trial % 2:
                other.post(torch.ones(2_000_000), 0, 5)
            with pytest.raises(CollectiveAborted):
                one.take(torch.zeros(2_000_000), 1, 5)
            if not trial % 2:
                with contextlib.suppress(CollectiveAborted):
                    other.post(torch.ones(2_000_000), 0, 5)
            began_s = time.monotonic()
            one.drain()
            assert time.monotonic() - began_s < 2
