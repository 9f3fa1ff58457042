"""Small worlds for tests: ranks as threads where bits are compared, as processes where one must die."""

from __future__ import annotations

import itertools
import multiprocessing as mp
import multiprocessing.context
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch._C._distributed_c10d import FileStore, HashStore, Store

from elastic.building import build_group
from elastic.group import Group

T = TypeVar("T")

_generations = itertools.count(1)
ADDRESS = "127.0.0.1"
DEADLINE_S = 60.0
"""For things that should take milliseconds; a test that needs it has failed."""


def connect(
    store: Store | None,
    rank: int,
    size: int,
    generation: int = 1,
    neighbours: Iterable[int] = (),
    **timeouts: float,
) -> Group:
    """Build a group with the deadlines of a test."""
    limits = {"connect_timeout_s": 20.0, "operation_timeout_s": 20.0, **timeouts}
    return build_group(
        store, rank, size, generation=generation, address=ADDRESS, neighbours=neighbours, **limits
    )


def in_threads(size: int, body: Callable[[int], T]) -> list[T]:
    """Run `body(rank)` on a thread for each rank; all results, or the first error."""
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(body, rank) for rank in range(size)]
        return [future.result(DEADLINE_S) for future in futures]


@contextmanager
def two_groups() -> Iterator[list[Group]]:
    """Both ends of a world of two in this process (a third rank's sockets could not be told apart here)."""
    store, generation = HashStore(), next(_generations)
    made = in_threads(2, lambda rank: connect(store, rank, 2, generation))
    try:
        yield made
    finally:
        for group in made:
            group.close()


class Peer:
    """One rank as a process, and what it reports."""

    def __init__(self, rank: int, process: mp.context.ForkServerProcess, reports: mp.Queue[Any]) -> None:
        self.rank = rank
        self.process = process
        self._reports = reports

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def report(self) -> Any:
        """The next thing that the process has to say."""
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            has_ended = not self.process.is_alive()
            try:
                return self._reports.get(timeout=0.1)
            except queue.Empty:
                code = self.process.exitcode
                assert not has_ended, f"rank {self.rank} ended with exit code {code} and said nothing"
                assert time.monotonic() < deadline_s, f"rank {self.rank} said nothing"


@contextmanager
def in_processes(
    size: int, body: Callable[[int, int, Store, Callable[[Any], None]], None], directory: Path
) -> Iterator[list[Peer]]:
    """Run `body(rank, size, store, report)` in a process for each rank; nobody outlives the `with`."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "elastic.reduction", "elastic.verdict"])
    path = directory / f"store-{next(_generations)}"
    peers = []
    for rank in range(size):
        reports: mp.Queue[Any] = context.Queue()
        process = context.Process(target=_run, args=(body, rank, size, str(path), reports), daemon=True)
        process.start()
        peers.append(Peer(rank, process, reports))
    try:
        yield peers
    finally:
        for peer in peers:
            peer.process.kill()
        for peer in peers:
            peer.process.join()


def _run(
    body: Callable[[int, int, Store, Callable[[Any], None]], None],
    rank: int,
    size: int,
    path: str,
    reports: mp.Queue[Any],
) -> None:
    body(rank, size, FileStore(path, size), reports.put)
    reports.close()
    reports.join_thread()  # what was said must arrive before the process is gone


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for a state that nobody announces."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.002)


def open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd")) - 1


def system_threads() -> int:
    """How many threads this process has, those of gloo included."""
    return len(os.listdir("/proc/self/task"))


def after(delay_s: float, deed: Callable[[], object]) -> threading.Timer:
    """Do something from another thread a little later."""
    timer = threading.Timer(delay_s, deed)
    timer.daemon = True
    timer.start()
    return timer
