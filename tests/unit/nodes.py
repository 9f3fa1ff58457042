"""Small nodes for tests: what an agent serves to its workers, without the agent."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from agent.memory import MemoryService
from elastic.memory import SnapshotMemory

T = TypeVar("T")
DEADLINE_S = 60.0


class Node:
    """A memory service on an event loop of its own thread, as an agent's would be."""

    def __init__(self, folder: Path, budget_bytes: int, allocation_wait_s: float) -> None:
        self.path = folder / "memory.sock"
        self.service = MemoryService(self.path, budget_bytes, allocation_wait_s=allocation_wait_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    def do(self, work: Callable[[MemoryService], T]) -> T:
        """Call a method of the service on the loop, as its agent does."""

        async def on_loop() -> T:
            return work(self.service)

        return self.run(on_loop())

    def link(self, worker: str, pid: int = 0) -> SnapshotMemory:
        """A worker's end; this process's if no pid is given."""
        self.do(lambda service: service.expect(worker, pid or os.getpid()))
        return SnapshotMemory(self.path, worker, DEADLINE_S)

    def close(self) -> None:
        self.run(self.service.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()


@contextmanager
def node(folder: Path, budget_bytes: int = 64 * 2**20, allocation_wait_s: float = DEADLINE_S) -> Iterator[Node]:
    """A node's memory service; one that has room for a worker at once, however busy the machine is."""
    made = Node(folder, budget_bytes, allocation_wait_s)
    try:
        made.run(made.service.start())
        yield made
    finally:
        made.close()
