"""One worker with a large state beside an agent's memory service: what its snapshots and restores take, in one process.

The GPT of the examples, made large (100 million parameters, with AdamW 1.2 GB of state), and a memory service in a
process of its own, as an agent's. Captures and restores are measured between flat warm copies of as many bytes.
"""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from agent.memory import MemoryService
from benchmarks.paired import beside_copies, ratio, timed_s
from elastic.capture import Capturer, restore
from elastic.errors import Unreachable
from elastic.memory import SnapshotMemory
from elastic.snapshots import SnapshotId
from elastic.state import TrainingState
from examples.gpt import GPT

WORKER = "worker"
BUFFERS = 2
BUDGET_BYTES = 4 * 2**30
START_S = 60.0
LAYERS = 14  # of 7.1 million parameters each


def serve(path: Path, pid: int, over: Connection) -> None:
    """An agent's memory service, until the other end of `over` says something or is gone."""

    async def run() -> None:
        service = MemoryService(path, BUDGET_BYTES)
        await service.start()
        service.expect(WORKER, pid)
        over.send("ready")
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(over.fileno(), ended.set)
        await ended.wait()
        await service.close()

    asyncio.run(run())


@contextmanager
def agent(folder: Path) -> Iterator[SnapshotMemory]:
    """A worker's link to a memory service in another process."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    path = folder / "memory.sock"
    process = context.Process(target=serve, args=(path, os.getpid(), theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_S):
            raise Unreachable(f"the memory service did not start within {START_S:g} s: look at what it printed")
        ours.recv()
        memory = SnapshotMemory(path, WORKER)
        yield memory
        memory.close()
    finally:
        ours.close()
        process.join(START_S)
        process.kill()


def make_state(model: nn.Module) -> TrainingState:
    """Return the state of a model and its AdamW after a step."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    return TrainingState({"model": model}, {"optimizer": optimizer}, {"scheduler": scheduler})


def size_of(state: TrainingState) -> int:
    """Return the bytes of all tensors of a state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.tensors())


class OneWorker:
    """A worker whose buffers have been filled once.

    Attributes:
        first_s: The longest that a step was held up until then, by captures that found no room too.
    """

    def __init__(self, memory: SnapshotMemory) -> None:
        self.state = make_state(GPT(dim=768, layers=LAYERS))
        self.size_bytes = size_of(self.state)
        self.flat = torch.ones(self.size_bytes, dtype=torch.uint8), torch.ones(self.size_bytes, dtype=torch.uint8)
        self._memory = memory
        self._capturer = Capturer(self.state, memory, buffers=BUFFERS)
        self.first_s = self._first_captures()

    def _first_captures(self) -> float:
        deadline_s = time.monotonic() + START_S
        longest_s, step = 0.0, 0
        while step < BUFFERS:
            self._capturer.has_room(1, step - 1)
            if self._capturer.capture(step, 1, 0, 1):
                step += 1
            elif time.monotonic() > deadline_s:
                raise Unreachable(f"the memory service made no room within {START_S:g} s: is there memory left?")
            else:
                time.sleep(0.02)  # a step
            longest_s = max(longest_s, self._capturer.cost_s)
        return longest_s

    def capture(self) -> float:
        """Take the next snapshot; returns for how many seconds that held up the worker."""
        step = self._capturer.captured_step + 1
        if not self._capturer.has_room(1, step - 1) or not self._capturer.capture(step, 1, 0, 1):
            raise Unreachable("the memory service gave no room for a snapshot, which it had before")
        return self._capturer.cost_s

    def restore(self) -> float:
        """Read the newest snapshot back into the live state; returns the seconds."""
        newest = SnapshotId(self._capturer.captured_step, 1)
        return timed_s(lambda: restore(self.state, self._memory, newest))

    def close(self) -> None:
        """Let go of the agent's memory."""
        self._capturer.close()


@contextmanager
def one_worker(folder: Path) -> Iterator[OneWorker]:
    """A worker and its agent's memory service; on one thread, as a worker is by default."""
    torch.set_num_threads(1)
    with agent(folder) as memory:
        worker = OneWorker(memory)
        yield worker
        worker.close()


def measure_captures(worker: OneWorker, rounds: int) -> dict[str, Any]:
    """Return how long captures hold up a worker, and flat copies between them."""
    captures_s, copies_s = beside_copies(worker.capture, worker.flat, rounds)
    over, interval = ratio(captures_s, copies_s)
    return {
        "state_gb": round(worker.size_bytes / 1e9, 3),
        "blocked_ms": round(1e3 * statistics.median(captures_s), 1),
        "memcpy_ms": round(1e3 * statistics.median(copies_s), 1),
        "blocked_over_memcpy": over,
        "blocked_over_memcpy_ci": interval,
        "first_blocked_ms": round(1e3 * worker.first_s, 1),
    }


def measure_restores(worker: OneWorker, rounds: int) -> dict[str, Any]:
    """Return how fast a worker reads a snapshot from its own agent, and flat copies between such reads."""
    restores_s, copies_s = beside_copies(worker.restore, worker.flat, rounds)
    over, interval = ratio(restores_s, copies_s)
    return {
        "state_gb": round(worker.size_bytes / 1e9, 3),
        "local_gbps": round(worker.size_bytes / 1e9 / statistics.median(restores_s), 2),
        "local_gbps_best": round(worker.size_bytes / 1e9 / min(restores_s), 2),
        "local_over_memcpy": over,
        "local_over_memcpy_ci": interval,
        "memcpy_gbps": round(worker.size_bytes / 1e9 / statistics.median(copies_s), 2),
    }


def measure_peers(state: TrainingState, folder: Path, rounds: int) -> dict[str, float]:
    """Return for how many ms what torch offers blocks, writing to a local disk: medians."""
    model, optimizer = state.models["model"], state.optimizers["optimizer"]
    times_s: dict[str, list[float]] = {"torch_save": [], "dcp_save": [], "dcp_async": []}
    for number in range(rounds):
        values = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        times_s["torch_save"].append(timed_s(lambda v=values: torch.save(v, folder / "state.pt")))  # type: ignore[misc]
        times_s["dcp_save"].append(timed_s(lambda v=values: dcp.save(v, checkpoint_id=folder / "dcp")))  # type: ignore[misc]
        began_s = time.perf_counter()
        written = dcp.async_save(values, checkpoint_id=folder / f"async-{number % 2}")
        times_s["dcp_async"].append(time.perf_counter() - began_s)
        written.result(START_S)
    return {f"{name}_blocked_ms": round(1e3 * statistics.median(values), 1) for name, values in times_s.items()}
