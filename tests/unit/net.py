"""A process group of threads in one process, for what is exchanged rather than for how."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable

from torch import Tensor

from elastic.errors import CollectiveAborted

DEADLINE_S = 30.0


class Net:
    """Messages between threads, as picky as gloo about the size of a message."""

    def __init__(self, tamper: Callable[[int, int, int, Tensor], None] | None = None) -> None:
        self.boxes: dict[tuple[int, int, int], queue.Queue[tuple[Tensor, threading.Event]]] = defaultdict(
            queue.Queue
        )
        self.lock = threading.Lock()
        self.tamper = tamper
        self.sent: list[tuple[int, int, int, int, int]] = []

    def box(self, src: int, dst: int, tag: int) -> queue.Queue[tuple[Tensor, threading.Event]]:
        with self.lock:
            return self.boxes[src, dst, tag]


class Link:
    """One rank's end of a `Net`. A message is copied when it is received: the sender must leave it alone."""

    def __init__(self, net: Net, rank: int, size: int = 0) -> None:
        self.net = net
        self.rank = rank
        self.size = size
        self.generation = 1

    def send(self, tensor: Tensor, dst: int, tag: int) -> Sent:
        assert tensor.is_contiguous() and tensor.is_cpu
        done = threading.Event()
        with self.net.lock:
            self.net.sent.append((self.rank, dst, tag, len(tensor), tensor.data_ptr()))
        self.net.box(self.rank, dst, tag).put((tensor, done))
        return Sent(done)

    def recv(self, tensor: Tensor, src: int, tag: int) -> Received:
        return Received(self.net, tensor, src, self.rank, tag)

    @property
    def peers(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def post(self, tensor: Tensor, dst: int, tag: int) -> None:
        self.send(tensor, dst, tag)

    def take(self, tensor: Tensor, src: int, tag: int) -> Received:
        return self.recv(tensor, src, tag)

    def drain(self) -> None:
        return


class Sent:
    def __init__(self, done: threading.Event) -> None:
        self.done = done

    def wait(self) -> None:
        if not self.done.wait(DEADLINE_S):
            raise CollectiveAborted("nobody received the message")


class Received:
    def __init__(self, net: Net, tensor: Tensor, src: int, dst: int, tag: int) -> None:
        self.net, self.tensor, self.src, self.dst, self.tag = net, tensor, src, dst, tag

    def wait(self) -> None:
        try:
            message, done = self.net.box(self.src, self.dst, self.tag).get(timeout=DEADLINE_S)
        except queue.Empty:
            raise CollectiveAborted("nobody sent the message") from None
        assert message.shape == self.tensor.shape, "gloo would have ended the process"
        self.tensor.copy_(message)
        if self.net.tamper is not None:
            self.net.tamper(self.src, self.dst, self.tag, self.tensor)
        done.set()


def run(net: Net, tasks: dict[int, Callable[[Link], None]]) -> dict[int, Exception]:
    """Run one task per rank, each on a thread; returns what they raised."""
    errors: dict[int, Exception] = {}

    def perform(rank: int, task: Callable[[Link], None]) -> None:
        try:
            task(Link(net, rank, len(tasks)))
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=perform, args=item, daemon=True) for item in tasks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_S)
        assert not thread.is_alive()
    return errors
