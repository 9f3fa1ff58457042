"""Groups that are built, ended and built again: in one process, and with peers that really die."""

from __future__ import annotations

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

from elastic.errors import BuildCancelled, CollectiveAborted
from elastic.group import Group, GroupBuild, parse_address
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


def test_a_world_of_one_needs_neither_store_nor_network() -> None:
    before = open_files()
    group = connect(HashStore(), 0, 1)
    tensor = torch.tensor([3.0])
    group.all_reduce_sum(tensor).wait()
    group.all_reduce_max(tensor).wait()
    assert tensor.item() == 3.0
    assert (group.connections, open_files()) == (0, before)
    group.abort("the end")
    with pytest.raises(CollectiveAborted, match="the end"):
        group.all_reduce_sum(tensor)


def exchange_in_a_ring(rank: int, size: int, store: Store, report: Report) -> None:
    group = connect(store, rank, size)
    total, highest = torch.tensor([float(rank)]), torch.tensor([rank])
    group.all_reduce_sum(total).wait()
    group.all_reduce_max(highest).wait()
    inbox, source, target = torch.empty(2), (rank - 1) % size, (rank + 1) % size
    # Tags, not the order of issue, say what belongs together.
    works = [group.recv(inbox[1:], source, 8), group.recv(inbox[:1], source, 7)]
    works += [group.send(torch.tensor([rank + tag / 10]), target, tag) for tag in (7, 8)]
    for work in works:
        work.wait()
    report((group.connections, total.item(), highest.item(), inbox.tolist()))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_knows_its_connections_and_operations_work(size: int, tmp_path: Path) -> None:
    with in_processes(size, exchange_in_a_ring, tmp_path) as peers:
        for peer in peers:
            connections, total, highest, inbox = peer.report()
            assert connections == size - 1
            assert (total, highest) == (sum(range(size)), size - 1)
            assert inbox == pytest.approx([(peer.rank - 1) % size + 0.7, (peer.rank - 1) % size + 0.8])


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
            short[0].all_reduce_sum(torch.empty(1))
        other.wait()  # drained: its end has been seen, and the memory is free
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
        tensors = [torch.ones(1), torch.ones(1)]
        in_threads(2, lambda rank: kept[rank].all_reduce_sum(tensors[rank]).wait())
        assert tensors[0].item() == 2
    for open_socket in (mine, theirs, late, late_end, listener):
        open_socket.close()


def test_two_builds_may_overlap() -> None:
    stores = [HashStore(), HashStore()]
    made = in_threads(4, lambda i: connect(stores[i % 2], i // 2, 2, generation=i % 2 + 1))
    assert [group.connections for group in made] == [1] * 4
    made[0].abort("only this one")
    tensors = [torch.ones(1), torch.ones(1)]
    in_threads(2, lambda rank: made[2 * rank + 1].all_reduce_sum(tensors[rank]).wait())
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


def reduce_until_it_fails(rank: int, size: int, store: Store, report: Report) -> None:
    group: Group = connect(store, rank, size)
    tensor = torch.ones(4_000_000)
    report("ready")
    began = time.monotonic()
    try:
        while True:
            if rank == 0:
                began = time.monotonic()
            group.all_reduce_sum(tensor).wait()
    except CollectiveAborted:
        group.drain()
        again = connect(store, rank, size - 1, generation=2)
        small = torch.ones(1)
        again.all_reduce_sum(small).wait()
        report((small.item(), time.monotonic() - began))


def test_survivors_of_a_kill_go_on_in_a_new_generation(tmp_path: Path) -> None:
    with in_processes(4, reduce_until_it_fails, tmp_path) as peers:
        assert [peer.report() for peer in peers] == ["ready"] * 4
        os.kill(peers[3].pid, signal.SIGKILL)
        for peer in peers[:3]:
            total, _ = peer.report()
            assert total == 3
